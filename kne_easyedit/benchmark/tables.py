"""The numbers of a report: means, intervals, and differences between KNE and other methods over the same records."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, cast

from kne_easyedit.benchmark.collect import Collection, records_of, seeds_of
from kne_easyedit.benchmark.general import NOTHING
from kne_easyedit.benchmark.intervals import Interval, interval, paired
from kne_easyedit.benchmark.labels import is_kne
from kne_easyedit.benchmark.remembered import MethodLines, of_lines
from kne_easyedit.benchmark.result_line import ResultLine, SharesBefore, shares_before
from kne_easyedit.benchmark.summary import scores, summarize, values
from kne_easyedit.metrics import Metric, qualities


def compared(found: Collection) -> list[Metric]:
    """The metrics by which a report compares methods: an optional one only if any of its lines has it."""
    return qualities(*map(summarize, found.cells))


def with_categories(metrics: Sequence[Metric]) -> list[Metric]:
    """Those of the metrics that are means over categories."""
    return [metric for metric in metrics if metric.by_category]


def figures(found: Collection) -> dict:
    """All numbers of a report, as ``report.json`` has them.

    Args:
        found: The result lines of the report.

    Returns:
        Data set -> method (or ``no edit``) -> its summary, number of records and seeds, means by category, intervals,
        and the lead of each KNE variant over it, by metric.
    """
    metrics = compared(found)
    result: dict = {}
    for data in found.data_sets:
        result[data] = {"no edit": summarize(unedited(found, data))}
        for method in found.methods:
            if lines := found.of(data, method):
                result[data][method] = {
                    **summarize(lines),
                    **({"ability": found_scores} if (found_scores := scores(lines, "ability")) else {}),
                    "records": records_of(lines),
                    "seeds": seeds_of(lines),
                    "categories": {
                        metric.key: {name: fmean(its) for name, its in categories(lines, metric).items()}
                        for metric in with_categories(metrics)
                    },
                    "intervals": {metric.key: _plain(mean(lines, metric)) for metric in metrics},
                    **({"not_finite": broken} if (broken := _all_not_finite(lines, metrics)) else {}),
                    "lead_of": {
                        ours: {metric.key: _plain(lead(found, data, ours, method, metric)) for metric in metrics}
                        for ours in rivals(found, data, method)
                    },
                }
    return result


@of_lines
def categories(lines: Sequence[Mapping], metric: Metric) -> dict[str, list[float]]:
    """Category of a metric -> its value in each line that has the category."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, value in metric.categories(line).items():
            found.setdefault(name, []).append(value)
    return found


@of_lines
def category_records(lines: Sequence[Mapping], metric: Metric) -> dict[str, int]:
    """Category of a metric -> number of records that have it."""
    found: dict[str, set[str]] = {}
    for line in lines:
        for name in metric.categories(line):
            found.setdefault(name, set()).add(line["record"])
    return {name: len(records) for name, records in found.items()}


def unedited(found: Collection, data: str) -> Sequence[Mapping]:
    """Lines of the model before any edit, over the records of all methods; without what compares with it."""
    return _unedited(found.of_data(data))


@of_lines
def _unedited(lines: Sequence[ResultLine]) -> MethodLines:
    found: dict[str, dict] = {}
    for line in lines:
        known = found.get(line["record"])
        if known is None:
            found[line["record"]] = _before_edit(line)
        elif _asks_more(line, known):  # runs of other settings ask other things of the same model
            more = _before_edit(line)
            known["metrics"]["post"] = more["metrics"]["post"] | known["metrics"]["post"]
            known |= {name: value for name, value in more.items() if known[name] is None}
    return MethodLines(cast(ResultLine, its) for its in found.values())


def _asks_more(line: ResultLine, known: Mapping[str, Any]) -> bool:
    """Whether a line may have something of the unedited model that is not known yet."""
    asked = {
        "exact_match": line["before"],
        "whole_answer": line["answer_before"] or line["whole_answer_before"],
        "bleed_forced": line["probes"] or line["neighbours"] or None,
        "denial": line["denial_before"],
        "perplexity": line["perplexity_before"],
    }
    new = any(value is not None and known[name] is None for name, value in asked.items())
    return new or not _measured(line).keys() <= known["metrics"]["post"].keys()


def _measured(line: ResultLine) -> dict[str, Any]:
    """EasyEdit's metrics before the edit, without sections that hold nothing."""
    return {name: its for name, its in (line["metrics"].get("pre") or {}).items() if its != {}}


def shares_before_edit(line: ResultLine) -> SharesBefore:
    """What a line has of the unedited model as shares, or, in lines of earlier versions, what its texts say."""
    if line["exact_match_before"] is None:
        return shares_before(line["target_new"] or "", line["before"], line["answer_before"], line["neighbours"])
    found: Mapping[str, Any] = line
    return cast(SharesBefore, {name: found[name] for name in SharesBefore.__annotations__})


def _before_edit(line: ResultLine) -> dict:
    """A line as it would be without the edit; what compares with the model before is left out."""
    return {
        "metrics": {"post": _measured(line)},
        **{name.removesuffix("_before"): share for name, share in shares_before_edit(line).items()},
        "denial": line["denial_before"],
        "perplexity": line["perplexity_before"],
    }


def baselines_mean(found: Collection, data: str, metric: Metric) -> float | None:
    """The mean of a metric over the methods that are not KNE; None for fewer than two. Broken ones have none."""
    baselines = [lines for method in found.methods if not is_kne(method) and (lines := found.of(data, method))]
    sound = [lines for lines in baselines if not not_finite_of(lines, metric)]
    means = [value for lines in sound if (value := summarize(lines)[metric.key]) is not None]
    return sum(means) / len(means) if len(means) > 1 else None


@of_lines
def per_record(lines: Sequence[Mapping], metric: Metric) -> dict[tuple, float]:
    """(record, its number, seed) -> the metric of the line, for every line that has it."""
    found = dict(zip(_keys(lines), map(metric.scaled, values(lines, metric))))
    return {key: value for key, value in found.items() if value is not None}


@of_lines
def _keys(lines: Sequence[Mapping]) -> list[tuple]:
    return [(line["record"], line["index"], line["seed"]) for line in lines]


def of_model(metric: Metric) -> bool:
    """Whether it is a figure of the edited model beside its facts: lines of one batch, or one sequence, share one."""
    return metric.key in NOTHING


def edited_models(lines: Mapping[tuple, Mapping]) -> dict[tuple, tuple]:
    """Which edited model a line is of, where several facts are in one: of a batch, or of a sequence at its end.

    Runs are other models only if their figures differ: a method that draws nothing makes the same under every seed.

    Args:
        lines: (record, its number, what tells runs apart: seed, draw) -> result line, with its ``mode``.

    Returns:
        The key of each line whose model has other facts, too -> number of the model, and its run.
    """
    runs: dict[tuple, list[tuple]] = {}
    for key, line in lines.items():
        if line["mode"] in ("batch", "sequential"):
            runs.setdefault(key[2:], []).append(key)
    found: dict[tuple, tuple] = {}
    known: dict[tuple, tuple] = {}
    for run, keys in runs.items():
        keys.sort(key=lambda key: key[1])  # a run edits its records by number, batch after batch
        first = lines[keys[0]]
        size = (first["batch_size"] if first["mode"] == "batch" else None) or len(keys)
        if first["mode"] == "sequential" or size > 1:
            for start in range(0, len(keys), size):
                its = keys[start : start + size]
                figures = repr([lines[its[0]].get(name) for name in NOTHING])
                model = known.setdefault((start, figures), (start // size, *run))
                found |= dict.fromkeys(its, model)
    return found


def drawn(keys: Iterable[tuple], *models: Mapping[tuple, tuple]) -> list[Hashable]:
    """What is drawn with replacement for each value: its record, or the edited model that it is of (`edited_models`).

    Args:
        keys: As those of `edited_models`.
        models: What `edited_models` returns for both sides of a comparison: the side with larger batches decides. A
            side of a single draw is compared with each draw of the other, whose keys it has not.
    """
    keys = list(keys)
    choices: list[list[Hashable]] = []
    for its in models:
        single = {key[:3]: model for key, model in its.items()}
        choices.append([its.get(key, single.get(key[:3], key[0])) for key in keys])
    return min(choices, key=lambda its: len(set(its)))


@of_lines
def _by_key(lines: Sequence[Mapping]) -> dict[tuple, Mapping]:
    return dict(zip(_keys(lines), lines))


@of_lines
def _models(lines: Sequence[Mapping], metric: Metric) -> dict[tuple, tuple]:
    return edited_models(_by_key(lines)) if of_model(metric) else {}


def is_not_finite(line: Mapping, metric: Metric) -> bool:
    """Whether a figure of the edited model was measured and is no finite number: the edit has broken the model."""
    return metric.read(line) is None and line.get(f"{metric.key}_before") is not None


def not_finite(lines: Mapping[tuple, Mapping], metric: Metric) -> str:
    """How many of the edited models have no finite value, in words; empty if all that were measured have one.

    Args:
        lines: As for `edited_models`.
        metric: Of other figures than those of the edited model nothing is said.
    """
    if not of_model(metric) or not any(is_not_finite(line, metric) for line in lines.values()):
        return ""
    models = edited_models(lines)
    broken = {models.get(key, key) for key, line in lines.items() if is_not_finite(line, metric)}
    sound = {models.get(key, key) for key, line in lines.items() if metric.read(line) is not None}
    return f"{len(broken)} of {len(broken | sound)} not finite"


@of_lines
def not_finite_of(lines: Sequence[Mapping], metric: Metric) -> str:
    """`not_finite` of one method's lines."""
    return not_finite(_by_key(lines), metric) if of_model(metric) else ""


def _all_not_finite(lines: Sequence[Mapping], metrics: Sequence[Metric]) -> dict[str, str]:
    return {metric.key: text for metric in metrics if (text := not_finite_of(lines, metric))}


@of_lines
def mean(lines: Sequence[Mapping], metric: Metric) -> Interval | None:
    """The mean of a metric over the records that have it, with its interval; None if there are none.

    Of a metric of the edited model (`of_model`) edited models are drawn, not records.
    """
    found = per_record(lines, metric)
    return interval(list(found.values()), drawn(found, _models(lines, metric)))


def rivals(found: Collection, data: str, method: str) -> list[str]:
    """KNE and its variants that have lines of this data set, the method itself apart."""
    return [ours for ours in found.methods if is_kne(ours) and ours != method and found.of(data, ours)]


def lead(found: Collection, data: str, ours: str, method: str, metric: Metric) -> Interval | None:
    """The metric of ``ours`` minus that of ``method``, over the records that both have; None if there are none.

    What is drawn is as in `mean`.
    """
    sides = [found.of(data, label) for label in (ours, method)]
    mine, theirs = (per_record(lines, metric) for lines in sides)
    both = [key for key in mine if key in theirs]
    of = dict(zip(both, drawn(both, *(_models(lines, metric) for lines in sides))))
    return paired(mine, theirs, of.__getitem__)


def _plain(value: Interval | None) -> dict | None:
    return None if value is None else value.plain()
