"""Bootstrap intervals of means over records, and of differences over the same records."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import fmean
from types import SimpleNamespace
from typing import TypeVar

import numpy

RESAMPLES, LEAST, MOST_DRAWN = 10_000, 1_000, 3_000_000
"""Resamples of a bootstrap; for many records fewer, down to the second: so that at most so many records are drawn. The
interval is narrow there, and its ends are known to a twentieth of it all the same."""
AT_ONCE = 300_000
"""Values that are taken at once: they fit a processor's cache. The interval does not depend on it."""
LEVEL = 0.95
FEW = 20
"""Of fewer records nothing is concluded: the percentiles of so few are too narrow, of one or of equal ones a point."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval over ``records``."""

    mean: float
    low: float
    high: float
    records: int
    """How many were drawn: records, or edited models where the facts of one share a figure (`tables.drawn`)."""

    def shown(self, form: str = "{:.1f}") -> str:
        """The mean with its interval, if that is known."""
        ends = f" [{form.format(self.low)}, {form.format(self.high)}]" if self.is_known else ""
        return form.format(self.mean) + ends

    def plain(self) -> dict[str, float | int | None]:
        """As JSON has it: an interval that is not known has no ends."""
        return {**asdict(self), **({} if self.is_known else {"low": None, "high": None})}

    @property
    def is_known(self) -> bool:
        """Whether there is an interval: one record says nothing about others; a median comes without one (NaN)."""
        return self.records > 1 and not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def is_few(self) -> bool:
        """Whether the records are too few to conclude anything."""
        return self.records < FEW

    @property
    def leaves_out_zero(self) -> bool:
        """Whether a difference is told apart from 0."""
        return not self.is_few and (self.low > 0 or self.high < 0)


def interval(values: Sequence[float], records: Sequence[Hashable] | None = None, seed: int = 0) -> Interval | None:
    """The mean of some values, and its 95 % percentile interval of a cluster bootstrap.

    Records are drawn with replacement, each with all its values, as often as `resamples` says: one record under several
    seeds is not several records.

    Args:
        values: One or more values of each record, in any unit.
        records: The record of each value; None if each value is of a record of its own.
        seed: Of the bootstrap.

    Returns:
        The mean and the interval in the unit of the values: None for no values, a point for one record.

    Raises:
        ImportError: If scipy is missing.
    """
    table = numpy.asarray(values, dtype=float)
    clusters: dict[Hashable, list[float]] = {}
    for record, value in zip(range(len(values)) if records is None else records, table.tolist(), strict=True):
        clusters.setdefault(record, []).append(value)
    if not clusters:
        return None
    mean = float(table.mean())
    samples: tuple[numpy.ndarray, ...]
    statistic: Callable
    if len(clusters) == len(values):
        samples, statistic = (table,), numpy.mean
        constant = numpy.ptp(table) == 0
    elif len(set(map(len, clusters.values()))) == 1:  # then the mean over values is that over the records' means
        samples, statistic = (numpy.array([fmean(its) for its in clusters.values()]),), numpy.mean
        constant = numpy.ptp(samples[0]) == 0
    else:
        samples, statistic = (
            tuple(numpy.array([f(its) for its in clusters.values()], dtype=float) for f in (sum, len)),
            _ratio,
        )
        constant = numpy.ptp(table) == 0
    if len(clusters) == 1 or constant:
        return Interval(mean, mean, mean, len(clusters))
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise ImportError(
            "report: intervals need scipy of 1.15 or later: pip install 'kne_easyedit[report]'"
        ) from error

    draws, rows = _draws(len(clusters), resamples(len(clusters)), seed), max(1, AT_ONCE // len(clusters))
    mean_of: Callable[..., numpy.ndarray] = statistic
    means = [mean_of(*(its.take(draws[i : i + rows]) for its in samples), axis=-1) for i in range(0, len(draws), rows)]
    found = bootstrap(  # no resamples of its own: those of the metrics of one method are the same
        samples,
        statistic,
        n_resamples=0,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=numpy.concatenate(means)),
        confidence_level=LEVEL,
        method="percentile",
        vectorized=True,
        paired=len(samples) > 1,
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(clusters))


@lru_cache(maxsize=2)
def _draws(records: int, times: int, seed: int) -> numpy.ndarray:
    """(times, records): the numbers of the records that are drawn each time."""
    return numpy.random.default_rng(seed).integers(0, records, (times, records))


def resamples(records: int) -> int:
    """How often so many records are drawn."""
    return max(LEAST, min(RESAMPLES, MOST_DRAWN // records))


def paired(
    ours: Mapping[Key, float],
    theirs: Mapping[Key, float],
    record_of: Callable[[Key], Hashable] | None = None,
    seed: int = 0,
) -> Interval | None:
    """The mean difference over the keys that both have, with its interval: what the values share cancels out.

    Args:
        ours: Key -> value.
        theirs: Key -> value that is subtracted.
        record_of: The record of a key; None if each key is a record of its own.
        seed: As in `interval`.

    Returns:
        As `interval`.
    """
    both = [key for key in ours if key in theirs]
    return interval([ours[key] - theirs[key] for key in both], record_of and [record_of(key) for key in both], seed)


def crossed(
    values: Sequence[float], records: Sequence[Hashable], draws: Sequence[Hashable], seed: int = 0
) -> Interval | None:
    """The mean of values of records that were edited under several draws (of facts, rows, seeds), with its interval.

    Records and draws are both drawn with replacement, independently of each other, and a value counts as often as its
    record times as often as its draw (the pigeonhole bootstrap, Owen 2007): what another draw would have given is part
    of the interval, and so is what other records would have given. Of one draw it is `interval`.

    Args:
        values: In any unit.
        records: The record of each value.
        draws: The draw of each value.
        seed: Of the bootstrap.

    Returns:
        As `interval`.

    Raises:
        ImportError: As `interval`.
    """
    if len(set(draws)) < 2:
        return interval(values, records, seed)
    rows, columns = ({its: i for i, its in enumerate(dict.fromkeys(names))} for names in (records, draws))
    sums, counts = numpy.zeros((2, len(rows), len(columns)))
    for value, record, draw in zip(values, records, draws, strict=True):
        sums[rows[record], columns[draw]] += value
        counts[rows[record], columns[draw]] += 1
    mean = float(sums.sum() / counts.sum())
    if numpy.ptp(numpy.asarray(values, dtype=float)) == 0:
        return Interval(mean, mean, mean, len(rows))
    rng = numpy.random.default_rng(seed)
    times, of_draw = (rng.multinomial(n, numpy.full(n, 1 / n), RESAMPLES) for n in counts.shape)
    total, number = (((times @ its) * of_draw).sum(1) for its in (sums, counts))
    means = total[number > 0] / number[number > 0]  # not every record has every draw
    low, high = numpy.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(mean, float(low), float(high), len(rows))


def _ratio(sums: numpy.ndarray, counts: numpy.ndarray, axis: int = -1) -> numpy.ndarray:
    """The mean over all values of the records that were drawn."""
    return sums.sum(axis=axis) / counts.sum(axis=axis)
