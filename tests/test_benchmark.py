"""The runner: real edits of tiny models through EasyEdit, and what it keeps of them."""

from __future__ import annotations

import json
import logging
from copy import deepcopy

import pytest
from conftest import LLAMA_DOWN, fingerprint, make_llama, make_tokenizer, tiny_hparams
from pytest import approx

from kne_easyedit import NeuronEnsemble, benchmark
from kne_easyedit.benchmark import Run, run, summarize
from kne_easyedit.records import to_request
from kne_easyedit.report import print_report


def record(subject="France", target="Rome", **changes) -> dict:
    probe = [{"prompt": "The river that flows through Rome is", "ground_truth": [["the Tiber"]]}]
    base = {
        "subject": subject,
        "prompt": f"The capital of {subject} is",
        "target_new": target,
        "ground_truth": "Paris",
        "portability": {"Reasoning": probe},
        "locality": {"Relation_Specificity": deepcopy(probe), "Forgetfulness": deepcopy(probe)},
    }
    return {**base, **changes}


RECORDS = [record(), record("Spain", "Oslo")]


@pytest.fixture
def job(tmp_path):
    data = tmp_path / "localize.json"
    data.write_text(json.dumps([record("Peru", "Lima"), record("Italy", "Madrid")]))
    hparams = tiny_hparams(localization_data=str(data), localization_size=2)
    requests = [{**to_request(r), "index": i} for i, r in enumerate(RECORDS)]
    return Run(make_llama(), make_tokenizer(), requests, {"KNE": hparams}, "RECORDS", tmp_path / "out")


def lines_of(job) -> list[dict]:
    return [json.loads(line) for line in (job.folder / "results.jsonl").read_text().splitlines()]


def test_a_run_writes_what_it_measured(job, capsys):
    before = fingerprint(job.model)
    summary = run(job)
    assert fingerprint(job.model) == before
    assert summary == json.loads((job.folder / "summary.json").read_text())
    lines = lines_of(job)
    assert [(line["index"], line["method"]) for line in lines] == [(0, "KNE"), (1, "KNE")]
    assert all(line["metrics"]["post"]["rewrite_acc"] == [1.0] for line in lines)
    assert all(line["before"] != line["after"] for line in lines)
    figures = summary["methods"]["KNE"]
    assert figures["edit_success"] == 100
    assert all(0 <= figures[name] <= 100 for name in ("portability", "locality"))
    assert figures["fluency"] > 0 and figures["seconds_per_edit"] > 0
    found = summary["localization"]
    ensemble = NeuronEnsemble.load(job.folder / "ensemble.json")
    assert (found["facts"], found["neurons"]) == (2, ensemble.size)
    assert found["seconds_per_fact"] > 0
    assert found["parameter_share"] == approx(ensemble.parameter_share(job.model))
    assert (job.folder / "ensemble.png").read_bytes().startswith(b"\x89PNG")
    assert set(summary) >= {"model", "data", "records", "easyedit", "environment", "localization", "methods"}
    print_report(summary, job.folder)
    assert "| KNE      |       100.00 |" in capsys.readouterr().out


def test_nothing_of_easyedit_reaches_the_working_directory(job, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    handlers = list(logging.getLogger("easyeditor.editors.editor").handlers)
    run(job)
    assert list(here.iterdir()) == []
    assert "Metrics Summary" not in capsys.readouterr().out
    assert logging.getLogger("easyeditor.editors.editor").handlers == handlers


def test_an_interrupted_run_goes_on_where_it_stopped(job, monkeypatch):
    edit_one = benchmark._edit_one
    edited = []

    def interrupted(job, method, editor, request, *rest):
        if len(edited) == 1:
            raise KeyboardInterrupt
        edited.append(request["index"])
        return edit_one(job, method, editor, request, *rest)

    before = fingerprint(job.model)
    monkeypatch.setattr(benchmark, "_edit_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert fingerprint(job.model) == before
    (job.folder / "results.jsonl").open("a").write('{"torn')  # as a kill would leave it
    monkeypatch.setattr(benchmark, "_edit_one", lambda *args: edited.append(args[3]["index"]) or edit_one(*args))
    run(job)
    assert edited == [0, 1]
    assert [line["index"] for line in lines_of(job)] == [0, 1]


def test_a_finished_run_is_repeated_only_if_asked(job):
    first = run(job)
    (line, *_) = lines_of(job)
    assert run(job)["methods"] == first["methods"]
    assert lines_of(job)[0] == line
    run(job, again=True)
    assert lines_of(job)[0]["seconds"] != line["seconds"]
    assert (job.folder / "results.previous.jsonl").exists()


def test_lines_of_other_settings_are_moved_aside(job):
    run(job)
    old = (job.folder / "results.jsonl").read_text()
    job.hparams["KNE"].stop_loss = 0.5
    run(job)
    assert (job.folder / "results.previous.jsonl").read_text() == old
    assert {line["fingerprint"] for line in lines_of(job)}.isdisjoint({json.loads(old.splitlines()[0])["fingerprint"]})


def test_two_runs_with_one_seed_agree(job, tmp_path):
    run(job)
    first = [{**line, "seconds": 0, "metrics": {**line["metrics"], "time": 0}} for line in lines_of(job)]
    job.folder = tmp_path / "second"
    run(job)
    assert [{**line, "seconds": 0, "metrics": {**line["metrics"], "time": 0}} for line in lines_of(job)] == first


@pytest.mark.parametrize("skip", [True, False])
def test_a_record_that_cannot_be_edited(job, skip):
    job.requests[0] = {**job.requests[0], "prompt": "The capital of Atlantis is"}  # the subject is not in it any more
    job.skip_bad = skip
    if not skip:
        with pytest.raises((ValueError, AssertionError)):
            run(job)
        return
    summary = run(job)
    assert summary["records"] == 1
    assert len(summary["skipped"]) == 1 and "record 0: KNE" in summary["skipped"][0]


def test_a_model_that_is_not_restored_ends_the_run(job, monkeypatch):
    """Converse of the bit-equality check: a method that loses one bit is caught."""
    from kne_easyedit import bridge

    original = bridge.editor_for

    def sloppy(*args):
        editor = original(*args)
        apply = editor.apply_algo

        def forgetful(*args, **kwargs):
            model, originals = apply(*args, **kwargs)
            name, value = next(iter(originals.items()))
            value.view(-1)[0] += 1e-6 + abs(value.view(-1)[0]) * 1e-6
            return model, originals

        editor.apply_algo = forgetful
        return editor

    monkeypatch.setattr(bridge, "editor_for", sloppy)
    with pytest.raises(RuntimeError, match="not what it was after record 0"):
        run(job)


def test_several_module_types_are_drawn(job):
    job.hparams["KNE"].target_modules = [LLAMA_DOWN, "model.layers.{}.mlp.up_proj"]
    summary = run(job)
    assert len(summary["localization"]["neurons_per_layer"]) == 2
    assert (job.folder / "ensemble.png").stat().st_size > 5000


def test_summary_averages_as_easyedits_script_does():
    """A record: mean over categories of the mean over prompts; what is missing is left out."""

    def line(post, seconds=1.0):
        return {"metrics": {"post": post}, "seconds": seconds}

    figures = summarize(
        [
            line(
                {
                    "rewrite_acc": [1.0],
                    "portability": {"A_acc": [1.0, 0.0], "B_acc": [0.0]},
                    "locality": {"L_acc": [1.0], "L_output": [[3]]},
                    "fluency": {"ngram_entropy": 5.0},
                }
            ),
            line(
                {"rewrite_acc": [0.5], "portability": {}, "locality": {"L_acc": [0.0], "M_acc": [0.5]}, "fluency": {"ngram_entropy": 6.0}},
                3.0,
            ),
        ]
    )
    assert figures == approx({"edit_success": 75, "portability": 25, "locality": 62.5, "fluency": 550, "seconds_per_edit": 2, "records": 2})
    assert summarize([line({"rewrite_acc": [1.0], "portability": {}, "locality": {}})])["portability"] is None
