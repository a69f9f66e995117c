"""The metrics, one table for every command, report and figure; and what is read from EasyEdit's results by it.

Standard library only, so that a table of results costs no import of torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from kne_easyedit._util.files import parse_json
from kne_easyedit._util.markdown import markdown_table
from kne_easyedit._util.means import mean_of, number_of

PERCENT, ENTROPY, PER_TOKEN, SECONDS, BYTES = "percent", "n-gram entropy x 100", "per token", "seconds", "bytes"
_SCALE = {PERCENT: 100, ENTROPY: 100, PER_TOKEN: 1, SECONDS: 1, BYTES: 1}


@dataclass(frozen=True)
class Metric:
    """One metric: what it means, where a result line has it, how records are averaged, and where it is shown."""

    key: str
    """Its name in summaries, in ``report.json`` and in the head of a column."""
    short: str
    """Its name in the tables of a report."""
    meaning: str
    """One sentence, without a full stop."""
    unit: str
    """`PERCENT`, `ENTROPY`, `SECONDS` or `BYTES`."""
    better: Literal["up", "down", "unedited"]
    """Whether more or less of it is better, or what is near the unedited model. Tables rank ``unedited`` as ``up``."""
    path: tuple[str, ...]
    """The keys that lead to it in a result line. Below ``metrics`` are EasyEdit's own: only those can be read from the
    results of its scripts, and only those are measured again on earlier facts of a sequence."""
    aggregate: Callable[[Sequence[float]], float] = fmean
    """How values of records become one value."""
    by_category: bool = False
    """``path`` leads to a section; a record's value is the mean over its categories, which a report shows, too."""
    quality: bool = True
    """A report compares the methods by it, with intervals. Others are costs."""
    optional: bool = False
    """Shown only if any record has it."""
    retained: bool = False
    """A run of ours measures it again on earlier facts of a sequence."""
    in_run_table: bool = True
    """Whether the table that `kne run` prints has it."""
    paper_column: int | None = None
    """Its place in the lists of ``benchmark/published.json``; None if the paper's tables lack it."""

    @property
    def label(self) -> str:
        """Its name in a text or a figure."""
        return self.key.replace("_", " ")

    @property
    def from_easyedit(self) -> bool:
        """Whether EasyEdit's evaluator gives it; otherwise a run of ours does."""
        return self.path[0] == "metrics"

    def value(self, line: Mapping) -> float | None:
        """The metric of one result line in its `unit`; None if the line does not have it."""
        return self.scaled(self.read(line))

    def summarize(self, lines: Iterable[Mapping]) -> float | None:
        """The metric of some result lines in its `unit`; None if no line has it."""
        return self.total(map(self.read, lines))

    def total(self, values: Iterable[float | None]) -> float | None:
        """The metric of some result lines in its `unit`, by what `read` gives of each; None if no line has it."""
        known = [value for value in values if value is not None]
        return self.scaled(self.aggregate(known)) if known else None

    def categories(self, line: Mapping) -> dict[str, float]:
        """Category -> its value in one result line, in the metric's `unit`. Empty for a metric without categories."""
        found = self._found(line) if self.by_category else None
        means = {name.removesuffix("_acc"): number_of(values) for name, values in categories_of(found)}
        return {name: _SCALE[self.unit] * value for name, value in means.items() if value is not None}

    def read(self, line: Mapping) -> float | None:
        """The metric of one result line as the line has it, not yet in its `unit`."""
        found = self._found(line)
        return mean_of(values for _, values in categories_of(found)) if self.by_category else number_of(found)

    def _found(self, line: Mapping) -> Any:
        first, *others = self.path
        found: Any = line.get(first)
        for key in others:
            found = (found or {}).get(key)
        return found

    def scaled(self, value: float | None) -> float | None:
        """What `read` gives, in the metric's `unit`."""
        return None if value is None else _SCALE[self.unit] * value


def _theirs(key: str, short: str, meaning: str, field: str, **traits: Any) -> Metric:
    """A share that EasyEdit's evaluator gives in this field."""
    return Metric(key, short, meaning, PERCENT, "up", ("metrics", "post", field), **traits)


def _ours(key: str, short: str, meaning: str, better: Literal["up", "down"] = "up", **traits: Any) -> Metric:
    """What runs of ours measure, in the field of its name, mostly a share; lines of earlier versions may lack it."""
    return Metric(key, short, meaning, better=better, path=(key,), **{"unit": PERCENT, "optional": True, **traits})


METRICS = (
    _theirs(
        "edit_success",
        "ES",
        "share of the new answer's tokens that the edited model predicts, the right ones before it given",
        "rewrite_acc",
        paper_column=0,
    ),
    _ours("exact_match", "EM", "share of records whose free greedy answer begins with the new answer", optional=False),
    _ours(
        "whole_answer", "WHOLE", "as exact_match, and there the text, the sentence or the line ends", in_run_table=False
    ),
    _theirs("rephrase", "REPH", "as edit_success, for the prompt in other words", "rephrase_acc", optional=True),
    _theirs(
        "portability",
        "PORT",
        "as edit_success, for what follows from the edit: aliases, reasoning, inverse relations",
        "portability",
        by_category=True,
        paper_column=1,
    ),
    _theirs(
        "locality",
        "LOC",
        "share of predicted tokens that the edit left as they were, on unrelated facts",
        "locality",
        by_category=True,
        paper_column=2,
    ),
    _ours(
        "neighbourhood",
        "NBH",
        "share of predicted tokens that the edit left as they were, on prompts of its relation about other subjects",
        retained=True,
    ),
    _ours(
        "neighbourhood_free",
        "NBH-F",
        "share of these prompts whose free answer keeps its first word",
        retained=True,
        in_run_table=False,
    ),
    _ours(
        "bleed",
        "BLEED",
        "share of these prompts whose free answer begins with the new answer, and did not before",
        "down",
        retained=True,
    ),
    _ours("bleed_forced", "BLEED-T", "as edit_success, for these prompts", "down", retained=True, in_run_table=False),
    _ours(
        "alias_beyond_bleed",
        "PORT-B",
        "share of prompts with an alias of the subject whose free answer begins with the new one, minus bleed",
    ),
    _ours(
        "alias_beyond_bleed_forced", "PORT-BT", "as edit_success, for an alias, minus bleed_forced", in_run_table=False
    ),
    _ours("denial", "DENY", "probability of denying the new fact, of that of denying or affirming it", "down"),
    Metric(
        "fluency",
        "FLU",
        "entropy of the 2- and 3-grams of free text (EasyEdit's ngram_entropy x 100); "
        "near the unedited model's is good",
        ENTROPY,
        "unedited",
        ("metrics", "post", "fluency", "ngram_entropy"),
        paper_column=3,
    ),
    _ours("perplexity", "PPL", "perplexity of a fixed text, the same for all", "down", unit=PER_TOKEN, retained=True),
    Metric(
        "seconds_per_edit",
        "SEC",
        "time to compute and write one edit, median; localisation, second moments and evaluation apart",
        SECONDS,
        "down",
        ("seconds",),
        median,  # a first edit warms up, a machine may pause: not the mean
        quality=False,
    ),
    Metric(
        "peak_bytes",
        "MEM",
        "peak memory of an edit above what was held before it, largest of the edits that were measured",
        BYTES,
        "down",
        ("peak_bytes",),
        max,
        quality=False,
        in_run_table=False,
    ),
)
"""All metrics, in the order of every table. A new one is one entry here."""


def qualities(*summaries: Mapping[str, Any]) -> list[Metric]:
    """The metrics by which methods are compared, an optional one only if one of the ``summaries`` has it."""
    return [metric for metric in METRICS if metric.quality and _is_shown(metric, summaries)]


def run_columns(*summaries: Mapping[str, Any]) -> list[Metric]:
    """The metrics in the table that `kne run` prints of these ``summaries``."""
    return [metric for metric in METRICS if metric.in_run_table and _is_shown(metric, summaries)]


def retention_metrics(*summaries: Mapping[str, Any]) -> list[Metric]:
    """Metrics that a sequence measures again on facts edited earlier; of EasyEdit's those that need no sampled text."""
    shown = qualities(*summaries)
    return [metric for metric in shown if metric.retained or (metric.from_easyedit and metric.unit == PERCENT)]


def own_metrics() -> list[Metric]:
    """The metrics that runs of ours measure, and EasyEdit does not."""
    return [metric for metric in METRICS if not metric.from_easyedit]


def paper_metrics() -> list[tuple[Metric, int]]:
    """The rows of the paper's tables: each metric with its place in the lists of ``published.json``."""
    return [(metric, metric.paper_column) for metric in METRICS if metric.paper_column is not None]


def _is_shown(metric: Metric, summaries: Iterable[Mapping[str, Any]]) -> bool:
    return not metric.optional or any(summary.get(metric.key) is not None for summary in summaries)


def summarize_metrics(metrics: Sequence[Mapping]) -> dict[str, float | int | None]:
    """The summary of EasyEdit's metrics of some records.

    As in EasyEdit's run_knowedit_llama2.py: a record's portability (locality) is the mean over its categories of the
    mean over a category's prompts. Only keys that end in ``_acc`` count: EasyEdit leaves token ids and descriptions of
    metrics beside them.

    Args:
        metrics: One mapping a record, with ``post`` (and maybe ``pre``), as EasyEdit's editors return it.

    Returns:
        Key of a `Metric` -> mean over the records that have it, in its unit (None if no record has it); and
        ``records``, their number.
    """
    lines = [{"metrics": record} for record in metrics]
    summary = {metric.key: metric.summarize(lines) for metric in METRICS if metric.from_easyedit}
    return {**summary, "records": len(lines)}


def read_results(path: str | Path) -> list[dict]:
    """The records of a results file of EasyEdit's scripts, or of `kne run`.

    Args:
        path: The JSON list that EasyEdit's scripts write (without methods), or the ``results.jsonl`` of `kne run`.

    Returns:
        One ``{"method": str | None, "metrics": {...}}`` a record.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: With what was found and what is expected, for any other file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results file {path} does not exist")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"no text ({error.reason})") from error
    try:
        found = parse_json(text)
    except ValueError:
        return _read_lines(path, text)
    if isinstance(found, list):
        return [_record(path, f"entry {i}", None, metrics) for i, metrics in enumerate(found)]
    return _read_lines(path, json.dumps(found))  # a results.jsonl of one line


def check_metrics(metrics: object) -> None:
    """Checks the metrics of one record: what any `Metric` reads of them are finite numbers, or lists of these.

    Args:
        metrics: A mapping with ``post`` (and maybe ``pre``). Fields that no metric reads may be anything.

    Raises:
        ValueError: Names the field that no metric can be read from.
    """
    if not isinstance(metrics, dict) or not isinstance(metrics.get("post"), dict):
        raise ValueError(f"metrics that are {_describe(metrics)}")
    for when in ("pre", "post"):
        found = metrics.get(when) or {}
        if not isinstance(found, dict):
            raise ValueError(f"metrics.{when} that is {_describe(found)}")
        for metric in METRICS:
            if metric.from_easyedit:
                _check_metric(metric, found, f"metrics.{when}")


def is_number(value: object) -> bool:
    """Whether it is a finite number, no larger than a float can be."""
    try:
        return math.isfinite(value) if type(value) is float else isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return False


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Summaries as a Markdown table.

    Args:
        rows: Label -> summary, of `summarize_metrics` or `benchmark.summarize`.

    Returns:
        One row a label. Of EasyEdit's metrics the optional ones have a column if any row has them; so have those that
        only runs of ours measure.
    """
    of_easyedit = [metric.key for metric in qualities(*rows.values()) if metric.from_easyedit]
    ours = [metric.key for metric in qualities(*rows.values()) if not metric.from_easyedit]
    extra = [key for key in ours if any(summary.get(key) is not None for summary in rows.values())]
    return markdown_table(rows, [*of_easyedit, *extra, "records"])


def _check_metric(metric: Metric, found: dict, where: str) -> None:
    """``found``: what is below ``metrics.post`` or ``metrics.pre`` (``where``)."""
    *sections, last = metric.path[2:]
    for section in [*sections, *([last] if metric.by_category else [])]:
        found, where = found.get(section) or {}, f"{where}.{section}"
        if not isinstance(found, dict):
            raise ValueError(f"{where} that is {_describe(found)}")
    fields = categories_of(found) if metric.by_category else [(last, found.get(last))]
    for name, values in fields:
        if not (type(values) is list and all(type(its) is float and math.isfinite(its) for its in values)):  # most are
            _require_numbers(values, f"{where}.{name}")


def _require_numbers(values: object, where: str, depth: int = 0) -> None:
    if isinstance(values, list) and depth < 4:
        for value in values:
            _require_numbers(value, where, depth + 1)
    elif values is not None and not is_number(values):
        how = " and not finite" if isinstance(values, Real) else ""
        raise ValueError(f"{where} that is {_describe(values)}{how}, expected numbers")


def _read_lines(path: Path, text: str) -> list[dict]:
    records: list[dict] = []
    # U+2028 and other separators of Unicode end no line.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        where = f"line {number}"
        try:
            found = parse_json(line)
        except ValueError as error:
            cause = (
                "; a run that was killed leaves an incomplete line, the same `kne run` resumes it" if records else ""
            )
            raise _unreadable(path, f"{where}: {error}{cause}") from error
        if not isinstance(found, dict) or not isinstance(found.get("method"), str) or "metrics" not in found:
            raise _unreadable(path, f"{where}: {_describe(found)}")
        records.append(_record(path, where, found["method"], found["metrics"]))
    if not records:
        raise _unreadable(path, "an empty file")
    return records


def _record(path: Path, where: str, method: str | None, metrics: object) -> dict:
    try:
        check_metrics(metrics)
    except ValueError as error:
        raise _unreadable(path, f"{where}: {error}") from error
    return {"method": method, "metrics": metrics}


def _unreadable(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{path}: found {found}; expected a JSON list of EasyEdit's metrics (each with 'post'), as its scripts write "
        f"it, or a results.jsonl of `kne run` (each line with 'method' and 'metrics')"
    )


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return f"a mapping of {', '.join(map(repr, list(value)[:4])) or 'nothing'}"
    return f"a {type(value).__name__}"


def categories_of(section: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """The entries of a section that are accuracies."""
    return [(name, values) for name, values in (section or {}).items() if name.endswith("_acc")]
