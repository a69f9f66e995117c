"""The metrics of a method from the result lines of its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from kne_easyedit.benchmark.remembered import of_lines
from kne_easyedit.metrics import Metric, easyedit_metrics, own_metrics, retention_metrics


@of_lines
def summarize(lines: Sequence[Mapping]) -> dict[str, float | int | None]:
    """The summary of one method.

    Args:
        lines: Its result lines (`benchmark.result_line.ResultLine`).

    Returns:
        Key of a `kne_easyedit.metrics.Metric` -> its value over the lines, in its unit, or None if no line has it; and
        ``records``, the number of lines.
    """
    of_easyedit = {metric.key: metric.total(values(lines, metric)) for metric in easyedit_metrics()}
    ours = {metric.key: metric.total(values(lines, metric)) for metric in own_metrics()}
    return {**of_easyedit, "records": len(lines), **ours}


@of_lines
def values(lines: Sequence[Mapping], metric: Metric) -> list[float | None]:
    """What `Metric.read` gives of each line."""
    return [metric.read(line) for line in lines]


def retention(lines: Sequence[Mapping]) -> list[dict]:
    """The summary of a sequence's facts that were evaluated again.

    Args:
        lines: The retention lines of one method (`benchmark.result_line.RetentionLine`).

    Returns:
        One entry for each number of edits (``edits``) after which facts were evaluated, in ascending order.
    """
    counts = sorted({line["after"] for line in lines})
    found = {count: summarize([line for line in lines if line["after"] == count]) for count in counts}
    names = [*(metric.key for metric in retention_metrics(*found.values())), "records"]
    return [{"edits": count, **{name: summary[name] for name in names}} for count, summary in found.items()]


def general_summary(results: Sequence[Mapping], retained: Sequence[Mapping]) -> dict[str, Any]:
    """What a method leaves of what the model could do before: of the edits, or of a sequence at its end.

    Args:
        results: Its result lines.
        retained: Its retention lines; none in other modes.

    Returns:
        ``perplexity_before``, ``perplexity`` (None if it was not finite for one of them), ``perplexity_not_finite``
        (how many), ``ability_before`` and ``ability`` (`scores`).
    """
    last = max((line["after"] for line in retained), default=None)
    after = [line for line in retained if line["after"] == last] if retained else results
    found = [
        [its for line in lines if (its := line.get(name)) is not None]
        for lines, name in ((results, "perplexity_before"), (after, "perplexity"))
    ]
    before, now = (fmean(values) if values else None for values in found)
    broken = 0 if before is None else len(after) - len(found[1])
    return {
        "perplexity_before": before,
        "perplexity": None if broken else now,
        "perplexity_not_finite": broken,
        "ability_before": scores(results, "ability_before"),
        "ability": scores(after, "ability"),
    }


def scores(lines: Sequence[Mapping], field: str) -> dict[str, float]:
    """Task and metric -> mean score over the lines that have one.

    Args:
        lines: Result or retention lines.
        field: ``ability`` or ``ability_before``.
    """
    found: dict[str, list[float]] = {}
    for line in lines:
        for task, score in (line.get(field) or {}).items():
            found.setdefault(task, []).append(score["value"])
    return {task: fmean(values) for task, values in found.items()}
