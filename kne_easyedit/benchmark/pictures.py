"""The pictures of a report."""

from __future__ import annotations

from pathlib import Path

from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.summary import summarize
from kne_easyedit.plots import GRID, new_figure, write_figure

COLOURS = ("#7a7a7a", "#b5532a", "#c99a2e", "#6b8e23", "#8c6bb1", "#d16ba5", "#4a7ebb", "#2e8b57")
KNE_COLOURS = ("#0b3c4d", "#1f9fc4", "#5bc0de")


def draw_all(found: Collection, folder: Path) -> dict[str, str]:
    """Draws into ``folder``; returns the captions by file name."""
    colours = _colours(found.methods)
    drawn = {}
    for name, caption, draw in (
        ("tradeoff.png", "Edit success, portability and locality of every method: the upper right corner is the best.", _tradeoff),
        ("time.png", "Seconds to compute and write one edit (logarithmic); evaluation and localisation apart.", _time),
        ("losses.png", "Loss over the training steps of an edit: median over records, with the middle half shaded.", _losses),
    ):
        figure = draw(found, colours)
        if figure is not None:
            write_figure(figure, folder / name, "")
            drawn[name] = caption
    return drawn


def _colours(methods: list[str]) -> dict[str, str]:
    kne, others = [m for m in methods if m.startswith("KNE")], [m for m in methods if not m.startswith("KNE")]
    return {m: c[i % len(c)] for group, c in ((kne, KNE_COLOURS), (others, COLOURS)) for i, m in enumerate(group)}


def _tradeoff(found: Collection, colours: dict[str, str]):
    data_sets = found.data_sets
    figure = new_figure(figsize=(12, 4 * len(data_sets)), layout="constrained")
    axes = figure.subplots(len(data_sets), 3, squeeze=False)
    pairs = (("edit_success", "locality"), ("edit_success", "portability"), ("portability", "locality"))
    for data, row in zip(data_sets, axes):
        for axis, (x, y) in zip(row, pairs):
            for method, colour in colours.items():
                figures = summarize(found.of(data, method)) if found.of(data, method) else {}
                if figures.get(x) is not None and figures.get(y) is not None:
                    axis.plot(figures[x], figures[y], "D" if method.startswith("KNE") else "o", color=colour, markersize=9)
                    axis.annotate(method, (figures[x], figures[y]), xytext=(5, 5), textcoords="offset points", fontsize=8)
            axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "), xlim=(-4, 112), ylim=(-4, 108), title=data)
            _plain(axis)
    return figure


def _time(found: Collection, colours: dict[str, str]):
    times = {m: [line["seconds"] for line in found.lines if line["method"] == m and line.get("seconds")] for m in colours}
    times = {m: values for m, values in times.items() if values}
    if not times:
        return None
    figure = new_figure(figsize=(9, 0.5 * len(times) + 1.4), layout="constrained")
    axis = figure.subplots()
    means = [sum(values) / len(values) for values in times.values()]
    bars = axis.barh(list(times), means, color=[colours[m] for m in times])
    axis.bar_label(bars, [f"{mean:.2f} s" for mean in means], padding=3)
    axis.set(xscale="log", xlabel="seconds an edit")
    axis.margins(x=0.2)
    _plain(axis)
    return figure


def _losses(found: Collection, colours: dict[str, str]):
    import numpy

    figure = new_figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    drawn = False
    for method, colour in colours.items():
        runs = [line["losses"] for line in found.lines if line["method"] == method and len(line.get("losses") or []) > 1]
        if not runs:
            continue
        length = max(map(len, runs))
        # An edit that has stopped keeps its last loss, or the median would be that of the hard records only.
        table = numpy.array([[*run, *[run[-1]] * (length - len(run))] for run in runs])
        low, middle, high = numpy.percentile(table, (25, 50, 75), axis=0)
        axis.plot(middle, color=colour, label=method)
        axis.fill_between(range(length), low, high, color=colour, alpha=0.15, linewidth=0)
        drawn = True
    if not drawn:
        return None
    axis.set(xlabel="step", ylabel="loss of the new answer", yscale="log")
    axis.legend(frameon=False, ncols=2)
    _plain(axis)
    return figure


def _plain(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(color=GRID, linewidth=0.6)
