"""The notebooks of examples/ run from start to end, and print what their stored outputs promise."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PROMISES = {
    "edit_without_easyedit": (
        r"^Paris",
        r"sum of scores, m=80",
        r"\(30, 576\) layers and neurons; 2 facts",
        r"^The capital of France is +'Paris.*' +'Rome",
        r"^The capital of Germany is +'Berlin.*' +'Berlin",
        r"^Water is made of hydrogen and +'(.*)' +'\1'",
        r"^all others as they were: True$",
        r"^loaded: +Rome",
        r"^the same ensemble: True$",
        r"^restored: Paris",
        r"^bit for bit: True$",
    ),
    "edit_with_easyedit": (
        r"^before: Paris",
        r"^after: +Rome",
        r"^rewrite_acc: 0\.0 1\.0$",
        r"^no edit +'Berlin",
        r"^KNE +'Saint Petersburg",
        r"^FT-L +'",
        r"^\| KNE +\| +100\.00 ",
        r"^\| FT-L +\|",
        r"^unedited again: True$",
    ),
}
"""What each prints, in this order. Last digits, and answers to other prompts, may differ on another machine."""


def runner():
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("run_examples", EXAMPLES / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str):
    return pytest.importorskip("nbformat").read(EXAMPLES / f"{name}.ipynb", as_version=4)


def printed(notebook) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def broken(name: str, text: str) -> list[str]:
    """Promises that ``text`` does not keep, in their order."""
    missing, at = [], 0
    for promise in PROMISES[name]:
        found = re.compile(promise, re.MULTILINE).search(text, at)
        if found:
            at = found.end()
        else:
            missing.append(promise)
    return missing


def test_every_notebook_promises_something():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == PROMISES.keys()


@pytest.mark.parametrize("name", PROMISES)
def test_stored_outputs_are_those_of_a_whole_clean_run(name):
    notebook = read(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert broken(name, printed(notebook)) == [] and pictures(notebook) == 1
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < 300_000, "pictures are too large to be kept"
    assert not re.search(r"/(home|root|tmp|Users)/", printed(notebook)), "a folder of one machine"


def test_a_promise_that_is_not_kept_is_found():
    text = printed(read("edit_with_easyedit"))
    assert broken("edit_with_easyedit", text.replace("Rome", "Paris")) == [r"^after: +Rome"]


def test_a_saved_model_is_not_left_behind():
    *_, last = [cell for cell in read("edit_without_easyedit").cells if cell.cell_type == "code"]
    assert last.source.startswith("shutil.rmtree(scratch)")


def test_a_notebook_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    module = runner()
    (tmp_path / "one.ipynb").write_text((EXAMPLES / "edit_with_easyedit.ipynb").read_text())
    before, text = (tmp_path / "one.ipynb").read_bytes(), module.nbformat.writes
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "execute", lambda notebook, _: notebook)
    monkeypatch.setattr(module.nbformat, "writes", lambda notebook: text(notebook)[:-1] + "\udc80")  # half a character
    with pytest.raises(UnicodeEncodeError):
        module.main([])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
    monkeypatch.setattr(module.nbformat, "writes", text)
    module.main(["one.ipynb"])  # converse
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.model
@pytest.mark.parametrize(
    "name",
    [  # what README's and the documents' blocks do, which `make test` runs
        pytest.param("edit_without_easyedit", marks=pytest.mark.slow),
        pytest.param("edit_with_easyedit", marks=pytest.mark.slow),
    ],
)
def test_it_runs(name, real_folder, tmp_path):
    """In a folder of its own, beside the settings."""
    (tmp_path / "hparams").symlink_to(ROOT / "hparams")
    (tmp_path / "examples").mkdir()
    shutil.copy(EXAMPLES / f"{name}.ipynb", tmp_path / "examples")
    done = runner().execute(read(name), tmp_path / "examples")
    assert broken(name, printed(done)) == [] and pictures(done) == 1, printed(done)
    left = {path.name for path in (tmp_path / "examples").iterdir()} - {"logs"}  # of EasyEdit
    assert left == {f"{name}.ipynb"}, "leaves files behind"
