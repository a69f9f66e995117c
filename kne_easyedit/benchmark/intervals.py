"""How sure a mean over records is: bootstrap intervals, and differences over the same records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval over ``records``."""

    mean: float
    low: float
    high: float
    records: int


def interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """The mean of one value a record, and its 95 % interval; None for no values, a point for one.

    Records are drawn with replacement, `RESAMPLES` times, under ``seed``.
    """
    values = numpy.asarray(values, dtype=float)
    if not len(values):
        return None
    mean = float(values.mean())
    if len(values) == 1 or numpy.ptp(values) == 0:
        return Interval(mean, mean, mean, len(values))
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,), numpy.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=numpy.random.default_rng(seed), vectorized=True
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(values))


def paired(ours: Mapping[object, float], theirs: Mapping[object, float], seed: int = 0) -> Interval | None:
    """The mean difference over the records that both have, with its interval: what the records share cancels out."""
    return interval([ours[key] - theirs[key] for key in ours if key in theirs], seed)
