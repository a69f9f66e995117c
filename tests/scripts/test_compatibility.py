"""The matrix of docs/compatibility.md for the EasyEdit of this process: every method in every mode, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import compatibility as command
import compatibility_cells as compatibility
import compatibility_page

CELLS = [(method, mode) for method in compatibility.METHODS for mode in compatibility.MODES]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    from kne_easyedit.bridge import TextSource, use_text_source

    monkeypatch.chdir(tmp_path)  # EasyEdit writes ./logs
    with use_text_source(TextSource(samples=8, length=6)):
        yield


@pytest.mark.parametrize(("method", "mode"), CELLS, ids=lambda value: value.replace(" ", "-"))
def test_a_cell_works_or_fails_for_the_reason_that_is_given(method, mode, tmp_path, capsys):
    reason = compatibility.limit(method, mode)
    if reason in (None, compatibility.FORGETS):
        compatibility.attempt(method, mode, tmp_path / "stats")
    else:  # a limit that is none any more must not stay in the table
        with pytest.raises(Exception):  # noqa: B017  (each version fails in its own way)
            compatibility.attempt(method, mode, tmp_path / "stats")


def test_a_cell_that_leaves_the_model_changed_is_no_success(tmp_path, monkeypatch):
    """Converse: a method that forgets an original is noticed."""
    from kne_easyedit import bridge
    from kne_easyedit.bridge.importing import module

    bridge.register()  # whatever test ran before
    methods = module("util.alg_dict").ALG_DICT
    apply = methods["FT"]

    def forgetful(*args, **kwargs):
        edited, _ = apply(*args, **kwargs)
        return edited, {}

    monkeypatch.setitem(methods, "FT", forgetful)
    with pytest.raises(AssertionError, match="not what it was"):
        compatibility.attempt("FT", "edit", tmp_path)


def test_the_page_says_what_works_and_why_not():
    cells = [
        {"method": method, "mode": mode, "cannot": None, "error": None, "needs": []}
        for method in compatibility.METHODS
        for mode in compatibility.MODES
    ]
    cells[0]["needs"] = ["tied-head"]
    cells[1]["cannot"] = "no such thing"
    cells[2]["error"] = "ValueError: boom"
    found = {
        "pypi": {
            "easyedit": {"kind": "installed", "version": "0.0.1.dev0"},
            "patches": {"tied-head": "applied"},
            "faults": {"tied-head": "a fault"},
            "cells": cells,
        }
    }
    text = compatibility_page.text_of(found, {}, None)
    assert "| edit | works with [1] | works |" in text
    assert "| sequential_edit | cannot [2] | works |" in text and "| batch_edit 1 | **fails** [3] |" in text
    assert "- [1] patches tied-head" in text and "- [2] no such thing" in text and "- [3] ValueError: boom" in text
    assert "| tied-head | a fault |" in text
    found["pypi"]["cells"] = [cell for cell in cells if cell["method"] == "KNE"]
    alone = compatibility_page.text_of(found, {}, None)  # `--methods KNE`
    assert "| mode | KNE |\n" in alone and "| mode | KNE |\n" not in text


def test_the_tracked_page_has_the_texts_of_the_script():
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert page.startswith(compatibility_page.HEAD)
    assert compatibility_page.OTHERS in page


def checkout(folder: Path, commit: str) -> str:
    """A folder that looks like a clone of EasyEdit."""
    (folder / "easyeditor").mkdir(parents=True)
    (folder / "easyeditor" / "__init__.py").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text(commit)
    return str(folder)


def test_kept_cells_are_those_of_one_checkout_one_commit_and_one_package(tmp_path, monkeypatch):
    one, other = (checkout(tmp_path / name / "EasyEdit", "a" * 40) for name in ("one", "other"))
    (tmp_path / "data.json").write_text("[]")

    def kept(home: str, smollm2: str | None = None) -> str:
        command.measured_with.cache_clear()  # it holds for a process
        return command.kept_file(tmp_path, home, "", ["KNE"], smollm2).name

    first, real = kept(one), str(tmp_path / "data.json")
    assert first == kept(one) and first.startswith("EasyEdit-all-patches-KNE-")
    monkeypatch.chdir(one)
    assert kept(".") == first
    found = {first, kept(other), kept("pypi"), kept(one, real)}
    Path(real).write_text("[{}]")
    found.add(kept(one, real))
    (Path(one) / ".git" / "HEAD").write_text("b" * 40)  # `git pull`
    found.add(kept(one))
    before = command.surroundings
    monkeypatch.setattr(command, "surroundings", lambda files: {**before(files), "kne_easyedit": "with a new patch"})
    found.add(kept(one))
    assert len(found) == 7


def test_a_page_never_loses_versions(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    cells = {"cells": [], "faults": {}, "patches": {}, "easyedit": {"version": "c" * 40}}
    monkeypatch.setattr(command, "version", lambda *_: cells)
    both = ["pypi", checkout(tmp_path / "EasyEdit", "c" * 40)]
    command.main(["--easyedit", *both, "--keep", str(tmp_path), "--out", str(page)])
    written = page.read_text()
    assert compatibility_page.versions_of(written) == [
        "PyPI release 0.0.1.dev0 (October 2023)",
        f"checkout of {'c' * 10} ()",
    ]
    with pytest.raises(SystemExit):
        command.main(["--easyedit", "pypi", "--keep", str(tmp_path), "--out", str(page)])
    assert "has 2 versions, which would be lost: PyPI" in capsys.readouterr().err and page.read_text() == written
    command.main(["--easyedit", *both, "--keep", str(tmp_path), "--out", str(page)])  # converse
    assert page.read_text() == written


def test_the_cells_of_a_process_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_in_process", lambda *_: {"cells": []})
    home = checkout(tmp_path / "EasyEdit", "c" * 40)
    assert command.in_process(home, "", ["KNE"], tmp_path / "keep") == {"cells": []}
    (file,) = (tmp_path / "keep").iterdir()
    assert json.loads(file.read_text()) == {"cells": []}
    monkeypatch.setattr(command, "_in_process", None)  # whoever measures again fails
    assert command.in_process(home, "", ["KNE"], tmp_path / "keep") == {"cells": []}
