"""How alike the ensembles of different facts are: overlaps by the number of facts, with intervals over the draws.

The ensembles come from files beside results, or are found here without any edit (`find_ensembles`), which many draws
need: scores of a fact are computed once and kept in the score cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy

from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.markdown import literal, table_of_rows
from kne_easyedit._util.plotting import GRID, name_above, new_figure, write_figure
from kne_easyedit.benchmark.config import hparams_of
from kne_easyedit.benchmark.intervals import LEVEL, RESAMPLES, Interval, interval
from kne_easyedit.benchmark.publish import page
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.localization.localizer import find_ensemble
from kne_easyedit.models.loading import load_model
from kne_easyedit.studies.definitions import place_of

KINDS = (
    ("with_most", "with that of the most facts", "#0072B2", "o"),
    ("between_draws", "of draws with each other", "#D55E00", "s"),
    ("by_chance", "by chance", "#777777", ""),
)
"""What is compared: key, name, colour, marker."""
LEAST = 3
"""Draws of which an interval is given."""


def find_ensembles(
    jobs: Sequence[Mapping[str, Any]], hparams_folder: Path, on_found: Callable[[str, NeuronEnsemble], None]
) -> dict[int, list[NeuronEnsemble]]:
    """The ensembles of the points of the study of facts, without any edit.

    Args:
        jobs: Configurations of the points (`definitions.Point.configured`), of one model.
        hparams_folder: As for `benchmark.config.job_of`.
        on_found: Called with each label and its ensemble.

    Returns:
        Number of facts -> the ensembles of its draws, ascending.

    Raises:
        ValueError: As `benchmark.config.hparams_of` and `localizer.find_ensemble`.
    """
    loaded: tuple[Any, Any] | None = None
    found: dict[int, list[NeuronEnsemble]] = {}
    for job in jobs:
        label = job["method"]["label"]
        place = place_of(label)
        if place is None or place.series != "facts":
            raise ValueError(f"method.label: {label!r} is no point of the study facts")
        hparams = hparams_of(job, hparams_folder)
        loaded = model, tokenizer = loaded or load_model(hparams)
        ensemble = find_ensemble(model, tokenizer, [], hparams)
        found.setdefault(int(place.value), []).append(ensemble)
        on_found(label, ensemble)
    return dict(sorted(found.items()))


def overlaps(ensembles: Mapping[int, Sequence[NeuronEnsemble]]) -> list[dict[str, Any]]:
    """How alike ensembles are: with those of the most facts, and of draws with each other.

    Args:
        ensembles: Number of facts -> the ensembles of its draws.

    Returns:
        By number of facts: ``facts``, ``draws``, ``rows`` (mean), ``with_most``, ``between_draws`` and ``by_chance``
        (Dice coefficients in [0, 1], means over draws and pairs), None where there is nothing to compare; and
        ``intervals``, key -> 95 % bootstrap interval over draws, where there are at least `LEAST` of them.
    """
    if not ensembles:
        return []
    most = max(ensembles)
    found = []
    for facts, own in sorted(ensembles.items()):
        # Where the file allows one draw of the most facts, others may share facts with it; so they do in the paper.
        with_most = [fmean(each.overlap(other) for other in ensembles[most]) for each in own] if facts != most else []
        table = numpy.array([[one.overlap(other) for other in own] for one in own])
        between = _between(table)
        width = sum(own[0].widths.values()) * max(1, len(own[0].layers))
        intervals = {
            "with_most": interval(with_most) if len(with_most) >= LEAST else None,
            "between_draws": between if len(own) >= LEAST else None,
        }
        found.append(
            {
                "facts": facts,
                "draws": len(own),
                "rows": fmean(each.size for each in own),
                "with_most": fmean(with_most) if with_most else None,
                "between_draws": between.mean if between else None,
                "by_chance": fmean(each.size for each in own) / width,
                "intervals": {name: asdict(its) for name, its in intervals.items() if its},
            }
        )
    return found


def _between(table: numpy.ndarray, seed: int = 0) -> Interval | None:
    """The mean over the pairs of draws, with its interval: draws are drawn with replacement, and a pair of one draw
    with itself, which is no pair, does not count.

    Args:
        table: The overlap of each draw with each, symmetric.
        seed: Of the bootstrap.
    """
    n = len(table)
    if n < 2:
        return None
    apart = numpy.where(numpy.eye(n, dtype=bool), 0.0, table)
    mean = float(apart.sum() / (n * (n - 1)))
    times = numpy.random.default_rng(seed).multinomial(n, numpy.full(n, 1 / n), RESAMPLES).astype(float)
    pairs = n * n - (times**2).sum(1)
    sums = numpy.einsum("ri,ij,rj->r", times, apart, times, optimize=True)
    means = sums[pairs > 0] / pairs[pairs > 0]
    low, high = numpy.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(mean, float(low), float(high), n)


def overlap_table(found: Iterable[Mapping[str, Any]]) -> str:
    """The overlaps as a Markdown table."""
    rows = [["facts", "draws", "rows", *(name for _, name, *_ in KINDS)]]
    for its in found:
        cells = []
        for key, *_ in KINDS:
            inner = its["intervals"].get(key)
            shown = "-" if its[key] is None else f"{its[key]:.2f}"
            cells.append(shown + (f" [{inner['low']:.2f}, {inner['high']:.2f}]" if inner else ""))
        rows.append([str(its["facts"]), str(its["draws"]), f"{its['rows']:.0f}", *cells])
    return table_of_rows(rows)


def publish_overlaps(found: Sequence[Mapping[str, Any]], of: str, folder: Path) -> Path:
    """Writes ``ensembles.md``, ``ensembles.html``, ``ensembles.json`` and ``ensembles.png``.

    Args:
        found: Of `overlaps`.
        of: What they are of, in words: method, model, data.
        folder: Where the files are written.

    Returns:
        The path of the page.

    Raises:
        ImportError: If matplotlib, scipy or markdown-it-py is missing.
    """
    caption = f"Overlap of ensembles by the number of facts: {of}."
    _draw(found, folder / "ensembles.png")
    parts = [
        "# How alike ensembles of different facts are",
        f"{literal(of)}. Nothing was edited. Overlaps are Dice coefficients: shared rows over the mean number of rows."
        f" Draws of one number share no fact; a smaller number's are among those of a larger one of the same draw."
        f" Facts that a draw shares with that of the most facts raise its overlap with it."
        f" Intervals: 95 % bootstrap over draws, where there are at least {LEAST}.",
        f"![{literal(caption)}](ensembles.png)",
        overlap_table(found),
    ]
    text = "\n\n".join(parts) + "\n"
    atomic_write(folder / "ensembles.md", text)
    atomic_write(folder / "ensembles.json", json.dumps({"of": of, "overlap": list(found)}, indent=1) + "\n")
    atomic_write(folder / "ensembles.html", page(text, "Ensembles", folder, {"ensembles.png": caption}))
    return folder / "ensembles.html"


def _draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The curves over the number of facts, with their intervals."""
    figure = new_figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, Any] = {}
    for key, name, colour, marker in KINDS:
        points = [(its["facts"], its[key]) for its in found if its[key] is not None]
        if points:
            style = "--" if not marker else "-"
            (lines[name],) = axis.plot(*zip(*points), style, marker=marker or None, color=colour, linewidth=1.6)
        for its in found:
            if inner := its["intervals"].get(key):
                axis.plot((its["facts"],) * 2, (inner["low"], inner["high"]), color=colour, linewidth=1.3)
    axis.set_xscale("log")
    facts = [its["facts"] for its in found]
    axis.set_xticks(facts, [str(n) for n in facts])
    axis.minorticks_off()
    axis.set(xlabel="facts localised on (logarithmic)", ylabel="overlap (Dice)", ylim=(0, 1.02))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=GRID, linewidth=0.6)
    name_above(figure, lines)
    write_figure(figure, path, "")
