"""Pictures of ensembles and of the neurons of single facts. matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kne_easyedit._util.plotting import ACCENT, DARK, GRID, INK, entitle, new_figure, write_figure
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.localization.explain import Explanation

LABELS = 40
"""Facts at most that are named beside their row."""


def draw_ensemble(
    ensemble: NeuronEnsemble,
    path: str | Path,
    title: str = "",
    halves: tuple[NeuronEnsemble, NeuronEnsemble] | None = None,
) -> None:
    """Draws which neurons of which layers were chosen, one row of panels per module type, as PNG.

    On the left every neuron of the ensemble is a stroke at its index. On the right are the numbers of neurons of each
    layer and, darker, how many of these both halves have.

    Args:
        ensemble: The ensemble.
        path: The file.
        title: Its title.
        halves: The ensembles of two halves of the facts.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
        OSError: The file cannot be written.
    """
    write_figure(_ensemble_figure(ensemble, halves), path, title)


def ensemble_figure(ensemble: NeuronEnsemble, title: str = "") -> Any:
    """The picture of `draw_ensemble` as a figure of matplotlib: no file is written.

    Args:
        ensemble: The ensemble.
        title: Its title.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    figure = _ensemble_figure(ensemble, None)
    entitle(figure, title)
    return figure


def _ensemble_figure(ensemble: NeuronEnsemble, halves: tuple[NeuronEnsemble, NeuronEnsemble] | None) -> Any:
    counts = ensemble.counts()
    layers = max(len(found) for found in counts.values())
    figure = new_figure(figsize=(11, len(counts) * max(3.2, 0.17 * layers + 1.4)), layout="constrained")
    axes = figure.subplots(len(counts), 2, squeeze=False, width_ratios=[3, 1])
    shared = halves[0].members() & halves[1].members() & ensemble.members() if halves else set()
    for (template, found), (where, how_many) in zip(counts.items(), axes):
        numbers, width = list(found), ensemble.widths[template]
        rows = [ensemble.neurons[template].get(layer, ()) for layer in numbers]
        where.eventplot(rows, lineoffsets=numbers, linelengths=0.8, linewidths=0.9, colors=ACCENT)
        where.set(
            xlim=(-1, width),
            xlabel=f"neuron (of {width})",
            ylabel="layer",
            title=f"{template}: {sum(found.values())} neurons",
        )
        bars = how_many.barh(numbers, found.values(), color=ACCENT, height=0.8)
        how_many.bar_label(bars, labels=[n or "" for n in found.values()], padding=2, fontsize=7, color=INK)
        if halves:
            stable = [
                sum((template, layer, row) in shared for row in ensemble.neurons[template].get(layer, ()))
                for layer in numbers
            ]
            how_many.barh(numbers, stable, color=DARK, height=0.8)
        how_many.set(xlabel="neurons (dark: in both halves)" if halves else "neurons", title="per layer")
        how_many.margins(x=0.15)
        for axis in (where, how_many):
            axis.set_ylim(numbers[-1] + 0.7, numbers[0] - 0.7)  # the first layer on top
            axis.set_yticks(numbers[:: max(1, len(numbers) // 16)])
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_axisbelow(True)
            axis.grid(axis="y", color=GRID, linewidth=0.6)
    return figure


def draw_explanation(found: Explanation, path: str | Path, title: str = "") -> None:
    """Draws facts by layers (numbers of neurons) and facts by facts (shared neurons), as PNG.

    Args:
        found: The neurons of each fact.
        path: The file.
        title: Its title.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
        OSError: The file cannot be written.
    """
    templates = list(found.ensembles[0].counts())
    n = len(found.facts)
    names = [f"{_cut(f'{fact.prompt} -> {fact.target}')}  [{i}]" for i, fact in enumerate(found.facts)]
    panels = len(templates) + (n > 1)
    figure = new_figure(figsize=(5 + 4.6 * panels, max(2.6, 0.24 * n + 2.0)), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, template in zip(axes, templates):
        counts = [list(ensemble.counts().get(template, {}).values()) for ensemble in found.ensembles]
        layers = list(found.ensembles[0].counts()[template])
        image = axis.imshow(counts, aspect="auto", cmap="GnBu", interpolation="nearest")
        axis.set(xlabel="layer", title=template)
        step = max(1, len(layers) // 10)
        axis.set_xticks(range(0, len(layers), step), layers[::step])
        figure.colorbar(image, ax=axis, label="neurons of the fact", shrink=0.8)
    if n > 1:
        shares = [
            [float("nan") if i == j else share for j, share in enumerate(row)]
            for i, row in enumerate(found.collisions())
        ]
        image = axes[-1].imshow(shares, aspect="auto", cmap="OrRd", interpolation="nearest", vmin=0)
        axes[-1].set(title="collisions", xlabel="... that this fact has as well")
        axes[-1].set_xticks(range(0, n, max(1, n // 20)))
        figure.colorbar(image, ax=axes[-1], label="share of the row's neurons", shrink=0.8)
    for axis in axes:
        axis.set_yticks([])
    if n <= LABELS:
        axes[0].set_yticks(range(n), names, fontsize=7)
    write_figure(figure, path, title)


def _cut(text: str, length: int = 56) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
