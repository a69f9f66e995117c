"""Reads the curves of studies from the results of any number of jobs, and what stands beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from kne_easyedit.benchmark.collect import Collection, collect, retained_lines
from kne_easyedit.benchmark.labels import data_name
from kne_easyedit.benchmark.sources import RECORDS, results_of
from kne_easyedit.benchmark.store import read_lines
from kne_easyedit.benchmark.summary import scores
from kne_easyedit.benchmark.tables import unedited
from kne_easyedit.metrics import METRICS
from kne_easyedit.models.targets import role_of
from kne_easyedit.studies.definitions import STUDIES, THIRDS, Place, Study, place_of
from kne_easyedit.studies.numbers import Cell, Curves, Key, StudyResults

ROLES = (
    "query",
    "key",
    "value",
    "query, key, value",
    "attention output",
    "gate",
    "gate and input",
    "MLP input",
    "MLP output",
)
"""Roles of modules in the order of a decoder layer."""
LARGEST = 10**9
"""Upper bound of a value of an axis."""


def read_studies(paths: Iterable[str | Path]) -> StudyResults:
    """The curves in the results of any number of jobs.

    Args:
        paths: As for `collect.collect`.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: As `collect.collect`; for a report, which lacks what stands beside runs; or if no label is that of a
            study's point.
    """
    given = [Path(path) for path in paths]
    files = list(dict.fromkeys(file for path in given for file in results_of(path)))
    for file in files:
        if file.name == RECORDS:
            raise ValueError(
                f"{file}: a report has neither a sequence's facts asked again nor ensembles; "
                f"give the folders of the study's runs"
            )
    found = collect(files)
    labels = {label: place for label in found.methods if (place := place_of(label))}
    if not labels:
        raise ValueError(
            f"results: no label in {', '.join(map(str, given))} is that of a study's point (SERIES@VALUE, as "
            f"`kne study` writes them); without --study the report takes any labels"
        )
    retained, ensembles = _beside(files)
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
        for where in _ordered(study, groups[name, data, method]):
            members = groups[name, data, method][where]
            cells[where] = _cell(found, data, members, retained, described, modules)
        if study.named:
            cells = dict(sorted(cells.items(), key=lambda its: _place_of_name(study, its[1])))
        own = _only(found, _labels(groups[name, data, method]))
        before = {
            metric.key: value
            for metric in METRICS
            if metric.key in ("edit_success", "portability", "fluency", "perplexity")
            and (value := metric.summarize(unedited(own, data))) is not None
        }
        curves.append(Curves(study, data, method, cells, before, scores(own.of_data(data), "ability_before")))
        if not curves[-1].keys:
            raise ValueError(f"results: of {method} on {data} nothing was measured that the study {name} shows")
    return StudyResults(found, tuple(curves), ensembles)


def _labels(group: Mapping[tuple[str, str], Sequence[tuple[Place, str]]]) -> set[str]:
    """The labels of a group of points."""
    return {label for members in group.values() for _, label in members}


def _only(found: Collection, labels: set[str]) -> Collection:
    return Collection(tuple(line for line in found.lines if line["method"] in labels), found.manifests)


def _ordered(study: Study, points: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """By series, then by value: numbers by size; names are sorted where their roles are known."""
    series = list(study.series)
    points = list(points)
    if study.named:
        return sorted(points, key=lambda its: series.index(its[0]))
    return sorted(points, key=lambda its: (series.index(its[0]), _number(study, its[1])))


def _place_of_name(study: Study, cell: Cell) -> tuple:
    """Sorting key of modules and thirds: by series, then in the order of a decoder layer, others behind."""
    order = THIRDS if cell.series == "depth" else ROLES
    name = cell.value if cell.series == "depth" else cell.role
    return [*study.series].index(cell.series), order.index(name) if name in order else len(order), cell.value


def _number(study: Study, value: str) -> float:
    """The value of a point as a number. Raises ValueError, for a label that is none of this study."""
    try:
        number = float(value)
        sound = 0 < number < LARGEST and (study.name == "share" or value.isdecimal())
    except ValueError:
        number, sound = 0.0, False
    if not sound:
        raise ValueError(f"method.label: {value[:40]!r} behind @ is no value of the study {study.name}")
    return number


def _beside(files: Sequence[Path]) -> tuple[dict[tuple[str, str, object], list[Mapping]], dict[tuple[str, str], Path]]:
    """What stands beside the result lines: lines of sequences' facts asked again, and files of ensembles."""
    retained: dict[tuple[str, str, object], list[Mapping]] = {}
    ensembles: dict[tuple[str, str], Path] = {}
    for file in files:
        folder = file.parent
        lines = [line for _, line in read_lines(file)]
        own = {(data_name(str(line.get("data") or "")), str(line["method"]), line.get("seed")) for line in lines}
        again = list(retained_lines(folder / "retention.jsonl"))
        for data, method, seed in own:
            retained.setdefault((data, method, seed), []).extend(its for its in again if its["method"] == method)
            if (members := folder / f"ensemble-{method}.json").is_file():
                ensembles.setdefault((data, method), members)
    return retained, ensembles


def _cell(
    found: Collection,
    data: str,
    members: Sequence[tuple[Place, str]],
    retained: Mapping[tuple[str, str, object], Sequence[Mapping]],
    described: Mapping[tuple[str, str], Mapping],
    modules: Mapping[str, Any],
) -> Cell:
    lines: dict[Key, Mapping[str, Any]] = {}
    for place, label in members:
        own = found.of(data, label)
        if place.series == "sequence":  # records that could not be edited make it shorter than its value says
            at_end = {
                (seed, line["index"]): line
                for seed, edits in Counter(its["seed"] for its in own).items()
                for line in retained.get((data, label, seed), ())
                if line.get("after") == edits
            }
            for its in own:
                if again := at_end.get((its["seed"], its["index"])):
                    lines[its["record"], its["index"], its["seed"], place.draw] = {
                        **again,
                        **{name: its[name] for name in ("seconds", "perplexity_before")},
                        "mode": "sequential",
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
