"""Pictures. matplotlib is imported only here, and only when something is drawn."""

from __future__ import annotations

from pathlib import Path

from kne_easyedit.ensemble import NeuronEnsemble
from kne_easyedit.paths import atomic_write

INK, ACCENT, GRID = "#222222", "#1f6f8b", "#dddddd"


def draw_ensemble(ensemble: NeuronEnsemble, path: str | Path, title: str = "") -> None:
    """Which neurons of which layers were chosen: one row of panels a module type, written as PNG.

    Left, every neuron of the ensemble as a stroke at its index; right, how many each layer has.
    Raises ImportError with the way out if matplotlib is missing.
    """
    import io

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'kne_easyedit[plots]'") from error

    counts = ensemble.counts()
    layers = max(len(found) for found in counts.values())
    figure = Figure(figsize=(11, len(counts) * max(3.2, 0.17 * layers + 1.4)), layout="constrained")
    axes = figure.subplots(len(counts), 2, squeeze=False, width_ratios=[3, 1])
    for (template, found), (where, how_many) in zip(counts.items(), axes):
        numbers, width = list(found), ensemble.widths[template]
        rows = [ensemble.neurons[template].get(layer, ()) for layer in numbers]
        where.eventplot(rows, lineoffsets=numbers, linelengths=0.8, linewidths=0.9, colors=ACCENT)
        where.set(xlim=(-1, width), xlabel=f"neuron (of {width})", ylabel="layer", title=f"{template}: {sum(found.values())} neurons")
        bars = how_many.barh(numbers, found.values(), color=ACCENT, height=0.8)
        how_many.bar_label(bars, labels=[n or "" for n in found.values()], padding=2, fontsize=7, color=INK)
        how_many.set(xlabel="neurons", title="per layer")
        how_many.margins(x=0.15)
        for axis in (where, how_many):
            axis.set_ylim(numbers[-1] + 0.7, numbers[0] - 0.7)  # the first layer on top
            axis.set_yticks(numbers[:: max(1, len(numbers) // 16)])
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_axisbelow(True)
            axis.grid(axis="y", color=GRID, linewidth=0.6)
    if title:
        figure.suptitle(title, color=INK)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    atomic_write(Path(path), image.getvalue())
