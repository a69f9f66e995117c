"""The numbers of a study's report: each point over records and draws, and what is between two points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy

from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.intervals import FEW, Interval, crossed, interval
from kne_easyedit.benchmark.tables import drawn, edited_models, not_finite, of_model
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.metrics import METRICS, Metric
from kne_easyedit.studies.definitions import Place, Study

KEYS = (
    "edit_success",
    "exact_match",
    "portability",
    "locality",
    "neighbourhood",
    "bleed",
    "fluency",
    "perplexity",
    "seconds_per_edit",
)
"""The metrics of a study, in the order of panels; those that were measured are shown."""
OVERALL = "overall"
"""Key of what the paper's claims call overall: a record's mean of edit success, portability and locality."""
_OVERALL = ("edit_success", "portability", "locality")
Key = tuple[str, int, object, int]
"""Record, its number, seed, draw."""


@dataclass(frozen=True)
class Cell:
    """One point of a curve: all lines of one series and value, of all draws and seeds."""

    series: str
    value: str
    lines: Mapping[Key, Mapping[str, Any]]
    """Of a sequence: of all its facts, asked at its end."""
    rows: float | None
    """Rows that are trained, mean over draws."""
    share: float | None
    """These rows' share of all parameters, in [0, 1]."""
    role: str | None = None
    """What the module does that is edited alone, where the study is of modules (`models.targets.role_of`)."""

    @property
    def draws(self) -> int:
        """Draws and seeds."""
        return len({key[2:] for key in self.lines})

    @cached_property
    def records(self) -> int:
        """Records that were edited."""
        return len({key[:2] for key in self.lines})

    @property
    def few(self) -> bool:
        """Whether these are too few: the point is drawn hollow, and named."""
        return self.records < FEW

    def values(self, key: str) -> dict[Key, float]:
        """The metric of each line that has it, in its unit."""
        if key == OVERALL:
            parts = [self.values(each) for each in _OVERALL]
            shared = [its for its in parts[0] if all(its in part for part in parts)]
            return {its: fmean(part[its] for part in parts) for its in shared}
        metric = BY_KEY[key]
        return {its: value for its, line in self.lines.items() if (value := metric.value(line)) is not None}

    def by_category(self, key: str) -> dict[str, dict[Key, float]]:
        """Category of the metric -> its values, as `values`; nothing for a metric without categories."""
        return dict(sorted(self._by_name(BY_KEY[key].categories).items()))

    @cached_property
    def scores(self) -> dict[str, dict[Key, float]]:
        """Task of general ability (`general_report`) -> its scores on the edited models, in the task's own unit."""
        return self._by_name(lambda line: {task: its["value"] for task, its in (line.get("ability") or {}).items()})

    @cached_property
    def ability(self) -> dict[str, Interval]:
        """Task -> the mean of its scores."""
        return {task: mean for task, values in self.scores.items() if (mean := over(values, self.models))}

    @cached_property
    def models(self) -> dict[tuple, tuple]:
        """The edited models that several lines are of (`tables.edited_models`)."""
        return edited_models(self.lines)

    def not_finite(self, key: str) -> str:
        """How many edited models have no finite value of the metric, in words; empty if all have one."""
        return not_finite(self.lines, BY_KEY[key]) if key in BY_KEY else ""

    def _by_name(self, named: Callable[[Mapping[str, Any]], Mapping[str, float]]) -> dict[str, dict[Key, float]]:
        """Name -> the value of each line that has one under this name."""
        found: dict[str, dict[Key, float]] = {}
        for its, line in self.lines.items():
            for name, value in named(line).items():
                found.setdefault(name, {})[its] = value
        return found

    def mean(self, key: str) -> Interval | None:
        """The mean over records and draws with its interval; of seconds the median without one. None without values."""
        if key not in self._means:
            values = self.values(key)
            if key == "seconds_per_edit" and values:
                self._means[key] = Interval(median(values.values()), math.nan, math.nan, self.records)
            else:
                self._means[key] = over(values, *_models([self], key))
        return self._means[key]

    @cached_property
    def _means(self) -> dict[str, Interval | None]:
        """What `mean` has computed: pictures, tables and sentences ask for the same."""
        return {}


BY_KEY: Mapping[str, Metric] = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class Curves:
    """One study of one method on one data set."""

    study: Study
    data: str
    method: str
    cells: Mapping[tuple[str, str], Cell]
    """Series and value -> the point, in the order of series and values."""
    before: Mapping[str, float]
    """Key of a metric -> its value of the unedited model, where that is one."""
    ability_before: Mapping[str, float] = field(default_factory=dict)
    """Task of general ability -> its score on the unedited model."""

    @property
    def keys(self) -> list[str]:
        """Of `KEYS` those that were measured."""
        return [key for key in KEYS if any(cell.values(key) for cell in self.cells.values())]

    def of(self, series: str) -> list[Cell]:
        """The points of one series, by value."""
        return [cell for cell in self.cells.values() if cell.series == series]

    @property
    def series(self) -> list[str]:
        """The series that have points."""
        return [name for name in self.study.series if self.of(name)]


@dataclass(frozen=True)
class StudyResults:
    """All curves of a report, with what they were made of."""

    found: Collection
    curves: tuple[Curves, ...]
    ensembles: Mapping[tuple[str, str], Path]
    """Data set and label -> the file of the ensemble."""


def over(values: Mapping[Any, float], *models: Mapping[tuple, tuple]) -> Interval | None:
    """The mean of values over records and draws, with its interval; a key is record, number, and what is drawn.

    Args:
        values: Key -> value.
        models: Of a figure of the edited model, whose facts share it: the points' `Cell.models`. They are drawn then.
    """
    if any(models):
        return interval(list(values.values()), drawn(values, *models))
    return crossed(list(values.values()), [key[:2] for key in values], [key[2:] for key in values])


def _models(cells: Iterable[Cell], key: str) -> list[dict[tuple, tuple]]:
    """What `over` needs of the points of a metric."""
    return [cell.models for cell in cells] if key in BY_KEY and of_model(BY_KEY[key]) else []


def contrast(values: Mapping[Any, float], cells: Sequence[Cell], key: str) -> Interval | None:
    """`over` values that compare points in a metric; None where nothing is to be said.

    That is where a model is broken, for the others alone would be compared, or where there is but one edited model.
    """
    if any(cell.not_finite(key) for cell in cells):
        return None
    models = _models(cells, key)
    found = over(values, *models)
    return found if found is None or found.is_known or not any(models) else None


def differences(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> dict[Key, float]:
    """What the first has more than the second, over the records and seeds that both have.

    Draws are nested, and paired as far as both have them. Where one side has a single draw, each of the other is
    compared with it, and gives the key its draw: a difference belongs to one draw, whatever it was compared with.
    """
    one, other = ({key[3] for key in its} for its in (ours, theirs))
    if one == other or min(len(one), len(other)) > 1:
        return {key: value - theirs[key] for key, value in ours.items() if key in theirs}
    if len(other) > 1:
        return {key: -value for key, value in differences(theirs, ours).items()}
    single = {key[:3]: value for key, value in theirs.items()}
    return {key: value - single[key[:3]] for key, value in ours.items() if key[:3] in single}


def difference(ours: Cell, theirs: Cell, key: str) -> Interval | None:
    """The first point's metric minus the second's, paired, with its interval; None if no record has both."""
    return contrast(differences(ours.values(key), theirs.values(key)), [ours, theirs], key)


def mean_difference(ours: Sequence[Cell], theirs: Sequence[Cell], key: str) -> Interval | None:
    """The mean of some points minus that of others, over what all of them have."""
    return combine([*ours, *theirs], key, lambda its: fmean(its[: len(ours)]) - fmean(its[len(ours) :]))


def combine(cells: Sequence[Cell], key: str, function: Callable[[Sequence[float]], float]) -> Interval | None:
    """A function of a record's values at some points, averaged over the records that all of them have."""
    tables = [cell.values(key) for cell in cells]
    shared = [its for its in tables[0] if all(its in table for table in tables)] if tables else []
    return contrast({its: function([table[its] for table in tables]) for its in shared}, cells, key)


def enough(cells: Sequence[Cell]) -> list[Cell]:
    """The points of enough records; all, if fewer than two have them: what is said of them says so."""
    found = [cell for cell in cells if not cell.few]
    return found if len(found) > 1 else list(cells)


def slope(cells: Sequence[Cell], key: str) -> Interval | None:
    """How much a metric changes with every doubling of the value: least squares over the points, record by record.

    Points of too few records are left out, or they would take their records from all others.
    """
    cells = enough(cells)
    if len(cells) < 2:
        return None
    x = numpy.log2([float(cell.value) for cell in cells])
    x = x - x.mean()
    # From the first value on, or equal values would have a slope of rounding, which is told apart from 0.
    return combine(cells, key, lambda its: float((x * numpy.subtract(its, its[0])).sum() / (x * x).sum()))


def ensembles_of(results: StudyResults, curves: Curves) -> dict[int, list[NeuronEnsemble]]:
    """Number of facts -> the ensembles of its draws, of the study of facts; as far as their files are there."""
    loaded: dict[int, list[NeuronEnsemble]] = {}
    for cell in curves.of("facts"):
        draws = sorted({key[3] for key in cell.lines})
        labels = [Place(curves.method, "facts", draw, cell.value).label for draw in draws]
        files = [results.ensembles[curves.data, label] for label in labels if (curves.data, label) in results.ensembles]
        if files:
            loaded[int(cell.value)] = [NeuronEnsemble.load(file) for file in files]
    return loaded


def as_rows(results: StudyResults) -> list[dict[str, Any]]:
    """Every number as one row: the content of the CSV file, and of the JSON file.

    A category of a metric has a row of its own, ``METRIC/CATEGORY``, and so has a task of general ability,
    ``ability/TASK``.
    """
    rows: list[dict[str, Any]] = []
    for curves in results.curves:
        for cell in curves.cells.values():
            tables = {key: (cell.values(key), cell.mean(key)) for key in curves.keys}
            for key in curves.keys:
                named = cell.by_category(key)
                tables |= {f"{key}/{name}": (values, over(values)) for name, values in named.items()}
            tables |= {f"ability/{task}": (values, cell.ability[task]) for task, values in cell.scores.items()}
            rows += (
                {
                    "study": curves.study.name,
                    "data": curves.data,
                    "method": curves.method,
                    "series": cell.series,
                    "value": cell.value,
                    "draws": cell.draws,
                    "rows": cell.rows,
                    "parameter_share": cell.share,
                    "metric": name,
                    **(found.plain() if found else dict.fromkeys(("mean", "low", "high"))),
                    "records": len({key[:2] for key in values}),
                }
                for name, (values, found) in tables.items()
            )
    return rows
