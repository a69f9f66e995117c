"""Result lines: what a text may hold, what is incomplete, what cannot be read, and what figures are made of them."""

from __future__ import annotations

import json
import logging

import pytest
from conftest import tiny_hparams
from made_results import line, write
from runs import counting, job_fixture, lines_of, no_fluency_fixture, quick_fixture, record  # noqa: F401  (fixtures)

from kne_easyedit.benchmark import run
from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.console import print_report
from kne_easyedit.benchmark.intervals import interval, paired
from kne_easyedit.benchmark.publish import publish
from kne_easyedit.benchmark.store import Lines, read_lines
from kne_easyedit.benchmark.tables import figures
from kne_easyedit.metrics import read_results

SEPARATORS = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e"
"""What `str.splitlines` takes for the end of a line, and JSON does not."""


def stored(path) -> list[dict]:
    return [found for _, found in read_lines(path)]


# Lines


def test_separators_within_a_text_end_no_line(tmp_path):
    entries = [line("KNE", i, 1.0, prompt=f"one{m}two", after=f"three{m}four") for i, m in enumerate(SEPARATORS)]
    path = tmp_path / "results.jsonl"
    kept = Lines(path, lambda _: True)
    for entry in entries:
        kept.append(entry)
    text = path.read_text(encoding="utf-8")
    assert stored(path) == entries
    assert Lines(path, lambda _: True).lines == entries
    assert path.read_text(encoding="utf-8") == text  # the rewrite has deleted nothing
    assert [found["prompt"] for found in collect([path]).lines] == [entry["prompt"] for entry in entries]
    assert read_results(path) == [{"method": "KNE", "metrics": entry["metrics"]} for entry in entries]
    publish(collect([path]), tmp_path / "report")


@pytest.mark.usefixtures("quick")
def test_a_run_with_separators_in_its_texts_goes_on(job, monkeypatch, capsys):
    from kne_easyedit.benchmark import runner
    from kne_easyedit.benchmark.answers import FreeAnswer

    answer = FreeAnswer("one\u2028two\u0085three", "one\u2028two")
    job.requests[0] = {**job.requests[0], "target_new": "Rome"}
    monkeypatch.setattr(runner, "free_answers", lambda *_: answer)
    print_report(run(job), job.folder)
    assert "one two three" in capsys.readouterr().out
    text = (job.folder / "results.jsonl").read_text(encoding="utf-8")
    edited = counting(monkeypatch)
    run(job)
    assert edited == []
    assert (job.folder / "results.jsonl").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "bad",
    [b"notes of mine", b'{"torn": ', b"\xff\xfe no text", b"[1, 2]", b"[" * 10**5, b'{"a": ' + b"7" * 5000 + b"}"],
)
def test_lines_that_cannot_be_read_are_moved_aside_never_deleted(tmp_path, caplog, bad):
    path = tmp_path / "results.jsonl"
    good = [json.dumps(line("KNE", i, 1.0)).encode() for i in range(2)]
    path.write_bytes(b"\n".join([good[0], bad, good[1], b""]))
    with pytest.raises(ValueError, match=r"results.jsonl: line 2: "):
        stored(path)
    with caplog.at_level(logging.WARNING):
        assert [entry["index"] for entry in Lines(path, lambda _: True).lines] == [0, 1]
    assert (tmp_path / "results.unreadable-1.jsonl").read_bytes() == bad + b"\n"
    assert "1 lines that cannot be read moved to results.unreadable-1.jsonl" in caplog.text
    assert Lines(path, lambda _: True).lines and not (tmp_path / "results.unreadable-2.jsonl").exists()


def test_only_the_torn_end_of_a_killed_run_goes(tmp_path, caplog):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line("KNE", 0, 1.0)) + '\n{"fingerprint": "KN')
    assert [entry["index"] for entry in collect([path]).lines] == [0]
    assert "line 2 is incomplete" in caplog.text
    Lines(path, lambda _: True)
    assert path.read_text() == json.dumps(line("KNE", 0, 1.0)) + "\n"
    assert list(tmp_path.iterdir()) == [path]


TORN = [b"", b'{"metrics": {', b"[]", b'{"metrics": {}}', b"\xff"]


@pytest.mark.usefixtures("quick")
def test_torn_figures_before_the_edit_are_computed_again(job, caplog):
    answers = ("Rome", "Oslo", "Ada", "Lima", "Latin")
    job.requests = [{**job.requests[0], "target_new": answer, "index": i} for i, answer in enumerate(answers)]
    job.skip_bad = True
    run(job)
    expected = lines_of(job)
    files = sorted((job.folder / "before").glob("*.json"))
    whole = [file.read_text() for file in files]
    for file, content in zip(files, TORN, strict=True):
        file.write_bytes(content)
    (job.folder / "results.jsonl").unlink()
    assert run(job)["skipped"] == []
    assert caplog.text.count("the figures before the edit are computed again") == len(TORN)
    assert [file.read_text() for file in files] == whole
    assert [entry["metrics"] for entry in lines_of(job)] == [entry["metrics"] for entry in expected]


# Fingerprints


@pytest.mark.usefixtures("quick")
def test_a_file_counts_by_what_it_holds_and_lies_where_the_command_was_given(job, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("WHERE", str(here))
    (here / "kl.json").write_text(json.dumps([record("Italy", "Lima")]))
    settings = {
        "kl_weight": 1.0,
        "num_steps": 3,
        "localization_data": job.hparams["KNE"].localization_data,
        "localization_size": 2,
    }

    def run_with(prefix: str) -> str:
        job.hparams = {"KNE": tiny_hparams(kl_data=f"{prefix}kl.json", cache_dir=f"{prefix}cache", **settings)}
        found = run(job)["fingerprints"]["KNE"]
        assert job.hparams["KNE"].kl_data == f"{prefix}kl.json"  # the caller's object is his own
        return found

    first = run_with("")
    assert (here / "cache/scores").is_dir() and not list(job.folder.rglob("cache"))
    for place in (f"{here}/", "~/", "$WHERE/"):
        assert run_with(place) == first  # the same content under another name
    (here / "kl.json").write_text(json.dumps([record("Peru", "Lima")]))
    assert run_with("") != first  # the same name with another content


@pytest.mark.usefixtures("no_fluency")
def test_a_relative_ensemble_is_read_within_a_run(job, tmp_path, monkeypatch):
    run(job)
    (job.folder / "ensemble.json").rename(tmp_path / "mine.json")
    monkeypatch.chdir(tmp_path)
    job.hparams = {"KNE": tiny_hparams(ensemble="mine.json")}
    assert run(job)["methods"]["KNE"]["edit_success"] == 100


# Records and seeds


SUCCESS = [0.0, 1.0, 0.5, 0.25, 1.0, 0.75, 0.0]
ONE = [line("KNE", i, s) for i, s in enumerate(SUCCESS)]
THREE = [
    {**entry, "seed": seed, "fingerprint": f"KNE-{seed}", "settings": "same"} for entry in ONE for seed in (1, 2, 3)
]


def test_a_record_under_three_seeds_is_no_new_knowledge(tmp_path):
    """Every line three times: mean, interval (quarters and their means are exact) and number of records stay."""
    write(tmp_path / "one/results.jsonl", ONE)
    write(tmp_path / "three/results.jsonl", THREE)
    one, three = (figures(collect([tmp_path / name]))["counterfact"]["KNE"] for name in ("one", "three"))
    assert three["intervals"] == one["intervals"]
    assert (three["records"], three["seeds"], one["seeds"]) == (7, 3, 1)
    publish(collect([tmp_path / "three"]), tmp_path / "report")
    assert "| 7 x 3 seeds |" in (tmp_path / "report/report.md").read_text()


def test_the_interval_is_that_of_a_cluster_bootstrap():
    """Against numpy, record by record, with different numbers of seeds; drawing lines would give a narrower one."""
    import numpy

    values = [0.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.25, 0.25, 1.0, 1.0, 1.0, 0.75, 0.0, 0.0]
    records = [0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 4, 5, 6, 6]
    found = interval(values, records)
    generator, means = numpy.random.default_rng(5), []
    for _ in range(4000):
        drawn = generator.integers(0, 7, 7)
        its = [value for record in drawn for value, owner in zip(values, records) if owner == record]
        means.append(numpy.mean(its))
    low, high = numpy.percentile(means, (2.5, 97.5))
    # The standard error of such a percentile from 4,000 draws is about 0.006.
    assert (found.mean, found.records) == (pytest.approx(numpy.mean(values)), 7)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
    by_line = interval(values)
    assert by_line.high - by_line.low < 0.85 * (found.high - found.low)


def test_differences_draw_records_too():
    ours = {(record, seed): s for record, s in enumerate(SUCCESS) for seed in range(3)}
    theirs = dict.fromkeys(ours, 0.5)
    once = paired(dict(enumerate(SUCCESS)), dict.fromkeys(range(7), 0.5))
    assert paired(ours, theirs, lambda key: key[0]) == once


def test_modes_are_never_averaged(tmp_path):
    write(tmp_path / "a/results.jsonl", [line("KNE", 0, 1.0)])
    write(tmp_path / "b/results.jsonl", [line("KNE", 0, 0.0, mode="sequential", fingerprint="other", seed=1)])
    with pytest.raises(ValueError, match=r"KNE on counterfact in different modes \(single and sequential\)"):
        collect([tmp_path])


@pytest.mark.parametrize("changes", [{"seed": 1, "settings": "another"}, {"index": 1, "record": "r"}])
def test_other_settings_are_never_averaged_whatever_the_seed(tmp_path, changes):
    write(tmp_path / "a/results.jsonl", [line("KNE", 0, 1.0, settings="one")])
    write(tmp_path / "b/results.jsonl", [{**line("KNE", 0, 0.0), "fingerprint": "other", "settings": "one", **changes}])
    with pytest.raises(ValueError, match="KNE on counterfact under different settings"):
        collect([tmp_path])


@pytest.mark.usefixtures("quick")
def test_lines_of_a_run_say_what_seeds_may_differ_in(job):
    settings = {}
    for name, changes in {"seed": {"seed": 7}, "template": {"chat_template": True}, "first": {}}.items():
        job.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        job.seed, job.chat_template = changes.get("seed", 42), changes.get("chat_template", False)
        run(job)
        (settings[name],) = {entry["settings"] for entry in lines_of(job)}
    assert settings["seed"] == settings["first"] != settings["template"]
