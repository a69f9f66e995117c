"""Curves of methods with one setting swept: their order, which point dominates which, and what a report shows."""

from __future__ import annotations

import json

import pytest

from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.curves import curves, dominations
from kne_easyedit.benchmark.figures import draw_all
from kne_easyedit.benchmark.intervals import FEW
from kne_easyedit.benchmark.labels import curve_of, is_kne, method_order
from kne_easyedit.benchmark.publish import publish


def line(method: str, index: int, portability: float, locality: float, bleed: float) -> dict:
    post = {"rewrite_acc": [1.0], "portability": {"R_acc": [portability]}, "locality": {"L_acc": [locality]}}
    return {
        "fingerprint": method,
        "method": method,
        "index": index,
        "record": f"r{index}",
        "data": "test_cf",
        "seed": 42,
        "mode": "single",
        "exact_match": 1.0,
        "neighbourhood": 1 - bleed,
        "bleed": bleed,
        "metrics": {"pre": {}, "post": post},
    }


def collected(tmp_path, points: dict[str, tuple[float, float, float]], records: int = FEW):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (line(method, i, *figures) for method, figures in points.items() for i in range(records))
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return collect([folder])


def test_points_are_ordered_by_value_and_a_single_one_is_no_curve():
    assert curves(["FT@100", "FT@25", "FT@1e-3", "ROME@5", "FT", "KNE@fast", "KNE@0.5"]) == {
        "FT": ["FT@1e-3", "FT@25", "FT@100"],
        "KNE": ["KNE@0.5", "KNE@fast"],
    }
    assert curve_of("FT@25") == "FT" and curve_of("FT") == "FT" and is_kne("KNE@3") and not is_kne("FT@3")
    assert method_order("FT@25")[:2] == method_order("FT")[:2] != method_order("ROME")[:2]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((0.5, 0.5, 0.5), True),  # worse in all
        ((0.8, 0.9, 0.5), True),  # equal but for the neighbours
        ((0.8, 0.9, 0.1), False),  # equal in all: no interval leaves out 0
        ((0.9, 0.5, 0.5), False),  # better in portability
        ((0.5, 0.5, 0.0), False),  # bleeds less: lower is better there
    ],
)
def test_one_point_dominates_another(other, expected, tmp_path):
    points = {"KNE@1": (0.8, 0.9, 0.1), "KNE@2": (0.0, 0.0, 1.0), "FT@25": other, "FT@50": (1.0, 1.0, 0.0)}
    found = dominations(collected(tmp_path, points))
    assert (("KNE@1", "FT@25") in [(its.better, its.worse) for its in found]) == expected
    assert ("KNE@1", "KNE@2") not in [(its.better, its.worse) for its in found], "points of one curve"
    assert ("FT@50", "KNE@2") in [(its.better, its.worse) for its in found]
    if expected:
        (one,) = (its for its in found if (its.better, its.worse) == ("KNE@1", "FT@25"))
        assert one.data == "counterfact" and one.differences["bleed"].records == FEW


def test_a_point_that_lacks_a_metric_of_the_other_dominates_nothing(tmp_path):
    """It was run without neighbours, and may be the one that bleeds."""
    points = {"KNE@1": (0.5, 0.5, 0.0), "KNE@2": (0.4, 0.4, 0.0), "FT@25": (0.9, 0.9, 1.0), "FT@50": (0.8, 0.8, 1.0)}
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [line(method, i, *figures) for method, figures in points.items() for i in range(FEW)]
    for one in lines:
        if one["method"].startswith("FT"):
            del one["neighbourhood"], one["bleed"]
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert not dominations(collect([folder]))
    for one in lines:  # where neither has it, the others decide
        one.pop("neighbourhood", None), one.pop("bleed", None)
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert len(dominations(collect([folder]))) == 4


def test_few_records_dominate_nothing(tmp_path):
    points = {"KNE@1": (0.8, 0.9, 0.1), "KNE@2": (0.7, 0.9, 0.1), "FT@25": (0.5, 0.5, 0.5), "FT@50": (0.6, 0.4, 0.7)}
    assert len(dominations(collected(tmp_path, points))) == 4
    (tmp_path / "few").mkdir()
    assert not dominations(collected(tmp_path / "few", points, records=FEW - 1))


def test_curves_and_methods_look_different(tmp_path, monkeypatch):
    """Six curves of KNE with two points each: in every panel and legend each has a colour and marker of its own."""
    drawn = []
    monkeypatch.setattr("kne_easyedit._util.plotting.entitle", lambda figure, _title: drawn.append(figure))
    names = [f"KNE-{name}" for name in "abcdef"] + ["FT", "ROME"]
    points = {f"{name}@{n}": (i / 10, n / 4, 0.1) for i, name in enumerate(names) for n in (1, 2)}
    pictures = list(draw_all(collected(tmp_path, points, records=2), tmp_path))
    for name, expected in (("curves.png", names), ("tradeoff.png", points)):
        figure = drawn[pictures.index(name)]
        (legend,) = figure.legends
        assert sorted(its.get_text() for its in legend.get_texts()) == sorted(expected)
        shown = [[(its.get_color(), its.get_marker()) for its in axis.get_lines()] for axis in figure.axes]
        shown.append([(its.get_color(), its.get_marker()) for its in legend.legend_handles])
        assert all(len(set(its)) == len(its) == len(expected) for its in shown), name


def test_a_report_has_curves_only_where_something_is_swept(tmp_path):
    points = {"KNE@1": (0.8, 0.9, 0.1), "KNE@2": (0.7, 0.9, 0.1), "FT@25": (0.5, 0.5, 0.5), "FT@50": (0.6, 0.4, 0.7)}
    publish(collected(tmp_path, points), tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    section = text.partition("## Curves")[2].partition("\n## ")[0]
    assert "| counterfact | KNE@1 | FT@25 |" in section and "curves.png" in section
    assert (tmp_path / "report/curves.png").is_file()
    (tmp_path / "plain").mkdir()
    publish(collected(tmp_path / "plain", {"KNE": (0.8, 0.9, 0.1), "FT@25": (0.5, 0.5, 0.5)}), tmp_path / "other")
    assert "## Curves" not in (tmp_path / "other/report.md").read_text()
    assert not (tmp_path / "other/curves.png").exists()
