"""How sure a mean over records is: bootstrap intervals, and differences over the same records."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

import numpy

RESAMPLES = 10_000
LEVEL = 0.95
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval over ``records``."""

    mean: float
    low: float
    high: float
    records: int


def interval(values: Sequence[float], records: Sequence[Hashable] | None = None, seed: int = 0) -> Interval | None:
    """The mean of some values, and its 95 % interval; None for no values, a point for one record.

    ``records`` says of which record each value is (None: each of its own). Records are drawn with replacement, each with
    all its values (a cluster bootstrap), `RESAMPLES` times, under ``seed``: the same record under more seeds is no new one.
    """
    clusters: dict[Hashable, list[float]] = {}
    for record, value in zip(range(len(values)) if records is None else records, values, strict=True):
        clusters.setdefault(record, []).append(float(value))
    if not clusters:
        return None
    mean = float(numpy.asarray(values, dtype=float).mean())
    if len(set(map(len, clusters.values()))) == 1:  # then the mean over values is that over the records' means
        samples, statistic = (numpy.array([fmean(its) for its in clusters.values()]),), numpy.mean
        constant = numpy.ptp(samples[0]) == 0
    else:
        samples, statistic = (
            tuple(numpy.array([f(its) for its in clusters.values()], dtype=float) for f in (sum, len)),
            _ratio,
        )
        constant = numpy.ptp(numpy.asarray(values, dtype=float)) == 0
    if len(clusters) == 1 or constant:
        return Interval(mean, mean, mean, len(clusters))
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise ImportError(
            "report: intervals need scipy of 1.15 or later: pip install 'kne_easyedit[report]'"
        ) from error

    found = bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=numpy.random.default_rng(seed),
        vectorized=True,
        paired=len(samples) > 1,
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(clusters))


def paired(
    ours: Mapping[Key, float],
    theirs: Mapping[Key, float],
    record_of: Callable[[Key], Hashable] | None = None,
    seed: int = 0,
) -> Interval | None:
    """The mean difference over what both have, with its interval: what they share cancels out.

    ``record_of`` says of which record a key is (None: each key stands for its own), as in `interval`.
    """
    both = [key for key in ours if key in theirs]
    return interval([ours[key] - theirs[key] for key in both], record_of and [record_of(key) for key in both], seed)


def _ratio(sums: numpy.ndarray, counts: numpy.ndarray, axis: int = -1) -> numpy.ndarray:
    """The mean over all values of the records that were drawn."""
    return sums.sum(axis=axis) / counts.sum(axis=axis)
