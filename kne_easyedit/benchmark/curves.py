"""Curves: how far a method goes (its steps, rate or weight) swept, and where a point of one method dominates another's.

A label ``NAME@VALUE`` is a point of the curve NAME. Methods trade success, portability, locality and neighbours against
each other by how far they go: two points say little about two methods, two curves do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kne_easyedit._util.markdown import literal, table_of_rows
from kne_easyedit._util.plotting import name_above, new_figure
from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.intervals import FEW, Interval
from kne_easyedit.benchmark.labels import POINT, curve_of
from kne_easyedit.benchmark.summary import summarize
from kne_easyedit.benchmark.tables import compared, lead
from kne_easyedit.metrics import Metric

TRADED = ("exact_match", "portability", "locality", "neighbourhood", "bleed", "alias_beyond_bleed")
"""Metrics that methods trade against each other; those that a comparison has are looked at."""
PAIRS = (("portability", "locality"), ("exact_match", "neighbourhood"), ("alias_beyond_bleed", "neighbourhood"))
"""Pairs of metrics that curves are drawn in."""


@dataclass(frozen=True)
class Domination:
    """One point that is nowhere worse than a point of another curve, and somewhere surely better."""

    data: str
    better: str
    worse: str
    differences: dict[str, Interval]
    """Metric -> the better point's minus the worse one's, over the records that both have."""


def curves(methods: Sequence[str]) -> dict[str, list[str]]:
    """Name of each curve -> the labels of its points, by value; a single point is no curve.

    Args:
        methods: Labels.
    """
    found: dict[str, list[str]] = {}
    for label in methods:
        if POINT in label:
            found.setdefault(curve_of(label), []).append(label)
    return {name: sorted(labels, key=_value) for name, labels in found.items() if len(labels) > 1}


def dominations(found: Collection) -> list[Domination]:
    """Every pair of points of two curves of which one dominates the other.

    A point dominates another if its mean is at least as good in every metric of `TRADED`, over the records that both
    have, and the 95 % interval of the difference leaves out 0 in at least one, over records that are not too few.
    A metric that one of the two has and the other lacks may be the one that is worse: then neither dominates.

    Args:
        found: The result lines.
    """
    metrics = _traded(found)
    points = [(name, label) for name, labels in curves(found.methods).items() for label in labels]
    result = []
    for data in found.data_sets:
        means = {label: summarize(found.of(data, label)) for _, label in points}
        for name, better in points:
            for other, worse in points:
                if name == other:
                    continue
                differences = {
                    metric.key: difference
                    for metric in metrics
                    if (difference := lead(found, data, better, worse, metric))
                }
                measured = {
                    metric.key
                    for metric in metrics
                    if (means[better][metric.key], means[worse][metric.key]) != (None, None)
                }
                signs = {metric.key: -1 if metric.better == "down" else 1 for metric in metrics}
                if (
                    differences.keys() == measured
                    and all(signs[key] * its.mean >= 0 for key, its in differences.items())
                    and any(its.leaves_out_zero for its in differences.values())
                ):
                    result.append(Domination(data, better, worse, differences))
    return result


def curve_parts(found: Collection, picture: Sequence[str]) -> list[str]:
    """The paragraphs of a report's section; nothing without curves.

    Args:
        found: The result lines.
        picture: The lines that show the figure.
    """
    if not curves(found.methods):
        return []
    metrics = _traded(found)
    rows = [["data", "point", *(metric.short for metric in metrics)]]
    for data in found.data_sets:
        for labels in curves(found.methods).values():
            for label in labels:
                if lines := found.of(data, label):
                    summary = summarize(lines)
                    means = [summary[metric.key] for metric in metrics]
                    shown = ["-" if value is None else f"{value:.1f}" for value in means]
                    rows.append([literal(data), literal(label), *shown])
    parts = [
        "## Curves",
        "Each method with one of its settings swept; the number behind @ is the setting's value."
        + "".join(f" {literal(name)}: {literal(axis)}." for name, axis in found.axes.items()),
        *picture,
        table_of_rows(rows),
        "A point **dominates** one of another method if its mean is at least as good in all of these metrics that"
        " either has, over the records that both have, and the 95 % interval of the paired difference leaves out 0 in"
        f" at least one, over {FEW} records or more.",
    ]
    dominated = [
        [literal(its.data), literal(its.better), literal(its.worse), *_differences(its, metrics)]
        for its in dominations(found)
    ]
    head = ["data", "point", "dominates", *(metric.short for metric in metrics)]
    return [*parts, table_of_rows([head, *dominated]) if dominated else "No point dominates one of another method."]


def draw_curves(found: Collection, styles: Mapping[str, tuple[str, str]]) -> Any:
    """Data sets by `PAIRS`; one line a curve, its points in the order of their values. None without curves.

    Args:
        found: The result lines.
        styles: Name of a curve -> colour and marker.
    """
    swept = curves(found.methods)
    labels = {metric.key: metric.label for metric in compared(found)}
    pairs = [pair for pair in PAIRS if set(pair) <= labels.keys()]
    if not swept or not pairs:
        return None
    figure = new_figure(figsize=(4 * len(pairs), 4 * len(found.data_sets) + 0.5), layout="constrained")
    axes = figure.subplots(len(found.data_sets), len(pairs), squeeze=False)
    handles: dict[str, Any] = {}
    for data, row in zip(found.data_sets, axes):
        for axis, (x, y) in zip(row, pairs):
            for name, points in swept.items():
                colour, marker = styles[name]
                means = [(label, summarize(found.of(data, label))) for label in points]
                known = [(label, its[x], its[y]) for label, its in means if None not in (its[x], its[y])]
                if known:
                    (handles[name],) = axis.plot(
                        *zip(*((left, up) for _, left, up in known)), marker=marker, color=colour, linewidth=1.5
                    )
                for label, left, up in (known[0], known[-1]) if known else ():
                    axis.annotate(
                        label.rpartition(POINT)[2], (left, up), xytext=(4, 4), textcoords="offset points", fontsize=8
                    )
            axis.set(xlabel=labels[x], ylabel=labels[y], title=data)
            axis.margins(0.12)
            axis.spines[["top", "right"]].set_visible(False)
    name_above(figure, handles)
    return figure


def _traded(found: Collection) -> list[Metric]:
    return [metric for metric in compared(found) if metric.key in TRADED]


def _differences(its: Domination, metrics: Sequence[Metric]) -> list[str]:
    return [f"{its.differences[m.key].mean:+.1f}" if m.key in its.differences else "-" for m in metrics]


def _value(label: str) -> tuple[bool, float, str]:
    """Numbers by size, then other values by name."""
    text = label.rpartition(POINT)[2]
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text
