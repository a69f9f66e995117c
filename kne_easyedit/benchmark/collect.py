"""Result lines of any number of runs and shards, merged without loss; lines of different settings are never mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from kne_easyedit._util.digest import digest
from kne_easyedit.benchmark.axes import renamed, sweeps
from kne_easyedit.benchmark.general import NOTHING
from kne_easyedit.benchmark.labels import data_name, data_set_order, method_order
from kne_easyedit.benchmark.remembered import MethodLines
from kne_easyedit.benchmark.report_line import Texts, report_line
from kne_easyedit.benchmark.result_line import ResultLine, RetentionLine, parse_result, parse_retention
from kne_easyedit.benchmark.sources import Source, sources
from kne_easyedit.benchmark.store import read_lines

Line = TypeVar("Line")
_NONE = MethodLines()
_UNASKED = {f"{name}_before": None for name in NOTHING}
"""Put over the lines of a sequence that nobody has asked again: without a figure after, none before is compared."""


@dataclass(frozen=True)
class Collection:
    """What a report is made of."""

    lines: tuple[ResultLine, ...]
    """One for each data set, method, seed and record; ``data`` is the data set's name. `collect` keeps what reports
    need of them (`report_line.ReportLine`)."""
    manifests: tuple[dict, ...]
    """Of the runs (`sources.Source`), with the labels that methods have here."""

    @cached_property
    def axes(self) -> Mapping[str, str]:
        """Name of a curve that was found by its jobs' settings (`axes.sweeps`) -> what was swept, in words."""
        return {curve: axis for manifest in self.manifests for curve, axis in manifest.get("curves", {}).items()}

    def of(self, data: str, method: str) -> MethodLines:
        """The lines of one method on one data set."""
        return self._cells.get((data, method), _NONE)

    @cached_property
    def _cells(self) -> dict[tuple[str | None, str], MethodLines]:
        cells: dict[tuple[str | None, str], list[ResultLine]] = {}
        for line in self.lines:
            cells.setdefault((line["data"], line["method"]), []).append(line)
        return {cell: MethodLines(lines) for cell, lines in cells.items()}

    @property
    def cells(self) -> Iterable[MethodLines]:
        """The lines of each method on each data set that it has lines of."""
        return self._cells.values()

    def of_data(self, data: str) -> MethodLines:
        """The lines of all methods on one data set."""
        return self._of_data.get(data, _NONE)

    @cached_property
    def _of_data(self) -> dict[str | None, MethodLines]:
        found: dict[str | None, list[ResultLine]] = {}
        for line in self.lines:
            found.setdefault(line["data"], []).append(line)
        return {data: MethodLines(lines) for data, lines in found.items()}

    def first_records(self, data: str, field: str, number: int) -> list[dict[str, ResultLine]]:
        """The lines of the first records of a data set that have an answer in a field, or answers; by their method."""
        records: dict[str, dict[str, ResultLine]] = {}
        for line in self.of_data(data):
            answers: Any = line.get(field)
            if (answers or answers == "") and (line["record"] in records or len(records) < number):
                records.setdefault(line["record"], {}).setdefault(line["method"], line)
        return [{method: its[method] for method in self.methods if method in its} for its in records.values()]

    @cached_property
    def data_sets(self) -> list[str]:
        """In the paper's order, others behind."""
        return sorted({line["data"] or "" for line in self.lines}, key=data_set_order)

    @cached_property
    def methods(self) -> list[str]:
        """Baselines in the paper's order, KNE and its variants last."""
        return sorted({line["method"] for line in self.lines}, key=method_order)


def collect(paths: Iterable[str | Path]) -> Collection:
    """The result lines of any number of runs and shards, with the manifests beside them.

    Jobs of one label that differ in settings of `axes.AXES` alone get labels of their own, ``LABEL@VALUE``.

    Args:
        paths: Results files, folders of reports, and other folders, which are searched for ``results.jsonl``
            (`sources.sources`).

    Returns:
        The lines; a record that several files hold counts once.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If there are no lines, for a file that is not what it should be (with its line), or if a method's
            lines of one data set were made under different settings, the seed apart, or if two different records have
            the same number of one data set.
    """
    paths = list(paths)
    texts = Texts()
    found = sources(map(Path, paths), texts.within)
    _require_one_model(found)
    jobs = [(source.file, its) for source in found if not source.of_report for its in source.manifests]
    swept = sweeps((data_name(Path(its["data"]["name"]).stem), its) for _, its in jobs)
    points = {
        file: {label: sweep.point(its) for label, sweep in swept.items() if label in its["methods"]}
        for file, its in jobs
    }
    merged: dict[tuple, ResultLine] = {}
    known: dict[tuple, tuple[object, Path]] = {}
    records: dict[tuple, tuple[str, Path]] = {}
    for source in found:
        file = source.file
        at_end = {} if source.of_report else _at_end(file.with_name("retention.jsonl"))
        for number, raw in read_lines(file):
            whole = _parsed(parse_result, raw, file, number)
            if not source.of_report:  # whose lines have the figures of a sequence's end already
                _require_of_manifest(whole, source, number)
                unasked = _UNASKED if whole["mode"] == "sequential" else None
                if last := at_end.get((whole["method"], whole["index"]), unasked):
                    whole = cast(ResultLine, {**whole, **last})
            label = points.get(file, {}).get(whole["method"], whole["method"])
            line = report_line(whole, texts, data=data_name(whole["data"] or ""), method=label)
            _require_same_record(records, line, file)
            group, seed = (line["data"], line["method"]), line["seed"]
            _require_same(known, (*group, "mode"), line["mode"], file)
            _require_same(known, (*group, "fingerprint", seed), line["fingerprint"], file)
            if line["settings"] is not None:  # without them, lines of different seeds are compared by their mode only
                _require_same(known, (*group, "settings"), line["settings"], file)
            merged[(*group, seed, line["index"], line["record"])] = line
    if not merged:
        raise ValueError(f"results: there are none in {', '.join(map(str, paths))}")
    manifests = [renamed(its, points.get(source.file, {}), swept) for source in found for its in source.manifests]
    once = {digest(its): its for its in manifests}  # a report that has grown has those of the runs, too
    return Collection(tuple(sorted(merged.values(), key=lambda line: line["index"])), tuple(once.values()))


def records_of(lines: Iterable[Mapping]) -> int:
    """How many records the lines are of: one edited under three seeds is one."""
    return len({line["record"] for line in lines})


def seeds_of(lines: Iterable[Mapping]) -> int:
    """Under how many seeds the lines were made."""
    return len({line["seed"] for line in lines})


def retained_lines(file: Path) -> Iterator[RetentionLine]:
    """The lines of a ``retention.jsonl``; none if there is no such file.

    Raises:
        ValueError: With the file and the line, for a line that is not what it should be.
    """
    return (_parsed(parse_retention, line, file, number) for number, line in read_lines(file))


def _parsed(parse: Callable[[Mapping[str, Any]], Line], line: Mapping[str, Any], file: Path, number: int) -> Line:
    try:
        return parse(line)
    except ValueError as error:
        raise ValueError(f"{file}: line {number}: {error}") from error


def _at_end(file: Path) -> dict[tuple, dict]:
    """Method and number of a record -> what the model could do beside its facts, after the last edit of a sequence:
    None what was not finite then, whatever it was before.
    """
    found: dict[tuple, tuple[int, dict]] = {}
    for line in retained_lines(file):
        key, after = (line["method"], line["index"]), line["after"]
        if after >= found.get(key, (0, {}))[0]:
            found[key] = after, {name: line[name] for name in NOTHING}  # type: ignore[literal-required]
    return {key: general for key, (_, general) in found.items()}


def _require_one_model(found: Iterable[Source]) -> None:
    """Methods are compared on one model: by differences, and with one row of the unedited model."""
    known: dict[str, tuple[Mapping, Path]] = {}
    for source in found:
        for manifest in source.manifests:
            data, model = data_name(Path(manifest["data"]["name"]).stem), manifest["model"]
            first, where = known.setdefault(data, (model, source.file))
            if first["sha256"] != model["sha256"]:
                shown = " and ".join(f"{its['name']} (sha256 {its['sha256'][:12]})" for its in (first, model))
                raise ValueError(
                    f"{where} and {source.file}: edits of two models on {data}, {shown}; report each model apart"
                )


def _require_of_manifest(line: ResultLine, source: Source, number: int) -> None:
    """A run that ends between its manifest and its first edit leaves the lines of the run before beside it."""
    for manifest in source.manifests:
        expected = manifest["fingerprints"].get(line["method"], line["fingerprint"])
        if expected != line["fingerprint"]:
            raise ValueError(
                f"{source.file}: line {number}: {line['method']} was run under other settings (fingerprint "
                f"{line['fingerprint']}) than manifest.json beside it says ({expected}): the run that it is of was "
                f"stopped; give its command again, which moves the lines of other settings aside"
            )


def _require_same_record(known: dict, line: ResultLine, file: Path) -> None:
    """A number of a data set is one record: data sets go by the names of their files, and two may share a name."""
    # In a chat template, which is the model's, prompts are others, and so are digests.
    first, where = known.setdefault((line["data"], line["index"], line["chat_template"]), (line["record"], file))
    if first != line["record"] and line["data"]:  # lines of early versions name no data set
        raise ValueError(
            f"{where} and {file}: record {line['index']} of {line['data']} is another in each: they are of two data "
            f"files of one name, or of two versions of one; report them apart, or give the files names of their own"
        )


def _require_same(known: dict, what: tuple, value: object, file: Path) -> None:
    first, where = known.setdefault(what, (value, file))
    if first != value:
        data, method, kind, *_ = what
        how = f"in different modes ({first} and {value})" if kind == "mode" else "under different settings"
        raise ValueError(
            f"{where} and {file}: {method} on {data} {how}; "
            f"report them apart, or give each a label of its own (method.label)"
        )
