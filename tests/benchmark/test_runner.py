"""The runner: real edits of tiny models through EasyEdit, what it keeps of them, and what it does not repeat."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import LLAMA_DOWN, fingerprint
from methods import settings, tokenizer_for
from pytest import approx
from runs import RECORDS, counting, ft, job_fixture, lines_of, no_fluency_fixture, quick_fixture, record  # noqa: F401  (fixtures)

from kne_easyedit import NeuronEnsemble
from kne_easyedit._util.files import exclusive_lock
from kne_easyedit.benchmark import run
from kne_easyedit.benchmark.console import print_report
from kne_easyedit.bridge import MethodEditor, second_moments
from kne_easyedit.bridge.text_source import TextSource


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


@pytest.mark.usefixtures("quick")
def test_nothing_of_easyedit_reaches_the_working_directory(job, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    handlers = list(logging.getLogger("easyeditor.editors.editor").handlers)
    run(job)
    assert list(here.iterdir()) == []
    assert "Metrics Summary" not in capsys.readouterr().out
    assert logging.getLogger("easyeditor.editors.editor").handlers == handlers


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
def test_settings_and_records_of_an_earlier_run_are_not_computed_again(job, monkeypatch, tmp_path):
    def move(stop_loss, records):
        job.hparams["KNE"].stop_loss, job.requests = stop_loss, everything[:records]
        return run(job)

    everything, job.data = job.requests, str(tmp_path / "records.json")
    Path(job.data).write_text(json.dumps(RECORDS))  # neighbours are made of the file's records, however many are edited
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


@pytest.mark.usefixtures("quick")
def test_the_seed_of_a_run_is_that_of_knes_edits(job, tmp_path):
    """Else seeds would repeat one edit; the digest without the seed says that lines of several may be averaged."""
    job.hparams["KNE"].initialization = "kaiming"
    found = {}
    for seed in (1, 2):
        its = replace(job, seed=seed, folder=tmp_path / str(seed))
        run(its)
        found[seed] = lines_of(its)[0]
        assert its.hparams["KNE"].seed == 42, "the caller's settings stay as they are"
    assert found[1]["losses"] != found[2]["losses"]
    assert found[1]["fingerprint"] != found[2]["fingerprint"] and found[1]["settings"] == found[2]["settings"]
    job.hparams["KNE"].seed = 7
    with pytest.raises(ValueError, match=r"KNE: its setting seed is 7, the run's 42; a run has one seed"):
        run(job)
    replace(job, seed=7).validate()


@pytest.mark.usefixtures("quick")
def test_a_run_that_stops_before_its_first_edit_leaves_no_lines_under_its_manifest(job, tmp_path):
    run(job)
    job.hparams["KNE"].p = 0.1
    job.perplexity = tmp_path / "short.txt"
    job.perplexity.write_text("The")
    with pytest.raises(ValueError, match="perplexity"):
        run(job)
    assert json.loads((job.folder / "manifest.json").read_text())["methods"]["KNE"]["p"] == 0.1
    assert not lines_of(job) and (job.folder / "results.other-1.jsonl").is_file()


def test_two_runs_with_one_seed_agree(job, tmp_path):
    run(job)
    first = [{**line, "seconds": 0, "peak_bytes": 0} for line in lines_of(job)]
    job.folder = tmp_path / "second"
    run(job)
    assert [{**line, "seconds": 0, "peak_bytes": 0} for line in lines_of(job)] == first


@pytest.mark.usefixtures("quick")
def test_no_edit_pays_for_second_moments(job, monkeypatch, capsys):
    """They are made before the first edit, where MEMIT looks for them; a resumed run finds them and their duration."""
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


@pytest.mark.usefixtures("no_fluency")
def test_several_module_types_are_drawn(job):
    job.hparams["KNE"].target_modules = [LLAMA_DOWN, "model.layers.{}.mlp.up_proj"]
    summary = run(job)
    assert len(summary["localization"]["KNE"]["neurons_per_layer"]) == 2
    assert (job.folder / "ensemble.png").stat().st_size > 5000


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_an_edit_that_breaks_the_model_has_failed_and_is_no_bad_record(job, monkeypatch, caplog, mode):
    """Its probabilities are not finite, so that no text can be sampled for fluency; all else counts."""
    hparams, apply = ft(), MethodEditor.apply

    def breaking(self, requests):
        self.hparams.lr = 1e36 if requests[0]["subject"] == "Spain" else 5e-4
        return apply(self, requests)

    monkeypatch.setattr(MethodEditor, "apply", breaking)
    job.hparams, job.mode, job.skip_bad, job.neighbours = {"FT": hparams}, mode, True, 0
    summary = run(job)
    assert summary["skipped"] == [] and summary["records"] == 2
    whole, broken = lines_of(job)
    assert whole["metrics"]["post"]["fluency"]["ngram_entropy"] > 0
    assert "fluency" not in broken["metrics"]["post"] and broken["metrics"]["post"]["rewrite_acc"] == [0.0]
    assert "record 1 has no fluency" in caplog.text
