"""Pictures are small files and lose nothing that can be seen."""

from __future__ import annotations

import io

import pytest

from kne_easyedit._util.plotting import name_above, new_figure, with_palette, write_figure

pytest.importorskip("matplotlib")
np = pytest.importorskip("numpy")


def pixels(image):
    from PIL import Image

    return np.asarray(Image.open(image).convert("RGB")).astype(int)


def drawn():
    """A plot with thin lines in many colours, a colour map and a colour that lies on one pixel in a thousand."""
    figure = new_figure(figsize=(6, 4), layout="constrained")
    lines, squares = figure.subplots(1, 2)
    for n in range(12):
        lines.plot([0, 1], [n, 12 - n], linewidth=0.7, label=f"{n}")
    lines.plot([0.5], [11], "o", color="#d95f02", markersize=5)
    lines.legend()
    squares.imshow(np.arange(400).reshape(20, 20), cmap="viridis")
    return figure


def test_a_picture_is_half_as_large_and_looks_the_same(tmp_path):
    whole = io.BytesIO()
    drawn().savefig(whole, format="png", dpi=130)
    write_figure(drawn(), tmp_path / "plot.png", "")
    small = (tmp_path / "plot.png").read_bytes()
    assert len(small) < len(whole.getvalue()) / 2
    before, after = pixels(whole), pixels(tmp_path / "plot.png")
    assert before.shape == after.shape
    assert np.abs(before - after).max() <= 24  # of 255, of the colour map's 256 colours beside those of lines
    assert (np.abs(before - after).max(-1) > 8).mean() < 0.01
    white = (before == 255).all(-1)
    assert (after[white] == 255).all() and white.mean() > 0.3


def test_few_colours_stay_as_they_are():
    from PIL import Image

    picture = Image.new("RGB", (64, 64), "#ffffff")
    for n in range(64):
        picture.putpixel((n, n), (4 * n, 255 - n, n))
    image = io.BytesIO()
    picture.save(image, "PNG")
    assert (pixels(image) == pixels(io.BytesIO(with_palette(image.getvalue())))).all()


@pytest.mark.parametrize("width", [4, 12])
def test_names_above_the_panels_are_never_cut_off(width):
    """As many in a line as fit; a name that is no formula is measured as it is written."""
    figure = new_figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    named = {f"KNE-spare-{i} $\\frac$": axes.plot([i], [i], "o")[0] for i in range(11)}
    name_above(figure, named)
    (legend,) = figure.legends
    canvas = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    where = legend.get_window_extent(canvas.get_renderer())
    assert where.x0 >= 0 and where.x1 <= figure.bbox.width and [t.get_text() for t in legend.get_texts()] == [*named]
    assert (legend._ncols > 2) == (width == 12)
