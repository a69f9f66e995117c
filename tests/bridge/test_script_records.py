"""Records that EasyEdit's example scripts refuse, and their files of figures before the edit."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import make_llama, make_tokenizer, tiny_hparams, weights
from script_runs import (  # noqa: F401 (the fixtures)
    SHIPPED,
    run,
    work_folder,
    write_script,
)

from kne_easyedit import bridge
from kne_easyedit.bridge import patches
from kne_easyedit.bridge.scripts import ScriptError

# Records that EasyEdit refuses


def edit(editor, **changes) -> list[dict]:
    given = {
        "prompts": ["The capital of France is", "The capital of Spain is"],
        "target_new": ["Rome", "Oslo"],
        "subject": ["France", "Spain"],
        "keep_original_weight": True,
        "verbose": False,
    }
    return editor.edit(**{**given, **changes})[0]


def test_all_records_whose_subject_is_not_in_the_prompt_are_named():
    editor = bridge.editor_for(tiny_hparams(), make_llama(), make_tokenizer())
    subjects = ["France", "Peru", None, "spain", "Italy", "Rome"]
    prompts = [f"The capital of {name} is" for name in ("France", "Spain", "Peru", "Spain", "Italy", "Lima")]
    with pytest.raises(
        ValueError,
        match=r"in 4 of 6 records it does not: 1, 2, 3, 5 .record 1: subject 'Peru', prompt 'The capital of Spain is'",
    ) as caught:
        edit(editor, prompts=prompts, target_new=["Rome"] * 6, subject=subjects)
    assert "leave them out: `kne easyedit-run --skip-bad`" in str(caught.value)
    with pytest.raises(ValueError, match="subject: 1 for 2 prompts"):
        edit(editor, subject=["France"])
    assert len(edit(editor)) == 2


RECORDS = [
    {
        "subject": s,
        "prompt": f"The capital of {p} is",
        "target_new": "Rome",
        "ground_truth": "Paris",
        "portability": {},
        "locality": {},
    }
    for s, p in (("France", "France"), ("Peru", "Spain"), ("Spain", "Spain"), ("Rome", "Peru"))
]
DATASET = """
    from easyeditor import KnowEditDataset
    data = KnowEditDataset("records.json")
    json.dump([record["subject"] for record in data], open("seen.json", "w"))
"""


def test_bad_records_are_left_out_only_if_asked(work, capsys):
    (work / "records.json").write_text(json.dumps(RECORDS))
    script = write_script(work, DATASET)
    if not hasattr(bridge.register(), "KnowEditDataset"):
        with pytest.raises(ValueError, match="--skip-bad: this EasyEdit has no KnowEditDataset"):
            run(script, "--editing_method", "FT", skip_bad=True)
        with pytest.raises(ScriptError, match=r"ImportError: easyeditor.KnowEditDataset is not available"):
            run(script, "--editing_method", "FT")
        return
    assert run(script, "--editing_method", "FT") == 0
    assert json.loads((work / "seen.json").read_text()) == ["France", "Peru", "Spain", "Rome"]
    assert "left out" not in capsys.readouterr().out
    assert run(script, "--editing_method", "FT", skip_bad=True) == 0
    assert json.loads((work / "seen.json").read_text()) == ["France", "Spain"]
    assert "records.json: 2 records left out, their subject is not in their prompt: 1, 3" in capsys.readouterr().out


def test_nothing_can_be_left_out_of_other_data(work):
    with pytest.raises(ValueError, match=r"--skip-bad: run_it.py reads its records by itself"):
        run(write_script(work, "open('ran', 'w')"), "--editing_method", "FT", skip_bad=True)
    assert not (work / "ran").exists()


# Files of figures before the edit


@pytest.fixture
def pre_file(work):
    bridge.register()
    state = next(patch.state for patch in patches.report() if patch.name == "pre-edit-file")
    if state != patches.APPLIED:
        assert bridge.is_legacy()
        pytest.skip("the EasyEdit of 2023 neither reads nor writes a file of figures before the edit")
    return work / "tiny_pre_edit.json"


def test_a_pre_edit_file_serves_the_same_records_and_model(pre_file, monkeypatch):
    model, evaluated = make_llama(), []
    editors = sys.modules["easyeditor.editors.editor"]
    original = editors.compute_edit_quality
    monkeypatch.setattr(editors, "compute_edit_quality", lambda *a, **k: evaluated.append(1) or original(*a, **k))
    first = edit(bridge.editor_for(tiny_hparams(), model, make_tokenizer()), pre_file=str(pre_file))
    assert len(evaluated) == 4
    ft = bridge.load_method("FT", SHIPPED / "FT/smollm2-135m.yaml")
    ft.layers, ft.num_steps = [2], 1
    again = edit(
        bridge.editor_for(ft, model, make_tokenizer()),
        pre_file=str(pre_file),
        pre_edit=json.loads(pre_file.read_text()),
    )
    assert len(evaluated) == 6
    assert [m["pre"] for m in again] == json.loads(json.dumps([m["pre"] for m in first]))


def test_a_pre_edit_file_of_anything_else_is_refused(pre_file):
    model = make_llama()
    editor = bridge.editor_for(tiny_hparams(), model, make_tokenizer())
    edit(editor, pre_file=str(pre_file))
    before = weights(model)
    pre_edit = json.loads(pre_file.read_text())
    known = {"pre_file": str(pre_file), "pre_edit": pre_edit}
    other = bridge.editor_for(tiny_hparams(), make_llama(seed=11), make_tokenizer())
    for changed, changes in (
        (editor, {"target_new": ["Rome", "Paris"]}),
        (editor, {"test_generation": True}),
        (other, {}),
    ):
        with pytest.raises(
            ValueError,
            match=r"tiny_pre_edit.json: these figures before the edit are of other records.*"
            "delete the file or move it away",
        ):
            edit(changed, **known, **changes)
    sidecar = sidecar_of(pre_file)
    text = sidecar.read_text()
    for content in (text[:5], "[]"):
        sidecar.write_text(content)
        with pytest.raises(ValueError, match="delete the file"):
            edit(editor, **known)
    sidecar.unlink()  # a run without this check
    with pytest.raises(ValueError, match="delete the file"):
        edit(editor, **known)
    assert weights(model) == before
    sidecar.write_text(text)
    edit(editor, **known)


OTHER = {
    "target_new": ["Oslo", "Rome"],
    "locality_inputs": {"Other": {"prompt": ["The river that"] * 2, "ground_truth": ["flows", "flows through"]}},
}
REFUSED = "these figures before the edit are of other records"


def sidecar_of(pre_file):
    return pre_file.with_name(f"{pre_file.name}.kne.json")


def test_an_old_pre_edit_file_is_that_of_the_old_records_until_it_is_made_anew(pre_file, monkeypatch):
    editor = bridge.editor_for(tiny_hparams(), make_llama(), make_tokenizer())
    edit(editor, pre_file=str(pre_file))
    old = sidecar_of(pre_file).read_text()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["easyeditor.editors.editor"], "compute_edit_quality", interrupted)
        with pytest.raises(KeyboardInterrupt):
            edit(editor, **OTHER, pre_file=str(pre_file))
    figures = {"pre_file": str(pre_file), "pre_edit": json.loads(pre_file.read_text())}
    with pytest.raises(ValueError, match=REFUSED):
        edit(editor, **OTHER, **figures)
    edit(editor, **figures)
    edit(editor, **OTHER, pre_file=str(pre_file))
    assert sidecar_of(pre_file).read_text() != old


def test_a_pre_edit_file_that_another_run_writes_meanwhile_is_no_others(pre_file, monkeypatch):
    """Both find no file. The first would vouch for what the second has left, and the other way round."""
    first, second = (bridge.editor_for(tiny_hparams(), make_llama(), make_tokenizer()) for _ in range(2))
    editors = sys.modules["easyeditor.editors.editor"]
    original, left = editors.compute_edit_quality, []

    def evaluate(*args, **kwargs):
        if not left:
            left.append(None)
            edit(second, **OTHER, pre_file=str(pre_file))
            left.append((pre_file.read_text(), sidecar_of(pre_file).read_text()))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(editors, "compute_edit_quality", evaluate)
        edit(first, pre_file=str(pre_file))
    figures = {"pre_file": str(pre_file), "pre_edit": json.loads(pre_file.read_text())}
    with pytest.raises(ValueError, match=REFUSED):
        edit(second, **OTHER, **figures)
    content, vouching = pre_file.read_text(), sidecar_of(pre_file).read_text()
    for mixed in ((left[1][0], vouching), (content, left[1][1])):  # one's file comes last, the other's sidecar
        pre_file.write_text(mixed[0])
        sidecar_of(pre_file).write_text(mixed[1])
        figures["pre_edit"] = json.loads(mixed[0])
        for changes in ({}, OTHER):
            with pytest.raises(ValueError, match=REFUSED):
                edit(second, **changes, **figures)
    pre_file.write_text(content)
    sidecar_of(pre_file).write_text(vouching)
    edit(second, **{**figures, "pre_edit": json.loads(content)})  # converse: the first's own


def test_a_pre_edit_file_is_complete_before_the_first_edit(pre_file, monkeypatch):
    """Edits take hours, and may fail."""
    editor = bridge.editor_for(tiny_hparams(), make_llama(), make_tokenizer())
    with monkeypatch.context() as patch:
        patch.setattr(editor, "apply_algo", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            edit(editor, pre_file=str(pre_file))
    edit(editor, pre_file=str(pre_file), pre_edit=json.loads(pre_file.read_text()))
    assert [path.name for path in pre_file.parent.glob("*pre_edit*")] == [pre_file.name, sidecar_of(pre_file).name]


def test_a_sidecar_of_an_earlier_version_counts_as_it_did(pre_file):
    """It names the records and the model, but not the file's content."""
    editor = bridge.editor_for(tiny_hparams(), make_llama(), make_tokenizer())
    edit(editor, pre_file=str(pre_file))
    sidecar = sidecar_of(pre_file)
    sidecar.write_text(json.dumps({"digest": json.loads(sidecar.read_text())["digest"]}))
    figures = {"pre_file": str(pre_file), "pre_edit": json.loads(pre_file.read_text())}
    with pytest.raises(ValueError, match=REFUSED):
        edit(editor, **OTHER, **figures)
    edit(editor, **figures)
