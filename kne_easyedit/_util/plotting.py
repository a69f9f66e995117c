"""Plots as PNG files. matplotlib is imported only when something is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kne_easyedit._util.files import atomic_write

INK, ACCENT, DARK, GRID = "#222222", "#1f6f8b", "#0b3c4d", "#dddddd"


def new_figure(**settings: Any) -> Any:
    """An empty figure of matplotlib.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'kne_easyedit[plots]'") from error
    return Figure(**settings)


def name_above(figure: Any, named: Mapping[str, Any], columns: int = 9) -> None:
    """Puts the names of what is drawn above all panels, where they cover no point.

    Args:
        figure: With constrained layout.
        named: Name -> the artist that shows its colour and marker.
        columns: How many stand in a line at most; fewer where the figure is too narrow for them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for count in range(min(columns, len(named)), 0, -1):
        legend = figure.legend(named.values(), named, loc="outside upper center", ncols=count, frameon=False)
        for text in legend.get_texts():  # before it is measured: a name may hold dollar signs (`entitle`)
            text.set_parse_math(False)
        if count == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()


def entitle(figure: Any, title: str) -> None:
    """Gives a finished figure its title. None of its texts is parsed as a formula: data may hold dollar signs."""
    from matplotlib.text import Text

    if title:
        figure.suptitle(title, color=INK)
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def write_figure(figure: Any, path: str | Path, title: str) -> None:
    """Writes a figure with its title (`entitle`) as PNG of at most 256 colours, atomically."""
    entitle(figure, title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    atomic_write(Path(path), with_palette(image.getvalue()))


def with_palette(image: bytes) -> bytes:
    """The same PNG with at most 256 colours: of plots, which have few, it takes about a third of the bytes."""
    from PIL import Image  # comes with matplotlib

    palette = io.BytesIO()
    plot = Image.open(io.BytesIO(image)).convert("RGB")
    # This method of Pillow's keeps white white, and the others moved colours of thin lines.
    few = plot.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(palette, format="PNG", optimize=True)
    return palette.getvalue()
