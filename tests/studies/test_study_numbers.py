"""The numbers of studies: draws and records as clusters against a bootstrap by hand, and what is between points."""

from __future__ import annotations

import json
import random
from statistics import fmean

import numpy
import pytest
from pytest import approx
from study_lines import line, write_points

from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.intervals import RESAMPLES, crossed, interval
from kne_easyedit.benchmark.publish import publish
from kne_easyedit.benchmark.tables import drawn
from kne_easyedit.studies.numbers import OVERALL, difference, differences, mean_difference, over, slope
from kne_easyedit.studies.reading import read_studies
from kne_easyedit.studies.report import publish_studies


def table(records: int, draws: int, of_draw: float, seed: int = 3) -> dict[tuple[int, int], float]:
    """Values with an effect of the record, one of the draw of size ``of_draw``, and noise."""
    rng = numpy.random.default_rng(seed)
    rows, columns = rng.normal(50, 10, records), rng.normal(0, of_draw, draws)
    return {(i, j): rows[i] + columns[j] + rng.normal(0, 1) for i in range(records) for j in range(draws)}


def crossed_of(values):
    return crossed(list(values.values()), [i for i, _ in values], [j for _, j in values])


def by_hand(values: dict[tuple[int, int], float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """The same interval, one drawn record and one drawn draw after the other."""
    rng = random.Random(0)
    records, draws = sorted({i for i, _ in values}), sorted({j for _, j in values})
    means = []
    for _ in range(resamples):
        rows, columns = rng.choices(records, k=len(records)), rng.choices(draws, k=len(draws))
        if drawn := [values[i, j] for i in rows for j in columns if (i, j) in values]:
            means.append(fmean(drawn))
    low, high = numpy.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def tolerance(low: float, high: float) -> float:
    """Four standard errors of the difference of two 2.5 % quantiles of as many normal means."""
    spread = (high - low) / 3.92
    return 4 * 2**0.5 * spread * (0.025 * 0.975 / RESAMPLES) ** 0.5 / 0.0585


@pytest.mark.parametrize(("records", "draws"), [(12, 3), (5, 6)])
@pytest.mark.parametrize("missing", [0, 4])
def test_records_and_draws_are_drawn_as_by_hand(records, draws, missing):
    values = table(records, draws, 4.0)
    for key in list(values)[1 : 2 * missing : 2]:
        del values[key]
    found, (low, high) = crossed_of(values), by_hand(values)
    assert found.mean == approx(fmean(values.values())) and found.records == records
    assert found.low == approx(low, abs=tolerance(low, high))
    assert found.high == approx(high, abs=tolerance(low, high))


def test_draws_that_differ_widen_the_interval_and_equal_ones_do_not():
    alike, apart = table(30, 4, 0.0), table(30, 4, 20.0)
    by_records = interval(list(apart.values()), [i for i, _ in apart])
    wide, narrow = crossed_of(apart), crossed_of(alike)
    assert wide.high - wide.low > 2 * (by_records.high - by_records.low), "records alone do not see the draws"
    assert narrow.high - narrow.low < 1.2 * (by_records.high - by_records.low)


def test_one_draw_is_the_bootstrap_over_records():
    values = table(20, 1, 5.0)
    assert crossed_of(values) == interval(list(values.values()), [i for i, _ in values])
    assert crossed([], [], []) is None
    same = crossed([3.0] * 4, [0, 0, 1, 1], [0, 1, 0, 1])
    assert (same.mean, same.low, same.high, same.records) == (3.0, 3.0, 3.0, 2)
    assert crossed_of(table(9, 3, 1.0)) == crossed_of(table(9, 3, 1.0))


# Differences


def test_draws_are_paired_as_far_as_both_have_them_and_a_single_one_is_compared_with_each():
    one = {("a", 0, 42, 1): 5.0, ("a", 0, 42, 2): 7.0, ("b", 1, 42, 1): 1.0}
    two = {("a", 0, 42, 1): 1.0, ("a", 0, 42, 2): 2.0, ("a", 0, 42, 3): 9.0}
    assert differences(one, two) == {("a", 0, 42, 1): 4.0, ("a", 0, 42, 2): 5.0}, "of a third one both know nothing"
    single = {("a", 0, 42, 1): 1.0}
    assert differences(one, single) == {("a", 0, 42, 1): 4.0, ("a", 0, 42, 2): 6.0}
    assert differences(single, one) == {("a", 0, 42, 1): -4.0, ("a", 0, 42, 2): -6.0}
    assert differences({("a", 0, 1, 1): 1.0}, {("a", 0, 2, 1): 1.0}) == {}, "another seed"
    assert differences({}, one) == differences(one, {}) == {}


def test_a_draw_more_on_one_side_does_not_narrow_a_difference():
    """Ten draws and nine are nine pairs, not ninety."""

    def drawn(draws: int, seed: int):
        return {(f"r{i}", i, 42, j): value for (i, j), value in table(12, draws, 5.0, seed).items()}

    ours = drawn(10, 1)
    first = {key: value for key, value in ours.items() if key[3] < 9}
    widths = [its.high - its.low for its in (over(differences(one, drawn(9, 2))) for one in (ours, first))]
    assert widths[0] == approx(widths[1], rel=0.05)


@pytest.fixture(name="curves")
def curves_fixture(tmp_path):
    points = {
        "KNE-share@0.1": {"ES": 0.5, "PORT": 0.4, "LOC": 0.8},
        "KNE-share@0.2": {"ES": 0.6, "PORT": 0.4, "LOC": 0.7},
        "KNE-share@0.4": {"ES": 0.7, "PORT": 0.4, "LOC": 0.6},
        "KNE-random@0.1": {"ES": 0.4, "PORT": 0.4, "LOC": 0.8},
        "KNE-random.2@0.1": {"ES": 0.3, "PORT": 0.4, "LOC": 0.8},
    }
    (found,) = read_studies([write_points(tmp_path / "run", points)]).curves
    return found


def test_points_are_read_with_their_draws(curves):
    assert (curves.study.name, curves.data, curves.method) == ("share", "counterfact", "KNE")
    assert [(cell.series, cell.value, cell.draws, cell.records) for cell in curves.cells.values()] == [
        ("share", "0.1", 1, 24),
        ("share", "0.2", 1, 24),
        ("share", "0.4", 1, 24),
        ("random", "0.1", 2, 24),
    ]
    assert curves.before == {"edit_success": approx(20), "fluency": approx(600)}
    assert curves.keys == ["edit_success", "portability", "locality", "seconds_per_edit"]


@pytest.mark.parametrize("shares", [("0.01", "0.16"), ("0.0025", "0.01", "0.04", "0.16", "0.64")])
def test_equal_values_have_no_slope(tmp_path, shares):
    """Not one of rounding: everything at 100 neither rises nor falls."""
    points = {f"KNE-share@{p}": {"ES": 1.0, "LOC": 0.7} for p in shares}
    (curves,) = read_studies([write_points(tmp_path / "run", points, records=40, noise=0)]).curves
    for key in ("edit_success", "locality"):
        found = slope(curves.of("share"), key)
        assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_differences_slopes_and_means_of_known_points(curves):
    localised, random_rows = curves.cells["share", "0.1"], curves.cells["random", "0.1"]
    found = difference(localised, random_rows, "edit_success")
    assert found.mean == approx(15, abs=1) and 9 < found.low < 12 and 18 < found.high < 21, "between its two draws"
    single = difference(localised, curves.cells["share", "0.2"], "edit_success")
    assert single.mean == approx(-10, abs=1) and single.high - single.low < 2, "what the records share cancels out"
    alone = localised.mean("edit_success")
    assert alone.high - alone.low > 2.5
    steep = slope(curves.of("share"), "locality")
    assert steep.mean == approx(-10, abs=0.5) and steep.high < -9
    assert slope(curves.of("share")[:1], "locality") is None
    overall = difference(curves.cells["share", "0.2"], localised, OVERALL)
    assert overall.mean == approx(0, abs=0.5)
    both = mean_difference(curves.of("share")[1:], [localised], "edit_success")
    assert both.mean == approx(15, abs=1)
    assert difference(localised, random_rows, "bleed") is None


def test_a_sequence_counts_as_it_is_at_its_end(tmp_path):
    folder = write_points(tmp_path / "run", {"KNE-sequence@3": {"ES": 1.0, "LOC": 0.9}}, records=3, noise=0)
    again = []
    for after, success in ((2, 0.75), (3, 0.25)):
        again += [{**line("KNE-sequence@3", i, {"ES": success}), "after": after} for i in range(after)]
    (folder / "KNE-sequence@3/retention.jsonl").write_text("".join(json.dumps(its) + "\n" for its in again))
    (curves,) = read_studies([folder]).curves
    (cell,) = curves.of("sequence")
    assert cell.mean("edit_success").mean == 25 and cell.records == 3
    assert cell.mean("locality") is None, "nobody has asked for it at the end"
    seconds = cell.mean("seconds_per_edit")
    assert seconds.mean == 2 and seconds.shown() == "2.0", "a median has no interval"
    assert seconds.plain() == {"mean": 2, "low": None, "high": None, "records": 3}


def test_a_sequence_with_a_record_that_cannot_be_edited_is_shorter(tmp_path):
    """What was asked on the way counts no more than before."""
    folder = write_points(tmp_path / "run", {"KNE-sequence@4": {"ES": 1.0}}, records=3, noise=0)
    again = [
        {**line("KNE-sequence@4", i, {"ES": success}), "after": after}
        for after, success in ((2, 0.75), (3, 0.25))
        for i in range(after)
    ]
    (folder / "KNE-sequence@4/retention.jsonl").write_text("".join(json.dumps(its) + "\n" for its in again))
    (cell,) = read_studies([folder]).curves[0].of("sequence")
    assert cell.mean("edit_success").mean == 25 and cell.records == 3


def test_results_of_no_study_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no label in .* is that of a study's point"):
        read_studies([write_points(tmp_path / "run", {"KNE": {"ES": 1.0}, "FT@25": {"ES": 1.0}})])
    with pytest.raises(ValueError, match="of KNE on counterfact nothing was measured that the study share shows"):
        read_studies([write_points(tmp_path / "none", {"KNE-share@0.1": {}}, seconds=None)])


@pytest.mark.parametrize(
    "label", ["facts@many", "facts@2.5", "facts@0", "share@nan", "share@-1", "share@inf", "batch@²"]
)
def test_a_value_that_is_none_of_the_axis_is_named(label, tmp_path):
    with pytest.raises(ValueError, match="behind @ is no value of the study "):
        read_studies([write_points(tmp_path / "run", {f"KNE-{label}": {"ES": 1.0}}, records=1)])


def test_unequal_numbers_of_rows_are_said(tmp_path):
    modules = {"k_proj": "m.{}.attn.k_proj", "down_proj": "m.{}.mlp.down_proj"}
    points = {f"KNE-rows@{name}": {"ES": 1.0, "PORT": 0.5} for name in modules}
    for name, rows, said in (("equal", {}, False), ("unequal", {"KNE-rows@k_proj": 17}, True)):
        folder = write_points(tmp_path / name, points, records=2, modules=modules, rows=rows)
        publish_studies(read_studies([folder]), tmp_path / f"{name}-report")
        text = (tmp_path / f"{name}-report/studies.md").read_text()
        assert ("is never chosen: k_proj 17, down_proj 20." in text) == said
    rows = json.loads((tmp_path / "equal-report/studies.json").read_text())["points"]
    (category,) = (row for row in rows if row["metric"] == "portability/R" and row["value"] == "k_proj")
    (whole,) = (row for row in rows if row["metric"] == "portability" and row["value"] == "k_proj")
    assert category["mean"] == approx(whole["mean"]) and category["records"] == 2


def test_a_report_is_written_of_labels_of_others_without_any_effect(tmp_path):
    """A label is no path and no markup; pictures have names of their own."""
    points = {"K|<b>-batch@1": {"ES": 1.0}, "K|<b>-batch@2": {"ES": 0.9}}
    folder = write_points(tmp_path / "run", points, records=2)
    for file in folder.rglob("results.jsonl"):
        file.write_text(file.read_text().replace("K|", "../../K|$x$"))
    publish_studies(read_studies([folder]), tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(
        ["batch-1.png", "studies.csv", "studies.html", "studies.json", "studies.md"]
    )
    page = (tmp_path / "report/studies.html").read_text()
    assert "<b>" not in page and "../../K|$x$&lt;b&gt;" in page


def test_tasks_of_general_ability_stand_beside_the_points(tmp_path):
    def score(value):
        return {"towns|x/acc": {"value": value, "stderr": None}}

    folder = write_points(tmp_path / "run", {"KNE-batch@1": {"ES": 1.0}}, records=2, ability_before=score(0.5))
    two = {"mode": "batch", "batch_size": 2, "ability_before": score(0.5), "ability": score(0.25)}
    write_points(folder, {"KNE-batch@2": {"ES": 1.0}}, records=2, **two)
    last = [{**line("KNE-sequence@2", i, {"ES": 1.0}), "after": 2, "ability": score(i)} for i in range(2)]
    write_points(folder, {"KNE-sequence@2": {"ES": 1.0}}, records=2, ability_before=score(0.5))
    (folder / "KNE-sequence@2/retention.jsonl").write_text("".join(json.dumps(its) + "\n" for its in last))
    publish_studies(read_studies([folder]), tmp_path / "report")
    text = (tmp_path / "report/studies.md").read_text()
    assert text.index("General ability") < text.index("| series | value | towns\\|x/acc |")
    assert "| *no edit* |  | 0.500 |" in text
    assert "| in one edit | 2 | 0.250 |" in text, "one edited model"
    assert "| in a row, all asked at the end | 2 | 0.500 |" in text
    rows = json.loads((tmp_path / "report/studies.json").read_text())["points"]
    assert [(its["series"], its["mean"]) for its in rows if its["metric"] == "ability/towns|x/acc"] == [
        ("batch", 0.25),
        ("sequence", 0.5),
    ]
    without = write_points(tmp_path / "without", {"KNE-batch@1": {"ES": 1.0}}, records=2)
    publish_studies(read_studies([without]), tmp_path / "none")
    assert "General ability" not in (tmp_path / "none/studies.md").read_text()


def batches(folder, size: int, perplexities, seed: int = 42, records: int = 40):
    """A point of ``records`` records in batches, each with its perplexity; None is not finite."""
    label, folder = f"KNE-batch@{size}", folder / f"{size}-{seed}"
    folder.mkdir(parents=True)
    shared = {
        "mode": "batch",
        "batch_size": size,
        "seed": seed,
        "fingerprint": f"{size}-{seed}",
        "perplexity_before": 13.5,
    }
    lines = [line(label, i, {"ES": 1.0}, perplexity=perplexities[i // size], **shared) for i in range(records)]
    (folder / "results.jsonl").write_text("".join(json.dumps(its) + "\n" for its in lines))


def perplexity_of(folder, size: int):
    (curves,) = read_studies([folder]).curves
    return curves.cells["batch", str(size)].mean("perplexity")


def test_a_perplexity_counts_once_for_each_edited_model(tmp_path):
    """Of one batch there is no interval, of several it is that over batches; seeds are other edited models."""
    batches(tmp_path / "one", 40, [25.7])
    assert perplexity_of(tmp_path / "one", 40).shown() == "25.7"
    batches(tmp_path / "four", 10, [20.0, 30.0, 25.0, 21.0])
    found, expected = perplexity_of(tmp_path / "four", 10), interval([20.0, 30.0, 25.0, 21.0])
    assert (found.low, found.high, found.records) == approx((expected.low, expected.high, 4))
    batches(tmp_path / "one", 40, [21.7], seed=7)
    found = perplexity_of(tmp_path / "one", 40)
    assert (found.mean, found.low, found.high, found.records) == approx((23.7, 21.7, 25.7, 2))


def test_one_model_against_several_draws_is_one():
    """A single draw has not the keys of the other side's; its facts share a model all the same."""
    keys = [(f"r{i}", i, 42, draw) for i in range(4) for draw in (1, 2, 3)]
    one_batch = {key: (0, *key[2:]) for key in keys if key[3] == 1}
    assert len({*drawn(keys, {}, one_batch)}) == 1
    pairs = {key: (key[1] // 2, *key[2:]) for key in keys}
    assert len({*drawn(keys, pairs)}) == 6 and len({*drawn(keys, pairs, one_batch)}) == 1
    assert drawn(keys, {}) == [key[0] for key in keys]


def test_what_is_said_of_perplexities_of_batches(tmp_path):
    values = [14.0 + i % 5 for i in range(40)]
    batches(tmp_path, 1, values)
    batches(tmp_path, 10, [20.0, 30.0, 25.0, 21.0])
    batches(tmp_path, 40, [40.0])
    publish_studies(read_studies([tmp_path]), tmp_path / "report")
    text = (tmp_path / "report/studies.md").read_text()
    (said,) = (its for its in text.splitlines() if its.startswith("- PPL"))
    assert said.startswith("- PPL changes from 1 an edit to 10 an edit by +8.0 ")
    assert said.endswith("(4 edited models are too few to tell).")
    rows = json.loads((tmp_path / "report/studies.json").read_text())["points"]
    ((mean, low, high, records),) = (
        (its["mean"], its["low"], its["high"], its["records"])
        for its in rows
        if (its["metric"], its["value"]) == ("perplexity", "40")
    )
    assert (mean, low, high, records) == (approx(40.0), None, None, 40)


def test_a_point_that_is_not_finite_says_so_and_is_compared_with_none(tmp_path):
    batches(tmp_path, 1, [14.0 + i % 5 for i in range(40)])
    batches(tmp_path, 2, [12.0] * 5 + [None] * 15)
    publish_studies(read_studies([tmp_path]), tmp_path / "report")
    text = (tmp_path / "report/studies.md").read_text()
    assert "| 12.0 [12.0, 12.0] (15 of 20 not finite) |" in text and "- PPL" not in text


def test_a_sequence_that_is_not_finite_at_its_end_says_so(tmp_path):
    points = {"KNE-sequence@3": {"ES": 1.0}}
    folder = write_points(tmp_path / "run", points, records=3, mode="sequential", perplexity_before=13.5)
    again = [
        {**line("KNE-sequence@3", i, {"ES": 1.0}), "after": after, "perplexity": value}
        for after, value in ((2, 14.0), (3, None))
        for i in range(after)
    ]
    (folder / "KNE-sequence@3/retention.jsonl").write_text("".join(json.dumps(its) + "\n" for its in again))
    (cell,) = read_studies([folder]).curves[0].of("sequence")
    assert cell.mean("perplexity") is None and cell.not_finite("perplexity") == "1 of 1 not finite"


def test_seeds_are_draws(tmp_path):
    folder = write_points(tmp_path / "run", {"KNE-share@0.1": {"ES": 0.5}}, records=4)
    more = [line("KNE-share@0.1", i, {"ES": 0.7}, seed=7, fingerprint="other") for i in range(4)]
    (folder / "seed-7").mkdir()
    (folder / "seed-7/results.jsonl").write_text("".join(json.dumps(its) + "\n" for its in more))
    (curves,) = read_studies([folder]).curves
    (cell,) = curves.cells.values()
    assert (cell.records, cell.draws, len(cell.lines)) == (4, 2, 8)
    assert cell.mean("edit_success").low < 55 and cell.mean("edit_success").high > 65


def test_a_report_is_no_source_of_studies(tmp_path, monkeypatch):
    """It has no facts asked again: sequences would be empty without a word."""
    monkeypatch.setattr("kne_easyedit.benchmark.figures.draw_all", lambda found, folder: {})
    publish(collect([write_points(tmp_path / "run", {"KNE-rows@2": {"ES": 1.0}})]), tmp_path / "report")
    with pytest.raises(ValueError, match=r"records\.jsonl: a report has neither .* give the folders of the"):
        read_studies([tmp_path / "report"])
