"""A report's records: read again they make the same report, they grow by later results, and hold no data's texts."""

from __future__ import annotations

import json

import pytest
from made_results import LINES, MANIFEST, line, write
from test_axes import job
from test_neighbour_report import LINES as WITH_NEIGHBOURS
from test_neighbour_report import with_neighbours

from kne_easyedit import cli
from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.publish import publish
from kne_easyedit.benchmark.tables import figures, lead
from kne_easyedit.metrics import METRICS, PERCENT, Metric

ABOUT = {**MANIFEST, "localization": {}, "second_moments": {}}


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """They are drawn of the same lines, which takes long."""
    monkeypatch.setattr("kne_easyedit.benchmark.figures.draw_all", lambda found, folder: {})


def runs(folder, lines, manifest=ABOUT) -> None:
    write(folder / "results.jsonl", lines)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def sequence(folder) -> None:
    """Three edits in a row, asked again at the end, where the perplexity was finite of two only."""
    own = {"mode": "sequential", "perplexity_before": 9.0, "perplexity": 8.0, "ability_before": {}, "ability": {}}
    lines = [line("FT", i, 0.5, **own) for i in range(3)]
    runs(folder, lines)
    ends = [dict(its) | {"after": 3, "perplexity": value} for its, value in zip(lines, (7.0, None, 7.5))]
    write(folder / "retention.jsonl", ends)


def swept(folder) -> None:
    for p in (0.1, 0.2):
        job(folder, str(p), p=p)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: runs(folder, LINES),
        lambda folder: runs(folder, WITH_NEIGHBOURS),
        lambda folder: runs(folder, [line("ROME", i, 1.0, losses=[]) for i in range(3)]),
        lambda folder: write(folder / "results.jsonl", LINES),  # without a manifest
        sequence,
        swept,
    ],
    ids=["plain", "neighbours", "no losses", "no manifest", "sequence", "swept"],
)
def test_a_report_of_its_records_is_the_same_report(tmp_path, make):
    make(tmp_path / "runs")
    first, second = tmp_path / "first", tmp_path / "second"
    publish(collect([tmp_path / "runs"]), first)
    publish(collect([first]), second)
    for name in ("report.md", "report.json", "records.jsonl", "manifests.json"):
        assert (first / name).read_text() == (second / name).read_text(), name


def test_a_metric_of_ones_own_is_kept(tmp_path, monkeypatch):
    own = Metric("size", "SIZE", "a figure of one's own", PERCENT, "up", ("size_of_edit",), optional=True)
    monkeypatch.setattr("kne_easyedit.metrics.METRICS", (*METRICS, own))
    runs(tmp_path / "runs", [line("KNE", i, 1.0, size_of_edit=0.25) for i in range(3)])
    publish(collect([tmp_path / "runs"]), tmp_path / "report")
    assert [its["size_of_edit"] for its in collect([tmp_path / "report"]).lines] == [0.25] * 3


def test_the_unedited_model_is_known_without_its_answers(tmp_path):
    """Not every record has texts; each has what they told."""
    knows = [with_neighbours("KNE", i, 1.0, 0) | {"before": " Rome", "answer_before": "Rome."} for i in range(6)]
    runs(tmp_path / "runs", [*knows, *WITH_NEIGHBOURS[6:]])
    publish(collect([tmp_path / "runs"]), tmp_path / "report")
    kept = [json.loads(its) for its in (tmp_path / "report/records.jsonl").read_text().splitlines()]
    (last,) = (its for its in kept if (its["method"], its["index"]) == ("KNE", 5))
    assert "before" not in last and "neighbours" not in last
    shares = {"exact_match_before": 1.0, "whole_answer_before": 1.0, "bleed_forced_before": 0.25}
    assert shares.items() <= last.items()


def test_texts_stand_only_where_the_report_shows_them(tmp_path):
    lines = [with_neighbours("KNE", i, 1.0, i % 2, prompt=f"prompt-{i}", subject=f"subject-{i}") for i in range(6)]
    runs(tmp_path / "runs", lines)
    publish(collect([tmp_path / "runs"]), tmp_path / "report")
    text = (tmp_path / "report/records.jsonl").read_text()
    assert [f"prompt-{i}" in text for i in range(6)] == [True] * 3 + [False] * 3
    assert "subject" not in text and "Gaul" not in text  # aliases, too
    shown = [json.loads(its).get("neighbours", []) for its in text.splitlines()]
    assert [len(its) for its in shown] == [4, 4, 4, 0, 0, 0]


def test_a_report_grows_by_a_method_that_is_run_later(tmp_path):
    runs(tmp_path / "old", [its for its in WITH_NEIGHBOURS if its["method"] == "FT"])
    publish(collect([tmp_path / "old"]), tmp_path / "report")
    runs(tmp_path / "new", [its for its in WITH_NEIGHBOURS if its["method"] == "KNE"])
    grown = collect([tmp_path / "report", tmp_path / "new"])
    runs(tmp_path / "both", WITH_NEIGHBOURS)
    both = collect([tmp_path / "both"])
    assert figures(grown) == figures(both) and len(grown.manifests) == 1, "both runs have the same one"
    other = {**ABOUT, "started": "2026-02-02T00:00:00+00:00"}
    runs(tmp_path / "new", [its for its in WITH_NEIGHBOURS if its["method"] == "KNE"], other)
    for _ in range(2):  # into its own folder: it does not gather copies
        publish(collect([tmp_path / "report", tmp_path / "new"]), tmp_path / "report")
        assert len(json.loads((tmp_path / "report/manifests.json").read_text())) == 2
    bleed = next(its for its in METRICS if its.key == "bleed")
    assert lead(grown, "counterfact", "KNE", "FT", bleed).records == 6


def test_lines_of_other_settings_add_to_what_is_known_of_the_unedited_model(tmp_path):
    """A run without neighbours and fluency over some of the records takes nothing from the row of the model before."""
    runs(tmp_path / "all", [its for its in WITH_NEIGHBOURS if its["method"] == "FT"])
    bare = [line("KNE", i, 1.0) for i in range(3)]
    for its in bare:
        its["metrics"] = {when: {**found, "fluency": {}} for when, found in its["metrics"].items()}
    runs(tmp_path / "bare", bare)
    alone = figures(collect([tmp_path / "all"]))["counterfact"]["no edit"]
    for order in (("all", "bare"), ("bare", "all")):
        assert figures(collect([tmp_path / its for its in order]))["counterfact"]["no edit"] == alone
    assert alone["bleed_forced"] == 25 and alone["fluency"] == 600


def test_methods_with_other_neighbours_come_back_as_they_were(tmp_path):
    other = with_neighbours("FT", 0, 1.0, 0)
    other |= {"neighbours": other["neighbours"][::-1]}
    runs(tmp_path / "runs", [with_neighbours("KNE", 0, 1.0, 1), other])
    publish(collect([tmp_path / "runs"]), tmp_path / "report")
    publish(collect([tmp_path / "report"]), tmp_path / "again")
    assert (tmp_path / "report/report.md").read_text() == (tmp_path / "again/report.md").read_text()


def test_runs_count_in_a_folder_that_holds_their_report(tmp_path):
    runs(tmp_path, [line("KNE", 0, 0.5)])
    publish(collect([tmp_path]), tmp_path)
    runs(tmp_path / "more", [line("FT", 0, 0.5)])
    assert collect([tmp_path]).methods == ["FT", "KNE"]


def test_a_report_among_runs_counts_only_where_it_is_named(tmp_path, capsys):
    """The default folder of a report is in that of its runs: made anew, it must not hold on to what it held."""
    runs(tmp_path / "run", [line("KNE", 0, 0.5)])
    assert cli.main(["report", str(tmp_path)]) == 0
    runs(tmp_path / "run", [line("KNE", 0, 1.0, fingerprint="new")])
    assert cli.main(["report", str(tmp_path)]) == 0
    (only,) = collect([tmp_path / "report"]).lines
    assert only["fingerprint"] == "new" and "records.jsonl" in capsys.readouterr().out
    assert collect([tmp_path / "report" / "records.jsonl"]).manifests == collect([tmp_path / "report"]).manifests


def test_other_settings_of_a_published_method_are_refused(tmp_path):
    runs(tmp_path / "old", LINES)
    publish(collect([tmp_path / "old"]), tmp_path / "report")
    runs(tmp_path / "new", [line("KNE", 0, 1.0, fingerprint="other")])
    with pytest.raises(ValueError, match=r"report/records\.jsonl and .*new/results\.jsonl: KNE on counterfact under"):
        collect([tmp_path / "report", tmp_path / "new"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "manifests.json",
            "{}",
            r"manifests\.json: manifests: a dict is not a list; expected what `kne report` writes",
        ),
        ("manifests.json", "[1]", r"manifests\.json: manifest: 1 is not a mapping"),
        (
            "manifests.json",
            json.dumps([{**ABOUT, "curves": {"KNE": 1}}]),
            r"manifests\.json: curves\.KNE: 1 is not a text",
        ),
        ("records.jsonl", '{"method": 1}\n', r"records\.jsonl: line 1: has no 'metrics'"),
        (
            "records.jsonl",
            json.dumps(line("KNE", 0, 1.0, bleed_forced_before="x")) + "\n",
            r"line 1: bleed_forced_before: 'x' is not a finite number",
        ),
        ("records.jsonl", json.dumps(line("KNE", 0, 1.0, probes=0.5)) + "\n", "probes: 0.5 is not a whole number"),
    ],
)
def test_records_of_others_are_checked(tmp_path, name, content, says):
    runs(tmp_path / "runs", LINES)
    publish(collect([tmp_path / "runs"]), tmp_path / "report")
    (tmp_path / "report" / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        collect([tmp_path / "report"])
