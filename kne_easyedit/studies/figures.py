"""The curves of a study: one panel a metric, over what was swept. A series has one colour and marker in all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kne_easyedit._util.plotting import GRID, INK, name_above, new_figure, write_figure
from kne_easyedit.metrics import PERCENT
from kne_easyedit.studies.findings import named
from kne_easyedit.studies.numbers import BY_KEY, Cell, Curves

STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
"""Colour and marker of each series: colours that colour-blind readers can tell apart (Okabe and Ito)."""
COLUMNS = 3
"""Panels in a row."""
BESIDE = 1.09
"""Factor between the places of two series' points of one value."""
NARROW = 4.0
"""Percentage points that an axis spans at least."""


def draw_study(curves: Curves, path: Path) -> None:
    """Draws one study of one method on one data set.

    Args:
        curves: Its points.
        path: The file, PNG.

    Raises:
        ImportError: If matplotlib or scipy is missing.
    """
    keys = curves.keys
    columns = min(COLUMNS if not curves.study.named else 2, len(keys))
    rows = -(-len(keys) // columns)
    wide, high = (8.0, 3.6) if curves.study.named else (4.6, 3.4)
    figure = new_figure(figsize=(wide * columns, high * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, key in zip(axes, keys):
        (_draw_names if curves.study.named else _draw_numbers)(axis, curves, key)
        _finish(axis, curves, key)
    if curves.study.named:
        handles, names = axes[0].get_legend_handles_labels()
        name_above(figure, dict(zip(names, handles)))
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    if len(curves.series) > 1 and not curves.study.named:
        figure.draw_without_rendering()  # labels are put where the curves end on the finished axes
        for axis, key in zip(axes, keys):
            _label_ends(axis, curves, key)
    write_figure(figure, path, "")


def _style(curves: Curves, series: str) -> tuple[str, str]:
    return STYLES[list(curves.study.series).index(series)]


def _draw_points(axis: Any, places: Sequence[float], cells: Sequence[Cell], key: str, style: tuple[str, str]) -> None:
    """Means with their intervals; hollow where there are too few records, or some of a point's figures not finite."""
    colour, marker = style
    for x, cell in zip(places, cells):
        if value := cell.mean(key):
            axis.plot((x, x), (value.low, value.high), color=colour, linewidth=1.3)
            face = "white" if cell.few or cell.not_finite(key) else colour
            axis.plot(x, value.mean, marker, color=colour, markerfacecolor=face, markersize=6.5, zorder=3)


def _draw_numbers(axis: Any, curves: Curves, key: str) -> None:
    if curves.study.logarithmic:
        axis.set_xscale("log")
    for series in curves.series:
        colour, marker = _style(curves, series)
        cells = [cell for cell in curves.of(series) if cell.mean(key)]
        places = [_place(curves, cell) for cell in cells]
        axis.plot(places, [its.mean for cell in cells if (its := cell.mean(key))], color=colour, linewidth=1.6)
        _draw_points(axis, places, cells, key, (colour, marker))
    values = sorted({float(cell.value) for cell in curves.cells.values()})
    percent = curves.study.name == "share"
    axis.set_xticks(values, [f"{100 * value:g}" if percent else f"{value:g}" for value in values], fontsize=7)
    axis.minorticks_off()
    axis.margins(x=0.06)
    if len(curves.series) > 1 and len(values) > 1:  # room for the names at the ends
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * (high / low) ** 0.22 if curves.study.logarithmic else high + 0.22 * (high - low))
    axis.set_xlabel(f"{curves.study.axis}{', %' if percent else ''} (logarithmic)", fontsize=9)


def _place(curves: Curves, cell: Cell) -> float:
    """Where a point is drawn: on a logarithmic axis beside its value, or series would hide each other's intervals."""
    side = curves.series.index(cell.series) - (len(curves.series) - 1) / 2
    return float(cell.value) * BESIDE ** (side if curves.study.logarithmic else 0)


def _draw_names(axis: Any, curves: Curves, key: str) -> None:
    names = list(dict.fromkeys(cell.value for cell in curves.cells.values()))
    series = curves.series
    for name in series:
        cells = curves.of(name)
        shift = 0.0 if name == "depth" else 0.16 * (series.index(name) - (len({*series} - {"depth"}) - 1) / 2)
        _draw_points(axis, [names.index(cell.value) + shift for cell in cells], cells, key, _style(curves, name))
        colour, marker = _style(curves, name)
        axis.plot([], [], marker, color=colour, label=curves.study.series[name])
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=20, ha="right")
    axis.set_xlim(-0.6, len(names) - 0.4)


def _finish(axis: Any, curves: Curves, key: str) -> None:
    metric = BY_KEY[key]
    less = " (less is better)" if metric.better == "down" else ""
    unit = "%" if metric.unit == PERCENT else metric.unit
    axis.set_title(f"{metric.short}: {metric.label}, {unit}{less}", fontsize=9, color=INK)
    low, high = axis.get_ylim()
    if metric.unit == PERCENT and high - low < NARROW:  # noise must not look like a mountain
        low, high = (low + high - NARROW) / 2, (low + high + NARROW) / 2
    if metric.unit == PERCENT:  # points that are all at 100 would stand in the middle of an axis that goes on beyond
        high = min(high, 100 + 0.05 * (high - low))
    if (value := curves.before.get(key)) is not None:
        near = 1.5 * low - 0.5 * high < value < 1.5 * high - 0.5 * low
        if near:  # else the line would press all points together
            axis.axhline(value, color="#777777", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            room = 0.05 * (high - low)
            low, high = min(low, value - room), max(high, value + room)
        place = (0.01, value) if near else (0.01, 0.01)
        axis.annotate(
            "no edit" if near else f"no edit: {value:.1f}",
            place,
            xycoords=axis.get_yaxis_transform() if near else "axes fraction",
            fontsize=7,
            color="#555555",
            va="bottom",
        )
    axis.set_ylim(low, high)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color=GRID, linewidth=0.6)


def _label_ends(axis: Any, curves: Curves, key: str) -> None:
    """The name of each series behind the right end of its curve, moved apart where they would cover each other."""
    from matplotlib.patheffects import withStroke

    ends = []
    for series in curves.series:
        cells = [cell for cell in curves.of(series) if cell.mean(key)]
        if cells and (value := cells[-1].mean(key)):
            x, y = axis.transData.transform((_place(curves, cells[-1]), value.mean))
            ends.append([y, x, series])
    ends.sort()
    apart, wide = 0.13 * axis.figure.dpi, 1.1 * axis.figure.dpi
    for i, one in enumerate(ends):
        for below in ends[:i]:
            if abs(one[1] - below[1]) < wide:
                one[0] = max(one[0], below[0] + apart)
    for y, x, series in ends:
        axis.annotate(
            curves.study.series[series].partition(",")[0],
            axis.transData.inverted().transform((x, y)),
            xytext=(7, -3),
            textcoords="offset points",
            fontsize=8,
            zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            color=_style(curves, series)[0],
            annotation_clip=False,
        )


def few_points(curves: Curves) -> list[str]:
    """The points that are drawn hollow, by name, with their number of records."""
    return [
        f"{named(cell)} ({curves.study.series[cell.series]}): {cell.records}"
        for cell in curves.cells.values()
        if cell.few
    ]
