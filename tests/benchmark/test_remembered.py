"""Means of result lines are computed once for the same lines; lines that are put together anew are computed again."""

from __future__ import annotations

import numpy
import pytest

from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.intervals import LEAST, RESAMPLES, interval, resamples
from kne_easyedit.benchmark.remembered import MethodLines, of_lines


def test_once_for_the_same_lines_and_arguments():
    calls = []

    @of_lines
    def count(lines, step=1):
        """Counted."""
        calls.append(step)
        return step * len(lines)

    lines = MethodLines([{}, {}])
    assert [count(lines), count(lines), count(lines, 2), count(lines, 2)] == [2, 2, 4, 4] and calls == [1, 2]
    assert count(MethodLines([{}])) == 1 and calls == [1, 2, 1]
    assert [count([{}, {}, {}]), count([{}])] == [3, 1] and len(calls) == 5, "a list may change: nothing is kept"
    assert count.__doc__ == "Counted."


def test_a_collection_gives_the_same_lines_each_time():
    lines = tuple({"data": data, "method": method} for data in ("zsre", "recent") for method in ("FT", "KNE", "FT"))
    found = Collection(lines, ())
    assert found.of("zsre", "FT") == (lines[0], lines[2]) and found.of("zsre", "FT") is found.of("zsre", "FT")
    assert found.of("zsre", "ROME") == () and found.of_data("recent") == lines[3:]
    assert (sorted(found.data_sets), found.methods) == (["recent", "zsre"], ["FT", "KNE"])


@pytest.mark.parametrize(("records", "expected"), [(1, RESAMPLES), (300, RESAMPLES), (1000, 3000), (10**6, LEAST)])
def test_many_records_are_drawn_less_often(records, expected):
    assert resamples(records) == expected


def test_fewer_resamples_give_the_same_interval():
    """Of 4,000 values: within a tenth of the half width that the normal distribution gives."""
    values = numpy.random.default_rng(0).normal(50, 10, 4000)
    found = interval(values.tolist())
    half = 1.96 * values.std() / len(values) ** 0.5
    assert found.low == pytest.approx(values.mean() - half, abs=half / 10)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 10)
