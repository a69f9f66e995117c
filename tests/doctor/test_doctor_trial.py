"""The trial: failures are shown with their output, a changed model ends it, and its times give the estimate."""

from __future__ import annotations

import torch
from doctor_plan import planned  # noqa: F401 (the fixture "plan")

from kne_easyedit import bridge
from kne_easyedit.doctor import trial
from kne_easyedit.doctor.findings import OK, Finding, duration
from kne_easyedit.doctor.trial import Times


def test_a_method_that_fails_shows_what_it_printed(plan, capsys, monkeypatch):
    def broken(editor, requests):
        print("the last words of a method")
        raise AssertionError("no reason")

    monkeypatch.setattr(bridge.MethodEditor, "apply", broken)
    assert plan.check() == 1
    out = capsys.readouterr().out
    assert "FAILURE  trial of KNE: AssertionError: no reason" in out and "FAILURE  trial of FT-L" in out
    assert "| the last words of a method" in out
    assert "estimate: left out" in out


def test_a_model_that_cannot_be_loaded_ends_the_trial(plan, capsys, monkeypatch):
    (plan.model / "model.safetensors").write_text("torn")
    assert plan.check() == 1
    out = capsys.readouterr().out
    assert "FAILURE  trial: " in out and "1 failure: trial" in out


def test_a_method_that_leaves_the_model_changed_ends_the_trial(plan, capsys, monkeypatch):
    original = bridge.MethodEditor.undo

    def undo(editor):
        original(editor)
        with torch.no_grad():
            editor.original.model.norm.weight[0] += 1

    monkeypatch.setattr(bridge.MethodEditor, "undo", undo)
    assert plan.check() == 1
    out = capsys.readouterr().out
    assert "FAILURE  trial of KNE: RuntimeError: the model is not what it was after record 0 was undone" in out
    assert "not bit for bit what it was" in out and "FT-L: " not in out.split("trial of KNE")[1].split("\n\n")[0]


def test_the_estimate_adds_up():
    assert Times(edit=[3.0, 5.0]).edits(100) == 400
    assert Times(edit=[60.0, 2.0]).edits(100) == 60 + 99 * 2  # what the first one has made is not made again
    assert Times(edit=[7.0]).edits(10) == 70
    times = {"KNE": Times([1.0, 3.0], [4.0, 4.0], [2.0, 2.0]), "FT": Times([2.0, 2.0], [1.0, 1.0], [3.0, 3.0])}
    found = trial._estimate(times, 600.0, 3600)
    assert found == Finding(
        "estimate",
        OK,
        "about 12.2 h for 3600 records (localisation 10 min, evaluations before 2.0 h, "
        "KNE: edits 4.0 h, KNE: evaluations 2.0 h, FT: edits 1.0 h, FT: evaluations 3.0 h)",
    )
    assert [duration(seconds) for seconds in (0.04, 59, 61, 3599, 36000)] == [
        "0.0 s",
        "59.0 s",
        "1 min",
        "60 min",
        "10.0 h",
    ]
