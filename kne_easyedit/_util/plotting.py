"""Pictures as PNG. matplotlib is imported only when something is drawn."""

from __future__ import annotations

import io
from pathlib import Path

from kne_easyedit._util.files import atomic_write

INK, ACCENT, DARK, GRID = "#222222", "#1f6f8b", "#0b3c4d", "#dddddd"


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'kne_easyedit[plots]'") from error
    return Figure


def new_figure(**settings):
    """An empty figure of matplotlib. Raises ImportError with the way out if matplotlib is missing."""
    return _figure()(**settings)


def write_figure(figure, path: str | Path, title: str) -> None:
    """Writes a figure as PNG, beside and renamed. No text of it is a formula: data has dollar signs of its own."""
    from matplotlib.text import Text

    if title:
        figure.suptitle(title, color=INK)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    atomic_write(Path(path), image.getvalue())
