"""The schema of result lines: what a run writes, lines from before it had a version, and lines of a later one."""

from __future__ import annotations

import json

import pytest
from made_results import line, write
from runs import counting, job_fixture, lines_of, quick_fixture  # noqa: F401  (fixtures)

from kne_easyedit.benchmark import run
from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.console import print_report
from kne_easyedit.benchmark.preparation import prepare
from kne_easyedit.benchmark.result_line import VERSION, ResultLine, RetentionLine, parse_result
from kne_easyedit.benchmark.tables import figures

MINIMAL = {"method": "KNE", "index": 0, "record": "r", "fingerprint": "f", "metrics": {"post": {}}}


@pytest.mark.usefixtures("quick")
def test_lines_of_a_run_have_the_fields_of_the_schema(job):
    """Both kinds of lines: a field that one place forgets, or adds by hand, is found."""
    job.mode = "sequential"
    run(job)
    assert [list(entry) for entry in lines_of(job)] == [list(ResultLine.__annotations__)] * 2
    retained = [json.loads(text) for text in (job.folder / "retention.jsonl").read_text().splitlines()]
    assert [list(entry) for entry in retained] == [list(RetentionLine.__annotations__)] * 2
    assert {entry["schema_version"] for entry in (*lines_of(job), *retained)} == {VERSION}


def test_a_line_of_before_the_schema_is_read():
    """What it lacks is None; what it has stays, also what the schema does not know."""
    found = parse_result({**MINIMAL, "extra": 1, "seed": 7})
    assert found == {**dict.fromkeys(ResultLine.__annotations__), **MINIMAL, "schema_version": 1, "extra": 1, "seed": 7}
    assert parse_result(found) == found


@pytest.mark.parametrize("version", [VERSION + 1, -1, "1", None, True])
def test_a_line_of_a_version_that_is_not_known_is_refused(tmp_path, version):
    write(tmp_path / "results.jsonl", [{**line("KNE", 0, 1.0), "schema_version": version}])
    with pytest.raises(ValueError, match=r"results\.jsonl: line 1: schema_version: .* reads up to 1: update it"):
        collect([tmp_path])


def test_lines_with_and_without_a_version_are_one_report(tmp_path):
    old = [line("KNE", i, 1.0) for i in range(4)]
    write(tmp_path / "old/results.jsonl", old)
    write(tmp_path / "mixed/results.jsonl", [*old[:2], *({**entry, "schema_version": 1} for entry in old[2:])])
    assert figures(collect([tmp_path / "mixed"])) == figures(collect([tmp_path / "old"]))


@pytest.mark.usefixtures("quick")
def test_a_run_resumes_lines_of_before_the_schema(job, monkeypatch, capsys):
    run(job)
    path = job.folder / "results.jsonl"
    old = [{name: value for name, value in entry.items() if name != "schema_version"} for entry in lines_of(job)]
    write(path, old)
    edited = counting(monkeypatch)
    print_report(run(job), job.folder)
    assert edited == [] and lines_of(job) == old  # neither edited again nor rewritten
    assert "France is  ->  Rome" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_lines_of_a_later_schema_are_moved_aside(job, monkeypatch):
    run(job)
    later = [{**entry, "schema_version": VERSION + 1} for entry in lines_of(job)]
    write(job.folder / "results.jsonl", later)
    edited = counting(monkeypatch)
    run(job)
    assert edited == ["France", "Spain"]
    aside = (job.folder / "results.other-1.jsonl").read_text().splitlines()
    assert [json.loads(text) for text in aside] == later


@pytest.mark.usefixtures("quick")
def test_a_prepared_run_knows_its_lines(job):
    """And preparing changes nothing on disk: the ensemble is saved by the run."""
    prepared = prepare(job)
    assert not job.folder.exists()
    head = prepared.head("KNE", prepared.requests[0])
    assert prepared.has(head)
    for changes in ({"method": "FT"}, {"index": 1}, {"record": "other"}, {"fingerprint": "x"}, {"schema_version": 2}):
        assert not prepared.has({**head, **changes})
    assert prepare(job).fingerprints == prepared.fingerprints
    job.seed += 1
    other = prepare(job)
    assert other.fingerprints != prepared.fingerprints and other.settings == prepared.settings
