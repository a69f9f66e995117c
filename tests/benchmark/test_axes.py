"""Jobs of one label that differ in p, facts, module or batch size are points of a curve, without own labels."""

from __future__ import annotations

import json

import pytest
from made_results import MANIFEST, line, write

from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.curves import curves
from kne_easyedit.benchmark.markdown_report import report_text

SETTINGS = {"p": 0.04, "localization_size": 200, "target_modules": ["model.layers.{}.mlp.down_proj"], "lr": 0.005}


def job(folder, name: str, manifest=None, label="KNE", data="test_cf", seed=42, success=1.0, **settings) -> None:
    """Results with their manifest, of settings that differ from the others' in what is given."""
    own = {**SETTINGS, **settings}
    print_of = json.dumps([own, manifest, data], sort_keys=True)
    lines = [
        line(label, i, success, data, fingerprint=f"{print_of}{seed}", settings=print_of, seed=seed) for i in range(2)
    ]
    write(folder / name / "results.jsonl", lines)
    about = {
        **MANIFEST,
        "data": {"name": f"{data}.json"},
        "batch_size": 1,
        "second_moments": {},
        "methods": {label: own},
        "localization": {label: {"facts": 3}},
        "fingerprints": {label: f"{print_of}{seed}"},
        **(manifest or {}),
    }
    (folder / name / "manifest.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("name", "values", "labels", "axis"),
    [
        ("p", (0.04, 0.2, 1), ["KNE@0.04", "KNE@0.2", "KNE@1"], "p, the share of the rows"),
        ("localization_size", (5, 20), ["KNE@5", "KNE@20"], "facts localised on"),
        (
            "target_modules",
            (["m.{}.down_proj"], ["m.{}.down_proj", "m.{}.up_proj"]),
            ["KNE@down_proj", "KNE@down_proj+up_proj"],
            "module",
        ),
    ],
)
def test_the_points_of_one_axis(tmp_path, name, values, labels, axis):
    for value in values:
        for seed in (1, 2):
            job(tmp_path, f"{value}-{seed}".replace("/", ""), seed=seed, **{name: value})
    found = collect([tmp_path])
    assert curves(found.methods) == {"KNE": labels} and found.axes == {"KNE": axis}
    assert all(len(found.of("counterfact", label)) == 4 for label in labels), "seeds are one point"
    assert sorted(label for manifest in found.manifests for label in manifest["localization"]) == sorted(labels * 2)
    assert f"KNE: {axis}." in report_text(found, "Report", {})


def test_batches_are_an_axis_too(tmp_path):
    for n in (10, 2):
        job(tmp_path, str(n), {"mode": "batch", "batch_size": n})
    assert curves(collect([tmp_path]).methods) == {"KNE": ["KNE@2", "KNE@10"]}


def test_of_two_axes_one_is_in_the_name(tmp_path):
    for p in (0.1, 0.2):
        for module in ("down_proj", "up_proj"):
            job(tmp_path, f"{p}-{module}", p=p, target_modules=[f"m.{{}}.{module}"])
    found = curves(collect([tmp_path]).methods)
    assert found == {f"KNE-{module}": [f"KNE-{module}@0.1", f"KNE-{module}@0.2"] for module in ("down_proj", "up_proj")}


def test_a_label_that_is_swept_on_one_data_set_has_points_on_all(tmp_path):
    for p in (0.1, 0.2):
        job(tmp_path, str(p), p=p)
    job(tmp_path, "other", data="ZsRE-test-all", p=0.2)
    job(tmp_path, "ft", label="FT")
    found = collect([tmp_path])
    assert found.methods == ["FT", "KNE@0.1", "KNE@0.2"] and len(found.of("zsre", "KNE@0.2")) == 2


@pytest.mark.parametrize(
    "second", [{"p": 0.2, "lr": 0.01}, {"lr": 0.01}, {"p": 0.2, "manifest": {"chat_template": True}}, {"p": "x"}]
)
def test_what_differs_in_more_is_no_curve(tmp_path, second):
    job(tmp_path, "a")
    job(tmp_path, "b", **second)
    with pytest.raises(ValueError, match="KNE on counterfact under different settings"):
        collect([tmp_path])


def test_labels_are_as_they_were_where_nothing_is_swept(tmp_path):
    job(tmp_path, "a", seed=1)
    job(tmp_path, "b", seed=2)
    job(tmp_path, "c", label="KNE@0.2", p=0.2)
    found = collect([tmp_path])
    assert found.methods == ["KNE", "KNE@0.2"] and found.axes == {}
