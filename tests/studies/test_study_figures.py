"""Pictures of studies and of sequences: no name covers what is drawn."""

from __future__ import annotations

import json

import pytest
from study_lines import write_points

from kne_easyedit.benchmark.figures import draw_retention
from kne_easyedit.studies.ensembles import publish_overlaps
from kne_easyedit.studies.figures import draw_study
from kne_easyedit.studies.reading import read_studies


def draw_location(folder):
    places = {"rows": ("down_proj", "k_proj"), "depth": ("first third", "last third")}
    points = {f"KNE-{series}@{place}": {"ES": 0.5} for series, names in places.items() for place in names}
    (curves,) = read_studies([write_points(folder / "run", points)]).curves
    draw_study(curves, folder / "location.png")


def draw_sequence(folder):
    stops = [{"edits": 1, "edit_success": 100.0}, {"edits": 10, "edit_success": 60.0}]
    draw_retention({"KNE": stops, "FT": stops}, folder / "retention.png")


def draw_overlaps(folder):
    overlap = {"draws": 1, "rows": 9, "with_most": 0.5, "between_draws": 0.9, "by_chance": 0.1, "intervals": {}}
    publish_overlaps([{"facts": n, **overlap} for n in (1, 10)], "KNE", folder)


@pytest.mark.parametrize("share", [1.0, 0.98, 0.5])
def test_an_axis_of_percent_ends_at_a_hundred(tmp_path, monkeypatch, share):
    drawn = []
    monkeypatch.setattr("kne_easyedit._util.plotting.entitle", lambda figure, _title: drawn.append(figure))
    monkeypatch.setattr("kne_easyedit.benchmark.intervals.RESAMPLES", 200)
    points = {f"KNE-rows@{name}": {"ES": share} for name in ("down_proj", "k_proj")}
    (curves,) = read_studies([write_points(tmp_path / "run", points, noise=0)]).curves
    draw_study(curves, tmp_path / "location.png")
    (axis,) = (axis for axis in drawn[0].axes if axis.get_title().startswith("ES"))
    low, high = axis.get_ylim()
    assert low < 100 * share < high <= 100 + 0.05 * (high - low) + 1 and high - low >= 2


@pytest.mark.parametrize("before", [0.4, 0.46, 0.5, 0.54, 0.6])
def test_the_line_of_the_unedited_model_lies_within_the_axis(tmp_path, monkeypatch, before):
    """Or, too far away, it is not drawn."""
    drawn = []
    monkeypatch.setattr("kne_easyedit._util.plotting.entitle", lambda figure, _title: drawn.append(figure))
    monkeypatch.setattr("kne_easyedit.benchmark.intervals.RESAMPLES", 200)
    points = {f"KNE-rows@{name}": {"ES": share} for name, share in (("down_proj", 0.48), ("k_proj", 0.52))}
    pre = {"pre": {"rewrite_acc": [before]}}
    folder = write_points(tmp_path / "run", points, noise=0)
    for file in folder.rglob("results.jsonl"):
        lines = [json.loads(its) for its in file.read_text().splitlines()]
        lines = [{**its, "metrics": {**its["metrics"], **pre}} for its in lines]
        file.write_text("".join(json.dumps(its) + "\n" for its in lines))
    (curves,) = read_studies([folder]).curves
    draw_study(curves, tmp_path / "location.png")
    (axis,) = (axis for axis in drawn[0].axes if axis.get_title().startswith("ES"))
    low, high = axis.get_ylim()
    dashed = [its.get_ydata()[0] for its in axis.get_lines() if its.get_color() == "#777777"]
    assert dashed == ([] if before in (0.4, 0.6) else [pytest.approx(100 * before)])
    assert all(low < value < high for value in (*dashed, 48, 52))


@pytest.mark.parametrize("draw", [draw_location, draw_sequence, draw_overlaps])
def test_names_stand_outside_of_all_panels(draw, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("kne_easyedit._util.plotting.entitle", lambda figure, _title: drawn.append(figure))
    monkeypatch.setattr("kne_easyedit.benchmark.intervals.RESAMPLES", 200)
    draw(tmp_path)
    (figure,) = drawn
    (legend,) = figure.legends
    assert len(legend.get_texts()) >= 2 and all(axis.get_legend() is None for axis in figure.axes)
    box = legend.get_window_extent()
    assert not [axis for axis in figure.axes if axis.get_visible() and box.overlaps(axis.get_window_extent())]
