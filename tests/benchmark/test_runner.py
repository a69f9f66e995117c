"""The runner: real edits of tiny models through EasyEdit, and what it keeps of them."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import LLAMA_DOWN, fingerprint, make_llama, make_tokenizer, tiny_hparams
from methods import settings, tokenizer_for
from pytest import approx

from kne_easyedit import NeuronEnsemble
from kne_easyedit.benchmark import Run, run, summarize
from kne_easyedit.benchmark.console import print_report
from kne_easyedit.benchmark.store import exclusive_lock
from kne_easyedit.bridge import MethodEditor, load_method
from kne_easyedit.bridge import method_editor as editing
from kne_easyedit.bridge import second_moments
from kne_easyedit.bridge.text_source import TextSource
from kne_easyedit.facts.records import to_request
from kne_easyedit.benchmark.answers import begins_with


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


@pytest.fixture
def no_fluency(job):
    """Without the texts of hundreds of tokens that fluency is measured on: a third of a run's time."""
    job.fluency = False


@pytest.fixture
def quick(job, no_fluency, monkeypatch):
    """A run for its files and lines: edits need not succeed, and nothing is drawn."""
    job.hparams["KNE"].num_steps = 3
    monkeypatch.setattr("kne_easyedit.benchmark.figures.draw_ensemble", lambda *_args, **_kwargs: None)
    monkeypatch.setattr("kne_easyedit.benchmark.figures.draw_retention", lambda *_args, **_kwargs: None)


def ft():
    """FT of EasyEdit for the tiny model."""
    hparams = load_method("FT", Path(__file__).parents[2] / "hparams/FT/smollm2-135m.yaml")
    hparams.layers, hparams.num_steps = [2], 3
    return hparams


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
    found = summary["localization"]["KNE"]
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


def counting(monkeypatch, stop_at: int | None = None) -> list[int]:
    """Counts EasyEdit's edits by the subjects that it edits; the ``stop_at``-th is interrupted."""
    edited: list[str] = []
    apply = MethodEditor.apply

    def counted(self, requests):
        if len(edited) + 1 == stop_at:
            raise KeyboardInterrupt
        edited.extend(request["subject"] for request in requests)
        return apply(self, requests)

    monkeypatch.setattr(MethodEditor, "apply", counted)
    return edited


@pytest.mark.usefixtures("quick")
def test_an_interrupted_run_goes_on_where_it_stopped(job, monkeypatch):
    before = fingerprint(job.model)
    with monkeypatch.context() as patch:
        first = counting(patch, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            run(job)
        assert first == ["France"]
    assert fingerprint(job.model) == before
    (job.folder / "results.jsonl").open("a").write('{"torn')  # as a kill would leave it
    edited = counting(monkeypatch)
    run(job)
    assert edited == ["Spain"]
    assert [line["index"] for line in lines_of(job)] == [0, 1]


@pytest.mark.usefixtures("quick")
def test_a_finished_run_is_repeated_only_if_asked(job, monkeypatch):
    first = run(job)
    edited = counting(monkeypatch)
    assert run(job)["methods"] == first["methods"]
    assert edited == []
    old = (job.folder / "results.jsonl").read_text()
    run(job, again=True)
    assert edited == ["France", "Spain"]
    assert (job.folder / "results.other-1.jsonl").read_text() == old


@pytest.mark.usefixtures("quick")
def test_lines_of_other_settings_are_moved_aside_each_to_a_file_of_its_own(job):
    kept = []
    for stop_loss in (0.4, 0.5, 0.6):
        job.hparams["KNE"].stop_loss = stop_loss
        run(job)
        kept.append((job.folder / "results.jsonl").read_text())
    assert (job.folder / "results.other-1.jsonl").read_text() == kept[0]
    assert (job.folder / "results.other-2.jsonl").read_text() == kept[1]
    assert len({line["fingerprint"] for text in kept for line in map(json.loads, text.splitlines())}) == 3


@pytest.mark.usefixtures("quick")
def test_settings_and_records_of_an_earlier_run_are_not_computed_again(job, monkeypatch):
    def move(stop_loss, records):
        job.hparams["KNE"].stop_loss, job.requests = stop_loss, everything[:records]
        return run(job)

    everything = job.requests
    first, first_lines = move(0.4, 2), lines_of(job)
    move(0.4, 1)
    assert [line["index"] for line in lines_of(job)] == [0]
    move(0.5, 2)
    edited = counting(monkeypatch)
    assert move(0.4, 2)["methods"] == first["methods"]
    assert sorted(lines_of(job), key=lambda line: line["index"]) == first_lines
    move(0.5, 1), move(0.5, 2)
    assert edited == []
    kept = [json.loads(line) for file in job.folder.glob("results*.jsonl") for line in file.read_text().splitlines()]
    assert len({json.dumps(line) for line in kept}) == 4  # nothing is lost
    assert len(kept) <= 4 + 4  # and copies do not pile up


@pytest.mark.usefixtures("quick")
def test_of_lines_computed_again_the_latest_count(job, monkeypatch):
    run(job)
    run(job, again=True)
    (job.folder / "results.jsonl").unlink()  # only what was moved aside is left
    edited = counting(monkeypatch)
    run(job)
    assert edited == []
    latest = lines_of(job)
    run(job, again=True)
    again = lines_of(job)
    assert [line["seconds"] for line in again] != [line["seconds"] for line in latest]
    run(job)
    assert lines_of(job) == again


@pytest.mark.usefixtures("quick")
def test_another_method_keeps_the_lines_of_the_first(job, monkeypatch):
    run(job)
    old = (job.folder / "results.jsonl").read_text()
    job.hparams = {**job.hparams, "FT": ft()}
    edited = counting(monkeypatch)
    evaluated = []
    evaluate = MethodEditor.evaluate
    monkeypatch.setattr(
        MethodEditor,
        "evaluate",
        lambda self, *a, **k: evaluated.append(self.hparams.alg_name) or evaluate(self, *a, **k),
    )
    summary = run(job)
    assert edited == ["France", "Spain"]
    assert (job.folder / "results.jsonl").read_text().startswith(old)
    assert set(summary["methods"]) == {"KNE", "FT"}
    assert evaluated == ["FT", "FT"]  # after the edits only: before them KNE's evaluations of the same model serve


@pytest.mark.usefixtures("quick")
def test_only_records_that_changed_are_edited_again(job, monkeypatch):
    run(job)
    job.requests[1] = {**job.requests[1], "target_new": "Ada"}
    edited = counting(monkeypatch)
    run(job)
    assert edited == ["Spain"]


@pytest.mark.usefixtures("quick")
def test_what_results_do_not_depend_on_makes_no_new_run(job, monkeypatch, tmp_path):
    run(job)
    job.hparams["KNE"].chunk_rows = 7
    job.hparams["KNE"].cache_dir = str(tmp_path / "elsewhere")
    edited = counting(monkeypatch)
    run(job)
    assert edited == []


@pytest.mark.usefixtures("quick")
def test_a_folder_serves_one_run_at_a_time(job):
    with exclusive_lock(job.folder), pytest.raises(ValueError, match="another run is writing"):
        run(job)
    run(job)


def test_two_runs_with_one_seed_agree(job, tmp_path):
    run(job)
    first = [{**line, "seconds": 0, "peak_bytes": 0} for line in lines_of(job)]
    job.folder = tmp_path / "second"
    run(job)
    assert [{**line, "seconds": 0, "peak_bytes": 0} for line in lines_of(job)] == first


@pytest.mark.usefixtures("quick")
def test_no_edit_pays_for_second_moments(job, monkeypatch, capsys):
    """They are made before the first edit, where MEMIT looks for them; a run that goes on finds them and knows what they took."""
    job.folder.mkdir()
    monkeypatch.chdir(job.folder)  # stats_dir is relative to where one is
    hparams = settings("MEMIT")
    text = TextSource(samples=6, length=8)
    job = replace(job, tokenizer=tokenizer_for(hparams), hparams={"MEMIT": hparams}, text_source=text)
    apply, at_edits = MethodEditor.apply, []
    monkeypatch.setattr(
        MethodEditor, "apply", lambda *args: at_edits.append(len(list(job.folder.rglob("*.npz")))) or apply(*args)
    )
    summary = run(job)
    print_report(summary, job.folder)
    assert at_edits == [2, 2]
    made = json.loads((job.folder / "manifest.json").read_text())["second_moments"]["MEMIT"]
    assert made["seconds"] > 0 and "sampled from the model" in made["source"]
    assert (
        f"MEMIT: second moments from {made['source']} ({made['seconds']:.1f} s when computed)"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(second_moments, "second_moments", lambda *args: pytest.fail("made again"))
    assert run(job)["second_moments"] == {"MEMIT": made}


@pytest.mark.usefixtures("no_fluency")
def test_the_closing_line_names_the_files_that_are_there(job, capsys):
    """A variant's files bear its label."""
    job.hparams = {"KNE-of-a-long-name": job.hparams["KNE"]}
    print_report(run(job), job.folder)
    printed = capsys.readouterr().out.splitlines()
    names = printed[-1].partition(": ")[2].split(", ")
    assert names == [
        "summary.json",
        "results.jsonl",
        "ensemble-KNE-of-a-long-name.json",
        "ensemble-KNE-of-a-long-name.png",
    ]
    assert all((job.folder / name).is_file() for name in names)
    assert (
        len({len(line) for line in printed if line.startswith("|")}) == 1
    )  # the table's columns stand below each other


def test_without_fluency_the_other_figures_stay_as_they_are(job, capsys):
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
            name, value = next(iter(originals.items()))
            value.view(-1)[0] += 1e-6 + abs(value.view(-1)[0]) * 1e-6
            return model, originals

        editor.apply_algo = forgetful
        return editor

    monkeypatch.setattr(editing, "editor_for", sloppy)
    job.hparams = {"FT": ft()}
    with pytest.raises(RuntimeError, match="not what it was after record 0"):
        run(job)


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


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        (" Rome, of course", "Rome", True),
        ("rome", "Rome", True),
        (" Romeo", "Rome", False),
        ("The answer is Rome", "Rome", False),
        (" New\nYork City", "New York", True),
        ("", "Rome", False),
    ],
)
def test_exact_match_is_about_the_beginning_of_a_free_answer(answer, target, right):
    assert begins_with(answer, target) is right


@pytest.mark.usefixtures("no_fluency")
def test_several_module_types_are_drawn(job):
    job.hparams["KNE"].target_modules = [LLAMA_DOWN, "model.layers.{}.mlp.up_proj"]
    summary = run(job)
    assert len(summary["localization"]["KNE"]["neurons_per_layer"]) == 2
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
                {
                    "rewrite_acc": [0.5],
                    "portability": {},
                    "locality": {"L_acc": [0.0], "M_acc": [0.5]},
                    "fluency": {"ngram_entropy": 6.0},
                },
                3.0,
            ),
            line({}, 10.0),
        ]
    )
    assert figures["rephrase"] is None and figures["exact_match"] is None
    wanted = {
        "edit_success": 75,
        "portability": 25,
        "locality": 62.5,
        "fluency": 550,
        "seconds_per_edit": 3,
        "records": 3,
    }
    assert {name: figures[name] for name in wanted} == approx(wanted)
    assert summarize([line({"rewrite_acc": [1.0], "portability": {}, "locality": {}})])["portability"] is None


@pytest.mark.usefixtures("quick")
def test_kn_gets_the_models_own_answer_where_a_record_has_none(job, monkeypatch):
    hparams = load_method("KN", Path(__file__).parents[2] / "hparams/KN/smollm2-135m.yaml")
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
