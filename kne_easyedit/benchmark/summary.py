"""The metrics of a method from the result lines of its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kne_easyedit.benchmark.remembered import of_lines
from kne_easyedit.metrics import own_metrics, retention_metrics, summarize_metrics


@of_lines
def summarize(lines: Sequence[Mapping]) -> dict[str, float | int | None]:
    """The summary of one method.

    Args:
        lines: Its result lines (`benchmark.result_line.ResultLine`).

    Returns:
        Key of a `kne_easyedit.metrics.Metric` -> its value over the lines, in its unit, or None if no line has it; and
        ``records``, the number of lines.
    """
    summary = summarize_metrics([line["metrics"] for line in lines])
    return summary | {metric.key: metric.summarize(lines) for metric in own_metrics()}


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
