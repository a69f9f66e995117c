"""The runner in its modes: sequences, batches, chat templates; settings and records that cannot be edited."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
from conftest import fingerprint
from runs import HPARAMS, counting, ft, job_fixture, lines_of, no_fluency_fixture, quick_fixture, record  # noqa: F401  (fixtures)

from kne_easyedit._util.errors import RunStopped
from kne_easyedit.benchmark import run
from kne_easyedit.benchmark.console import print_report
from kne_easyedit.bridge import MethodEditor, load_method
from kne_easyedit.bridge import method_editor as editing
from kne_easyedit.facts.records import to_request


@pytest.mark.usefixtures("no_fluency")
def test_sequential_edits_stay_and_earlier_facts_are_asked_again(job, monkeypatch):
    before = fingerprint(job.model)
    job.requests += [{**to_request(record("Peru", "Marie")), "index": 2}]
    job.mode, job.retention_every = "sequential", 2
    edited = counting(monkeypatch)
    summary = run(job)
    assert fingerprint(job.model) == before  # the sequence is undone when it is over
    assert edited == ["France", "Spain", "Peru"]
    asked = [json.loads(line) for line in (job.folder / "retention.jsonl").read_text().splitlines()]
    assert [(line["after"], line["index"]) for line in asked] == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    stops = summary["methods"]["KNE"]["retention"]
    assert [(stop["edits"], stop["records"]) for stop in stops] == [(2, 2), (3, 3)]
    assert all(line["metrics"]["post"]["rewrite_acc"] == [1.0] for line in lines_of(job))  # right after its own edit
    assert (job.folder / "retention.png").read_bytes().startswith(b"\x89PNG")
    # The tiny model forgets: without re-evaluation nobody would know.
    assert stops[-1]["edit_success"] < summary["methods"]["KNE"]["edit_success"] == 100
    run(job)
    assert len(edited) == 3


@pytest.mark.usefixtures("quick")
def test_an_interrupted_sequence_repeats_edits_but_no_evaluation(job, monkeypatch, tmp_path):
    job.requests += [{**to_request(record("Peru", "Marie")), "index": 2}]
    job.mode, job.retention_every = "sequential", 2
    run(job)
    whole = [{**line, "seconds": 0, "peak_bytes": 0} for line in lines_of(job)]
    asked = (job.folder / "retention.jsonl").read_text()
    job.folder = tmp_path / "second"
    with monkeypatch.context() as patch:
        counting(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            run(job)
    assert len(lines_of(job)) == 2
    evaluated = []
    evaluate = MethodEditor.evaluate
    monkeypatch.setattr(
        MethodEditor, "evaluate", lambda self, r, **k: evaluated.append(r["index"]) or evaluate(self, r, **k)
    )
    run(job)
    assert [{**line, "seconds": 0, "peak_bytes": 0} for line in lines_of(job)] == whole
    assert (job.folder / "retention.jsonl").read_text() == asked
    assert evaluated[0] == 2 and 4 <= len(evaluated) <= 5  # Peru (before and) after its edit, and all three at the end


@pytest.mark.usefixtures("no_fluency")
@pytest.mark.parametrize("size", [1, 2, 10])
def test_batches_are_edited_together_and_undone_together(job, monkeypatch, size):
    before = fingerprint(job.model)
    job.requests += [{**to_request(record("Peru", "Marie")), "index": 2}]
    job.mode, job.batch_size = "batch", size
    batches = []
    apply = MethodEditor.apply
    monkeypatch.setattr(
        MethodEditor, "apply", lambda self, requests: batches.append(len(requests)) or apply(self, requests)
    )
    summary = run(job)
    assert fingerprint(job.model) == before
    assert batches == {1: [1, 1, 1], 2: [2, 1], 10: [3]}[size]
    assert summary["methods"]["KNE"]["edit_success"] == 100
    assert [line["index"] for line in lines_of(job)] == [0, 1, 2]


@pytest.mark.usefixtures("no_fluency")
def test_a_chat_template_reaches_edit_and_evaluation(job):
    job.tokenizer.chat_template = "{% for m in messages %}What is {{ m['content'] }} ?{% endfor %}"
    job.chat_template = True
    summary = run(job)
    assert summary["chat_template"] is True
    line = lines_of(job)[0]
    assert line["prompt"] == "What is The capital of France is ?"
    assert line["metrics"]["post"]["rewrite_acc"] == [1.0]
    first = summary["fingerprints"]
    job.chat_template = False
    assert run(job)["fingerprints"] != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "serial"}, "mode: 'serial' must be one of single, sequential, batch"),
        ({"batch_size": 2}, "batch_size: 2 with mode single"),
        ({"mode": "batch", "batch_size": 0}, "batch_size: 0"),
        ({"retention_every": 0}, "retention_every: 0"),
        ({"requests": []}, "records: there are none"),
        ({"hparams": {}}, "methods: there are none"),
    ],
)
def test_settings_that_do_not_go_together(job, changes, message):
    for name, value in changes.items():
        setattr(job, name, value)
    with pytest.raises(ValueError, match=message):
        run(job)
    assert not job.folder.exists()


def test_batch_size_of_the_hparams_in_single_edits(job):
    job.hparams["KNE"].batch_size = 5
    with pytest.raises(ValueError, match="batch_size: KNE's hparams say 5"):
        run(job)


def test_a_template_that_only_kne_asks_for(job):
    job.hparams["KNE"].use_chat_template = True
    with pytest.raises(ValueError, match="use_chat_template: KNE's hparams ask for it, the run does not"):
        run(job)


@pytest.mark.usefixtures("quick")
def test_the_callers_hparams_stay_as_they_are(job):
    job.tokenizer.chat_template = "{% for m in messages %}What is {{ m['content'] }} ?{% endfor %}"
    job.chat_template = True
    before = deepcopy(job.hparams)
    run(job)
    assert job.hparams == before


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("skip", [True, False])
def test_a_record_that_cannot_be_edited(job, skip):
    before = fingerprint(job.model)
    job.requests[0] = {**job.requests[0], "prompt": "The capital of Atlantis is"}  # the subject is not in it any more
    job.skip_bad = skip
    if not skip:
        with pytest.raises((ValueError, AssertionError)):
            run(job)
    else:
        summary = run(job)
        assert summary["records"] == 1
        assert len(summary["skipped"]) == 1 and "record 0: KNE" in summary["skipped"][0]
    assert fingerprint(job.model) == before


@pytest.mark.usefixtures("quick")
def test_a_model_that_is_not_restored_ends_the_run(job, monkeypatch):
    """Converse of the bit-equality check: a method that loses one bit is caught."""
    original = editing.editor_for

    def sloppy(*args):
        editor = original(*args)
        apply = editor.apply_algo

        def forgetful(*args, **kwargs):
            model, originals = apply(*args, **kwargs)
            value = next(iter(originals.values()))
            value.view(-1)[0] += 1e-6 + abs(value.view(-1)[0]) * 1e-6
            return model, originals

        editor.apply_algo = forgetful
        return editor

    monkeypatch.setattr(editing, "editor_for", sloppy)
    job.hparams = {"FT": ft()}
    with pytest.raises(RuntimeError, match="not what it was after record 0"):
        run(job)


@pytest.mark.usefixtures("quick")
def test_kn_gets_the_models_own_answer_where_a_record_has_none(job, monkeypatch):
    hparams = load_method("KN", HPARAMS / "KN/smollm2-135m.yaml")
    job.hparams = {"KN": hparams}
    job.requests[0] = {**job.requests[0], "ground_truth": None}
    seen = []
    apply = MethodEditor.apply
    monkeypatch.setattr(
        MethodEditor, "apply", lambda self, requests: seen.append(requests[0]["ground_truth"]) or apply(self, requests)
    )
    run(job)
    answer = lines_of(job)[0]["before"]
    assert seen[0] and answer.strip().startswith(seen[0])
    assert seen[1] == "Paris"


def test_without_fluency_the_other_figures_stay_as_they_are(job, capsys):
    job.requests = job.requests[:1]
    job.hparams["KNE"].num_steps = 3
    print_report(run(job), job.folder)
    first = lines_of(job)
    job.fluency = False
    summary = run(job)
    print_report(summary, job.folder)
    assert summary["methods"]["KNE"]["fluency"] is None
    for line, old in zip(lines_of(job), first):
        assert line["fingerprint"] != old["fingerprint"]  # never mixed
        assert "fluency" not in line["metrics"]["post"] and "fluency" in old["metrics"]["post"]
        assert {**line["metrics"]["post"], "fluency": None} == {**old["metrics"]["post"], "fluency": None}
        assert (line["after"], line["losses"]) == (old["after"], old["losses"])


@pytest.mark.usefixtures("quick")
def test_a_method_that_edits_no_record_is_an_error(job, monkeypatch):
    """What others have done is written; the exit code says that something is wrong."""
    job.hparams, job.skip_bad = {"FT": ft(), "KNE": job.hparams["KNE"]}, True
    job.hparams["FT"].layers = [99]
    with pytest.raises(RunStopped, match=r"FT: no record could be edited; the first complaint: .*record 0: FT"):
        run(job)
    methods = json.loads((job.folder / "summary.json").read_text())["methods"]
    assert methods["FT"]["records"] == 0 < methods["KNE"]["records"]
