"""What a report says of edited models, of records that not all metrics have, and of methods over different records."""

from __future__ import annotations

import json

import pytest
from made_results import PRE, line, write
from pytest import approx

from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.intervals import FEW
from kne_easyedit.benchmark.markdown_report import report_text
from kne_easyedit.benchmark.publish import publish
from kne_easyedit.benchmark.tables import lead, mean
from kne_easyedit.metrics import METRICS

(PPL,) = (metric for metric in METRICS if metric.key == "perplexity")
RECORDS = 40


def run(folder, method: str, perplexities, size: int | None = 1, seed: int = 42, records: int = RECORDS):
    """A run whose edits of ``size`` records have these perplexities; None is not finite, and no size a sequence."""
    modes = {1: {"mode": "single"}, None: {"mode": "sequential"}}
    shared = {**modes.get(size, {"mode": "batch", "batch_size": size}), "seed": seed, "perplexity_before": 13.5}
    shared["fingerprint"] = f"{method}-{seed}"
    values = [perplexities[i // (size or records)] for i in range(records)]
    folder = folder / f"{method}-{seed}"
    asked = [None] * records if size is None else values
    write(folder / "results.jsonl", [line(method, i, 1.0, perplexity=its, **shared) for i, its in enumerate(asked)])
    if size is None:
        heads = [{"method": method, "index": i, "metrics": {"post": {}}} for i in range(records)]
        stops = [{**its, "after": records // 2, "perplexity": 13.6} for its in heads[: records // 2]]
        write(
            folder / "retention.jsonl",
            stops + [{**h, "after": records, "perplexity": v} for h, v in zip(heads, values)],
        )


def row_of(text: str, section: str, method: str) -> list[str]:
    """The cells of a method's row in the section of this title."""
    own = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
    (row,) = (row for row in own.splitlines() if row.startswith(f"| counterfact | {method} |"))
    return [its.strip() for its in row.split("|")[1:-1]]


MEANS, DIFFERENCES = "How sure the means are", "KNE against each method"


# Edited models


def test_a_sequence_that_ends_with_no_finite_perplexity_is_not_taken_at_an_earlier_stop(tmp_path):
    run(tmp_path, "KNE", [None], size=None)
    run(tmp_path, "FT", [20.0], size=None)
    found = collect([tmp_path])
    assert {its["perplexity"] for its in found.of("counterfact", "KNE")} == {None}
    text = report_text(found, "Report", {})
    assert "|  | PPL | 13.50 | - | **20.00** | 1 of 1 not finite |" in text
    assert "directly after its own edit, perplexity and tasks of that after the last one." in text


def test_a_sequence_that_nobody_has_asked_at_its_end_is_not_said_to_be_broken(tmp_path):
    run(tmp_path, "KNE", [20.0], size=None)
    (tmp_path / "KNE-42/retention.jsonl").unlink()
    assert "not finite" not in report_text(collect([tmp_path]), "Report", {})


def test_broken_models_are_counted_and_their_method_is_not_ranked(tmp_path):
    run(tmp_path, "KNE", [12.0] * 10 + [None] * 30)
    run(tmp_path, "FT", [14.0] * 40)
    found = collect([tmp_path])
    text = report_text(found, "Report", {})
    assert "|  | PPL | 13.50 | - | **14.00** | 12.00 (30 of 40 not finite) |" in text
    assert row_of(text, DIFFERENCES, "FT")[-2] == "-2.0 [-2.0, -2.0] (30 of 40 not finite)"
    publish(found, tmp_path / "report")
    numbers = json.loads((tmp_path / "report/report.json").read_text())["counterfact"]
    assert numbers["KNE"]["not_finite"] == {"perplexity": "30 of 40 not finite"} and "not_finite" not in numbers["FT"]


def test_broken_batches_are_counted_as_batches(tmp_path):
    run(tmp_path, "FT", [12.0, None, 14.0, None], size=10)
    assert "13.00 (2 of 4 not finite)" in report_text(collect([tmp_path]), "Report", {})


@pytest.mark.parametrize("size", [40, None])
def test_one_edited_model_has_no_interval_and_no_bold_difference(size, tmp_path):
    run(tmp_path, "KNE", [25.7], size=size)
    run(tmp_path, "FT", [14.5], size=size)
    text = report_text(collect([tmp_path]), "Report", {})
    assert row_of(text, MEANS, "KNE")[-2:] == ["25.7", "40 (PPL 1)"]
    assert row_of(text, DIFFERENCES, "FT")[-2:] == ["+11.2", "40 (PPL 1)"]
    assert "PPL is one figure of each edited model, that of a batch or a sequence" in text


def test_several_edited_models_are_drawn(tmp_path):
    """Batches, the batches of several seeds, and sequences; compared with single edits, the batches are drawn."""
    run(tmp_path, "KNE", [20.0, 30.0, 25.0, 21.0], size=10)
    found = collect([tmp_path])
    alone = mean(found.of("counterfact", "KNE"), PPL)
    assert alone.records == 4 and alone.low < 22.5 and alone.high > 27
    run(tmp_path, "KNE", [20.5, 30.5, 24.5, 20.5], size=10, seed=7)
    run(tmp_path, "FT", [14.0 + i % 5 for i in range(40)])
    found = collect([tmp_path])
    assert mean(found.of("counterfact", "KNE"), PPL).records == 8
    assert mean(found.of("counterfact", "FT"), PPL).records == 40
    difference = lead(found, "counterfact", "KNE", "FT", PPL)
    assert (difference.records, difference.mean) == (4, approx(8)) and difference.low < 6


def test_equal_models_under_several_seeds_are_one(tmp_path):
    """A method that draws nothing makes the same model again: no further one, and no narrower interval."""
    values = [20.0, 30.0, 25.0, 21.0]
    run(tmp_path, "KNE", values, size=10)
    alone = mean(collect([tmp_path]).of("counterfact", "KNE"), PPL)
    run(tmp_path, "KNE", values, size=10, seed=7)
    assert mean(collect([tmp_path]).of("counterfact", "KNE"), PPL) == alone
    assert alone.records == 4


def test_a_batch_of_one_and_a_single_edit_are_a_record_each(tmp_path):
    run(tmp_path, "KNE", [14.0 + i % 5 for i in range(40)])
    assert mean(collect([tmp_path]).of("counterfact", "KNE"), PPL).records == 40


# Records


def test_metrics_that_other_numbers_of_records_have_are_named(tmp_path):
    post = {"rewrite_acc": [1.0], "portability": {}, "locality": {"L_acc": [0.5]}}
    kne = [line("KNE", i, 1.0, neighbourhood=1.0 if i else None) for i in range(RECORDS)]
    kne = [{**its, "metrics": {"pre": PRE, "post": post}} if i < 3 else its for i, its in enumerate(kne)]
    ft = [line("FT", i, 0.0, neighbourhood=0.5) for i in range(RECORDS)]
    kne[5]["alias_beyond_bleed"], ft[5]["alias_beyond_bleed"] = 1.0, 0.0
    write(tmp_path / "results.jsonl", kne + ft)
    text = report_text(collect([tmp_path]), "Report", {})
    assert row_of(text, MEANS, "KNE")[-1] == "40 (PORT 37, NBH 39, PORT-B 1, FLU 37)"
    difference = row_of(text, DIFFERENCES, "FT")
    assert "+100.0" in difference and "**+50.0 [+50.0, +50.0]**" in difference, "one record alone is never bold"


@pytest.mark.parametrize("records", [FEW - 1, FEW])
def test_a_difference_over_few_records_is_not_bold(records, tmp_path):
    lines = [line(method, i, success) for method, success in (("KNE", 1.0), ("FT", 0.0)) for i in range(records)]
    write(tmp_path / "results.jsonl", lines)
    text = report_text(collect([tmp_path]), "Report", {})
    assert ("| **+100.0 [+100.0, +100.0]** |" in text) == (records >= FEW)
    assert f"over {FEW} records or more" in text


def test_methods_over_different_records_of_equal_number_are_said_to_be(tmp_path):
    for first, says in ((0, None), (2, "|  | records (3 shared) | - | - | 5 | 5 |"), (5, "|  | records (0 shared) |")):
        folder = tmp_path / str(first)
        lines = [line("KNE", i, 1.0) for i in range(5)] + [line("FT", i, 1.0) for i in range(first, first + 5)]
        write(folder / "results.jsonl", lines)
        text = report_text(collect([folder]), "Report", {})
        assert says in text if says else "| records (" not in text
