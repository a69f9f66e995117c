"""How alike ensembles are: overlaps of ensembles made by hand, and intervals against a bootstrap by hand."""

from __future__ import annotations

import json
from itertools import combinations
from statistics import fmean

import numpy
from conftest import LLAMA_DOWN
from pytest import approx

from kne_easyedit.benchmark import intervals
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.studies.ensembles import _between, overlap_table, overlaps, publish_overlaps


def ensemble(*rows: int) -> NeuronEnsemble:
    return NeuronEnsemble({LLAMA_DOWN: {0: tuple(sorted(rows))}}, {LLAMA_DOWN: 20}, (0, 1))


DRAWS = {
    1: [ensemble(0, 1), ensemble(1, 2), ensemble(8, 9)],
    5: [ensemble(0, 1, 2, 3), ensemble(2, 3)],
    9: [ensemble(1, 2)],
}


def test_overlaps_are_means_over_draws_and_pairs():
    one, five, nine = overlaps(DRAWS)
    assert (one["facts"], one["draws"], one["rows"], one["by_chance"]) == (1, 3, 2, approx(2 / 40))
    assert one["with_most"] == approx(fmean([0.5, 1.0, 0.0])) and one["between_draws"] == approx(0.5 / 3)
    assert five["with_most"] == approx(fmean([2 / 3, 0.5])) and five["between_draws"] == approx(2 / 3)
    assert (nine["with_most"], nine["between_draws"]) == (None, None)
    assert set(one["intervals"]) == {"with_most", "between_draws"} and five["intervals"] == nine["intervals"] == {}
    assert overlaps({}) == []
    assert overlap_table([one]).splitlines()[2].startswith("| 1 | 3 | 2 | 0.50 [")


def test_the_interval_of_pairs_is_that_of_a_bootstrap_over_draws(monkeypatch):
    rng = numpy.random.default_rng(5)
    table = rng.uniform(0.2, 0.8, (8, 8))
    table = (table + table.T) / 2
    found = _between(table)
    assert found.mean == approx(fmean(table[i, j] for i, j in combinations(range(8), 2)))
    means = []
    for _ in range(4000):
        drawn = rng.integers(0, 8, 8)
        pairs = [table[i, j] for i, j in combinations(drawn, 2) if i != j]
        means.append(fmean(pairs))
    low, high = numpy.quantile(means, (0.025, 0.975))
    # Both have errors of sampling: of 4000 resamples the quantile's is about 2 % of the interval's width.
    assert [found.low, found.high] == approx([low, high], abs=0.06 * (high - low))
    assert found.low < found.mean < found.high
    assert _between(table[:1, :1]) is None


def test_the_page_has_the_curves_and_text_of_others_without_effect(tmp_path, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    page = publish_overlaps(overlaps(DRAWS), "KNE on <b>x</b>", tmp_path)
    assert "<b>" not in page.read_text() and 'src="data:image/png;base64,' in page.read_text()
    content = json.loads((tmp_path / "ensembles.json").read_text())
    assert [its["facts"] for its in content["overlap"]] == [1, 5, 9]
    assert "Nothing was edited" in (tmp_path / "ensembles.md").read_text()
