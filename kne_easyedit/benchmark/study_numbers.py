"""The numbers of a study's report: each point over records and draws, and what is between two points."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy

from kne_easyedit.benchmark.collect import Collection, collect
from kne_easyedit.benchmark.intervals import Interval, crossed
from kne_easyedit.benchmark.labels import data_name
from kne_easyedit.benchmark.store import read_lines
from kne_easyedit.benchmark.studies import STUDIES, Place, Study, place_of
from kne_easyedit.benchmark.tables import unedited
from kne_easyedit.metrics import METRICS, Metric

KEYS = (
    "edit_success",
    "exact_match",
    "portability",
    "locality",
    "neighbourhood",
    "bleed",
    "fluency",
    "seconds_per_edit",
)
"""The metrics of a study, in the order of panels; those that were measured are shown."""
OVERALL = "overall"
"""Key of what the paper's claims call overall: a record's mean of edit success, portability and locality."""
_OVERALL = ("edit_success", "portability", "locality")
FEW = 20
"""A point of fewer records is drawn hollow, and named."""
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
        """Whether these are too few."""
        return self.records < FEW

    def values(self, key: str) -> dict[Key, float]:
        """The metric of each line that has it, in its unit."""
        if key == OVERALL:
            parts = [self.values(each) for each in _OVERALL]
            shared = [its for its in parts[0] if all(its in part for part in parts)]
            return {its: fmean(part[its] for part in parts) for its in shared}
        metric = BY_KEY[key]
        return {its: value for its, line in self.lines.items() if (value := metric.value(line)) is not None}

    def mean(self, key: str) -> Interval | None:
        """The mean over records and draws with its interval; of seconds the median without one. None without values."""
        values = self.values(key)
        if key == "seconds_per_edit" and values:
            middle = median(values.values())
            return Interval(middle, middle, middle, self.records)
        return over(values)


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


def read_studies(paths: Iterable[str | Path]) -> StudyResults:
    """The curves in the results of any number of jobs.

    Args:
        paths: As for `collect.collect`.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: As `collect.collect`; or if no label is that of a study's point.
    """
    paths = [Path(path) for path in paths]
    found = collect(paths)
    labels = {label: place for label in found.methods if (place := place_of(label))}
    if not labels:
        raise ValueError(
            f"results: no label in {', '.join(map(str, paths))} is that of a study's point (SERIES@VALUE, as "
            f"`kne study` writes them); without --study the report takes any labels"
        )
    retained, ensembles = _beside(paths)
    described = {
        (data_name(Path(manifest["data"]["name"]).stem), method): its
        for manifest in found.manifests
        for method, its in manifest["localization"].items()
    }
    modules = {
        method: settings.get("target_modules")
        for manifest in found.manifests
        for method, settings in manifest["methods"].items()
    }
    groups: dict[tuple[str, str, str], dict[tuple[str, str], list[tuple[Place, str]]]] = {}
    for data in found.data_sets:
        for label, place in labels.items():
            if found.of(data, label):
                of = groups.setdefault((place.study.name, data, place.method), {})
                of.setdefault((place.series, place.value), []).append((place, label))
    order = list(STUDIES)
    curves = []
    for name, data, method in sorted(groups, key=lambda its: (order.index(its[0]), found.data_sets.index(its[1]), its)):
        study = STUDIES[name]
        cells = {}
        for place in _ordered(study, groups[name, data, method]):
            members = groups[name, data, method][place]
            cells[place] = _cell(found, data, members, retained, described, modules)
        before = {
            metric.key: value
            for metric in METRICS
            if metric.key in ("edit_success", "portability", "fluency")
            and (value := metric.summarize(unedited(_only(found, members_of(groups[name, data, method])), data)))
            is not None
        }
        curves.append(Curves(study, data, method, cells, before))
    return StudyResults(found, tuple(curves), ensembles)


def members_of(group: Mapping[tuple[str, str], Sequence[tuple[Place, str]]]) -> set[str]:
    """The labels of a group of points."""
    return {label for members in group.values() for _, label in members}


def _only(found: Collection, labels: set[str]) -> Collection:
    return Collection(tuple(line for line in found.lines if line["method"] in labels), found.manifests)


def _ordered(study: Study, points: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """By series, then by value: numbers by size, names as they were run."""
    series = list(study.series)
    points = list(points)
    if study.named:
        return sorted(points, key=lambda its: series.index(its[0]))
    return sorted(points, key=lambda its: (series.index(its[0]), _number(its[1])))


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"method.label: {value!r} behind @ is no number; a study over numbers needs one") from error


def _beside(paths: Sequence[Path]) -> tuple[dict[tuple[str, str, object], list[dict]], dict[tuple[str, str], Path]]:
    """What stands beside the result lines: lines of sequences' facts asked again, and files of ensembles."""
    retained: dict[tuple[str, str, object], list[dict]] = {}
    ensembles: dict[tuple[str, str], Path] = {}
    folders = [
        file.parent for path in paths for file in (sorted(path.rglob("results.jsonl")) if path.is_dir() else [path])
    ]
    for folder in folders:
        lines = [line for _, line in read_lines(folder / "results.jsonl")]
        own = {(data_name(str(line.get("data") or "")), str(line["method"]), line.get("seed")) for line in lines}
        again = [line for _, line in read_lines(folder / "retention.jsonl")]
        for data, method, seed in own:
            retained.setdefault((data, method, seed), []).extend(its for its in again if its.get("method") == method)
            if (file := folder / f"ensemble-{method}.json").is_file():
                ensembles.setdefault((data, method), file)
    return retained, ensembles


def _cell(
    found: Collection,
    data: str,
    members: Sequence[tuple[Place, str]],
    retained: Mapping[tuple[str, str, object], Sequence[Mapping]],
    described: Mapping[tuple[str, str], Mapping],
    modules: Mapping[str, Any],
) -> Cell:
    from kne_easyedit.models.targets import role_of

    lines: dict[Key, Mapping[str, Any]] = {}
    for place, label in members:
        own = found.of(data, label)
        if place.series == "sequence":
            at_end = {
                (seed, line["index"]): line
                for seed in {its["seed"] for its in own}
                for line in retained.get((data, label, seed), ())
                if line.get("after") == int(_number(place.value))
            }
            for its in own:
                if again := at_end.get((its["seed"], its["index"])):
                    lines[its["record"], its["index"], its["seed"], place.draw] = {
                        **again,
                        "seconds": its["seconds"],
                    }
        else:
            lines |= {(its["record"], its["index"], its["seed"], place.draw): its for its in own}
    place, label = members[0]
    of = [described[data, its] for _, its in members if (data, its) in described]
    rows = [its["neurons"] for its in of if isinstance(its.get("neurons"), int)]
    shares = [its["parameter_share"] for its in of if isinstance(its.get("parameter_share"), float)]
    named = modules.get(label)
    role = role_of(str(named[0])) if place.study.named and isinstance(named, list) and len(named) == 1 else None
    return Cell(
        place.series, place.value, lines, fmean(rows) if rows else None, fmean(shares) if shares else None, role
    )


def over(values: Mapping[Any, float]) -> Interval | None:
    """The mean of values over records and draws, with its interval; a key is record, number, and what is drawn."""
    return crossed(list(values.values()), [key[:2] for key in values], [key[2:] for key in values])


def differences(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> dict[tuple, float]:
    """What the first has more than the second, over the records and seeds that both have.

    Draws are paired where both have the same ones; else each draw of the one is compared with each of the other.
    """
    if {key[3] for key in ours} == {key[3] for key in theirs}:
        return {key: value - theirs[key] for key, value in ours.items() if key in theirs}
    by_record: dict[tuple, list[tuple[int, float]]] = {}
    for key, value in theirs.items():
        by_record.setdefault(key[:3], []).append((key[3], value))
    return {(*key, draw): value - other for key, value in ours.items() for draw, other in by_record.get(key[:3], ())}


def difference(ours: Cell, theirs: Cell, key: str) -> Interval | None:
    """The first point's metric minus the second's, paired, with its interval; None if no record has both."""
    return over(differences(ours.values(key), theirs.values(key)))


def mean_difference(ours: Sequence[Cell], theirs: Sequence[Cell], key: str) -> Interval | None:
    """The mean of some points minus that of others, over what all of them have."""
    return combine([*ours, *theirs], key, lambda its: fmean(its[: len(ours)]) - fmean(its[len(ours) :]))


def combine(cells: Sequence[Cell], key: str, function: Callable[[Sequence[float]], float]) -> Interval | None:
    """A function of a record's values at some points, averaged over the records that all of them have."""
    tables = [cell.values(key) for cell in cells]
    shared = [its for its in tables[0] if all(its in table for table in tables)] if tables else []
    return over({its: function([table[its] for table in tables]) for its in shared})


def slope(cells: Sequence[Cell], key: str) -> Interval | None:
    """How much a metric changes with every doubling of the value: least squares over the points, record by record."""
    if len(cells) < 2:
        return None
    x = numpy.log2([float(cell.value) for cell in cells])
    x = x - x.mean()
    return combine(cells, key, lambda its: float((x * its).sum() / (x * x).sum()))


def overlaps(results: StudyResults, curves: Curves) -> list[dict[str, Any]]:
    """How alike the ensembles of the study of facts are: with that of the most facts, and of draws with each other.

    Returns:
        By number of facts: ``facts``, ``rows`` (mean), ``with_most``, ``between_draws`` and ``by_chance`` (Dice
        coefficients in [0, 1], means over draws and pairs), None where there is nothing to compare.
    """
    from kne_easyedit.localization.ensemble import NeuronEnsemble

    loaded: dict[str, list[NeuronEnsemble]] = {}
    for cell in curves.of("facts"):
        draws = sorted({key[3] for key in cell.lines})
        labels = [Place(curves.method, "facts", draw, cell.value).label for draw in draws]
        files = [results.ensembles[curves.data, label] for label in labels if (curves.data, label) in results.ensembles]
        if files:
            loaded[cell.value] = [NeuronEnsemble.load(file) for file in files]
    if not loaded:
        return []
    most = list(loaded)[-1]
    found = []
    for value, own in loaded.items():
        pairs = [(one, other) for i, one in enumerate(own) for other in own[:i]]
        width = sum(own[0].widths.values()) * max(1, len(own[0].layers))
        found.append(
            {
                "facts": int(value),
                "rows": fmean(each.size for each in own),
                "with_most": None
                if value == most
                else fmean(each.overlap(other) for each in own for other in loaded[most]),
                "between_draws": fmean(one.overlap(other) for one, other in pairs) if pairs else None,
                "by_chance": fmean(each.size for each in own) / width,
            }
        )
    return found


def as_rows(results: StudyResults) -> list[dict[str, Any]]:
    """Every number as one row: the content of the CSV file, and of the JSON file."""
    rows = []
    for curves in results.curves:
        for cell in curves.cells.values():
            for key in curves.keys:
                found = cell.mean(key)
                rows.append(
                    {
                        "study": curves.study.name,
                        "data": curves.data,
                        "method": curves.method,
                        "series": cell.series,
                        "value": cell.value,
                        "draws": cell.draws,
                        "rows": cell.rows,
                        "parameter_share": cell.share,
                        "metric": key,
                        **(asdict(found) if found else dict.fromkeys(("mean", "low", "high"))),
                        "records": found.records if found else 0,
                    }
                )
    return json.loads(json.dumps(rows))
