"""The figures of a report and of a run. A method has one colour and one marker in all figures of a report.

A curve has them in the figure of curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kne_easyedit._util.plotting import GRID, name_above, new_figure, write_figure
from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.curves import curves, draw_curves
from kne_easyedit.benchmark.labels import is_kne, suffix
from kne_easyedit.benchmark.summary import summarize
from kne_easyedit.benchmark.tables import compared, mean
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.localization.figures import draw_ensemble
from kne_easyedit.metrics import PERCENT, Metric, retention_metrics

_BASELINES = ("#7a7a7a", "#b5532a", "#c99a2e", "#6b8e23", "#8c6bb1", "#d16ba5", "#4a7ebb", "#2e8b57"), "osv^<>ph"
_VARIANTS = ("#0b3c4d", "#1f9fc4", "#5bc0de", "#14708a"), "DX*PdH"
"""KNE and its variants: shades of one colour, and markers of their own."""
_TRADEOFFS = (("edit_success", "locality"), ("edit_success", "portability"), ("portability", "locality"))
_NEIGHBOUR_TRADEOFFS = (("exact_match", "bleed"), ("locality", "neighbourhood"), ("portability", "alias_beyond_bleed"))
"""Pairs of metrics that are drawn against each other."""


def draw_all(found: Collection, folder: Path) -> dict[str, str]:
    """Draws the figures of a report.

    Args:
        found: The result lines.
        folder: Where the files are written, as PNG.

    Returns:
        File name -> caption, of the figures that there is something to draw for.

    Raises:
        ImportError: If matplotlib or scipy is missing.
    """
    styles = _styles(found.methods)
    drawn = {}
    for name, caption, draw in (
        (
            "intervals.png",
            "Mean and 95 % interval of every method.",
            lambda found, styles: _intervals(
                found, styles, [metric for metric in compared(found) if not _is_added(metric)]
            ),
        ),
        (
            "neighbourhood-intervals.png",
            "The same for neighbours and what is compared with them.",
            lambda found, styles: _intervals(
                found, styles, [metric for metric in compared(found) if _is_added(metric) and metric.in_run_table]
            ),
        ),
        (
            "tradeoff.png",
            "Edit success, portability and locality against each other: the upper right corner is the best.",
            lambda found, styles: _tradeoff(found, styles, _TRADEOFFS),
        ),
        (
            "neighbourhood.png",
            "What an edit does to its neighbours: bleed should be low, all else high. Where every subject gives the new"
            " answer, so does an alias: portability is worth what is beyond bleed.",
            lambda found, styles: _tradeoff(found, styles, _NEIGHBOUR_TRADEOFFS),
        ),
        (
            "curves.png",
            "Methods with one setting swept, its first and last value beside the points.",
            lambda found, _: draw_curves(found, _styles(list(curves(found.methods)))),
        ),
        (
            "time.png",
            "Seconds to compute and write one edit (logarithmic): median, and the middle 90 % of the records; "
            "evaluation, localisation and second moments apart.",
            _time,
        ),
        (
            "losses.png",
            "Loss over the training steps of an edit, median over records; of KNE the middle half is shaded. "
            "What is added to the loss differs from method to method.",
            _losses,
        ),
    ):
        figure = draw(found, styles)
        if figure is not None:
            write_figure(figure, folder / name, "")
            drawn[name] = caption
    return drawn


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every method, or of every curve.

    Where there are more than colours, colours come again with other markers: all pairs are used before one is repeated.
    """
    styles: dict[str, tuple[str, str]] = {}
    for own, (colours, markers) in ((False, _BASELINES), (True, _VARIANTS)):
        for i, name in enumerate(its for its in names if is_kne(its) == own):
            styles[name] = colours[i % len(colours)], markers[(i + i // len(colours)) % len(markers)]
    return {name: styles[name] for name in names}


def _is_added(metric: Metric) -> bool:
    """Whether it has a picture of its own: what only our runs measure, and not every line has."""
    return metric.optional and not metric.from_easyedit


def _intervals(found: Collection, styles: dict[str, tuple[str, str]], shown: Sequence[Metric]) -> Any:
    """Data sets by figures; in each panel one line a method. None if there is nothing to draw."""
    data_sets, metrics = found.data_sets, [metric for metric in shown if metric.unit == PERCENT]
    if not metrics:
        return None
    figure = new_figure(figsize=(3 * len(metrics), len(data_sets) * (0.26 * len(styles) + 0.9)), layout="constrained")
    axes = figure.subplots(len(data_sets), len(metrics), squeeze=False, sharey=True)
    for data, row in zip(data_sets, axes):
        for metric, axis in zip(metrics, row):
            lowest = 0.0  # a difference may be negative; a panel may be empty
            for place, (method, (colour, marker)) in enumerate(styles.items()):
                if value := mean(found.of(data, method), metric):
                    lowest = min(lowest, value.low)
                    axis.plot(
                        (value.low, value.high), (place, place), color=colour, linewidth=2.5 if is_kne(method) else 1.5
                    )
                    axis.plot(value.mean, place, marker, color=colour, markersize=7)
            axis.set(xlim=(lowest - 3, 103), title=f"{data}: {metric.label}")
            axis.title.set_fontsize(10)
            axis.set_yticks(range(len(styles)), styles)
            axis.set_ylim(len(styles) - 0.5, -0.5)
            _plain(axis)
    return figure


def _tradeoff(found: Collection, styles: dict[str, tuple[str, str]], pairs: Sequence[tuple[str, str]]) -> Any:
    """Data sets by pairs of metrics; None if no pair has both."""
    data_sets = found.data_sets
    labels = {metric.key: metric.label for metric in compared(found)}
    pairs = [pair for pair in pairs if set(pair) <= labels.keys()]
    if not pairs:
        return None
    figure = new_figure(figsize=(4 * len(pairs), 4 * len(data_sets) + 0.5), layout="constrained")
    axes = figure.subplots(len(data_sets), len(pairs), squeeze=False)
    handles: dict[str, Any] = {}
    for data, row in zip(data_sets, axes):
        for axis, (x, y) in zip(row, pairs):
            for method, (colour, marker) in styles.items():
                figures = summarize(found.of(data, method))
                if figures[x] is not None and figures[y] is not None:
                    (handles[method],) = axis.plot(
                        figures[x],
                        figures[y],
                        marker,
                        color=colour,
                        markersize=11 if is_kne(method) else 9,
                        linestyle="none",
                    )
            axis.set(xlabel=labels[x], ylabel=labels[y], title=data)
            axis.margins(0.12)
            _plain(axis)
    name_above(figure, handles)
    return figure


def _time(found: Collection, styles: dict[str, tuple[str, str]]) -> Any:
    import numpy

    seconds = {m: [s for line in found.lines if line["method"] == m and (s := line["seconds"])] for m in styles}
    times = {m: values for m, values in seconds.items() if values}
    if not times:
        return None
    figure = new_figure(figsize=(9, 0.4 * len(times) + 1), layout="constrained")
    axis = figure.subplots()
    for place, (method, values) in enumerate(times.items()):
        low, middle, high = numpy.percentile(values, (5, 50, 95))
        colour, marker = styles[method]
        axis.plot((low, high), (place, place), color=colour, linewidth=2.5)
        axis.plot(middle, place, marker, color=colour, markersize=9)
        axis.annotate(
            f"{middle:.1f} s", (middle, place), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8
        )
    axis.set(xscale="log", xlabel="seconds an edit")
    axis.set_yticks(range(len(times)), times)
    axis.set_ylim(len(times) - 0.5, -0.7)
    axis.margins(x=0.1)
    _plain_ticks(axis.xaxis)
    _plain(axis)
    return figure


def _losses(found: Collection, styles: dict[str, tuple[str, str]]) -> Any:
    import numpy

    figure = new_figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    drawn: dict[str, Any] = {}
    for method, (colour, _) in styles.items():
        of_method = [line["losses"] or [] for line in found.lines if line["method"] == method]
        runs = [losses for losses in of_method if len(losses) > 1]
        if not runs:
            continue
        length = max(map(len, runs))
        # An edit that has stopped keeps its last loss, or the median would be that of the hard records only.
        table = numpy.array([[*run, *[run[-1]] * (length - len(run))] for run in runs])
        low, middle, high = numpy.percentile(table, (25, 50, 75), axis=0)
        (drawn[method],) = axis.plot(middle, color=colour, linewidth=2.5 if is_kne(method) else 1.5)
        if is_kne(method):
            axis.fill_between(range(length), low, high, color=colour, alpha=0.15, linewidth=0)
    if not drawn:
        return None
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    name_above(figure, drawn, 5)
    _plain_ticks(axis.yaxis)
    _plain(axis)
    return figure


def _plain_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(minor_thresholds=(2, 0.7)))


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(color=GRID, linewidth=0.6)


def draw_run(summary: Mapping, ensembles: Mapping[str, NeuronEnsemble], folder: Path) -> None:
    """Draws the figures of one run: the ensemble of each KNE variant, and of a sequence the retention.

    Args:
        summary: Of the run.
        ensembles: Label -> ensemble.
        folder: Where the files are written, as PNG.

    Raises:
        ImportError: If matplotlib is missing.
    """
    if summary["mode"] == "sequential":
        found = {method: figures["retention"] for method, figures in summary["methods"].items()}
        draw_retention(found, folder / "retention.png", f"{summary['records']} sequential edits, {summary['data']}")
    for method, ensemble in ensembles.items():
        share = summary["localization"][method]["parameter_share"]
        title = f"{ensemble.size} neurons, {share:.2%} of all parameters, found on {ensemble.facts} facts"
        draw_ensemble(ensemble, folder / f"ensemble{suffix(method)}.png", title)


def draw_retention(found: dict[str, list[dict]], path: str | Path, title: str = "") -> None:
    """What a sequence retains of its edits: one panel a metric, over the number of edits; one line a method.

    Args:
        found: Label -> the entries of `benchmark.summary.retention`.
        path: The file, PNG.
        title: Above the panels.

    Raises:
        ImportError: If matplotlib is missing.
    """
    known = retention_metrics(*(stop for stops in found.values() for stop in stops))
    metrics = [metric for metric in known if metric.unit == PERCENT]
    figure = new_figure(figsize=(11 / 3 * len(metrics), 3.6), layout="constrained")
    lines: dict[str, Any] = {}
    for axis, metric in zip(figure.subplots(1, len(metrics), sharey=True), metrics):
        for method, stops in found.items():
            points = [(stop["edits"], stop[metric.key]) for stop in stops if stop.get(metric.key) is not None]
            if points:
                (lines[method],) = axis.plot(*zip(*points), "o-", markersize=4)
        axis.set(xlabel="edits made", title=metric.label, ylim=(-3, 103))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color=GRID, linewidth=0.6)
    figure.axes[0].set_ylabel("percent, over all facts edited so far")
    name_above(figure, lines)
    write_figure(figure, path, title)
