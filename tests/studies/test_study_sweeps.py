"""Studies under Hydra: all points from one command, with any launcher, in the same folders as those of `kne study`."""

from __future__ import annotations

import json
import subprocess

import pytest
from hydra_jobs import ROOT, command, composed, environment, place_fixture, run  # noqa: F401  (a fixture)

from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.config import job_folder
from kne_easyedit.studies.plan import job_settings, plan_of, without_study
from kne_easyedit.studies.reading import read_studies

SETTINGS = {
    "study": {"name": "facts", "point": None, "values": [1, 2], "draws": 1, "sequences": None, "series": None},
    "seed": 42,
    "shard": "0/1",
    "on_bad_record": "fail",
    "out": "out",
    "model": {"file": "smollm2-135m", "settings": {"model_name": "tiny-model"}},
    "data": {
        "name": "tiny",
        "file": "records.json",
        "offset": 0,
        "records": 1,
        "localization": {"file": "facts.json", "offset": 0, "size": 2},
    },
    "method": {"label": "KNE", "hparams": "KNE", "settings": {"layers": [2]}},
    "evaluation": {
        "mode": "single",
        "batch_size": 1,
        "retention_every": 10,
        "chat_template": False,
        "fluency": False,
        "neighbours": 8,
        "contradiction": False,
    },
    "statistics": {"file": None, "samples": 4, "length": 64},
}


@pytest.mark.parametrize("launcher", ["basic", pytest.param("two_workers", marks=pytest.mark.slow)])
def test_all_points_of_a_study(place, launcher):
    out = f"studied-{launcher}"
    run(
        place,
        out,
        "+study=facts",
        "study.values=[1,2]",
        "study.draws=1",
        f"hydra/launcher={launcher}",
        "++method.settings.num_steps=2",
        "data.records=1",
        "evaluation.fluency=false",
    )
    found = collect([place / out])
    assert sorted((line["method"], line["index"]) for line in found.lines) == [("KNE-facts@1", 0), ("KNE-facts@2", 0)]
    settings = {name: its for manifest in found.manifests for name, its in manifest["methods"].items()}
    assert [settings[f"KNE-facts@{n}"]["localization_size"] for n in (1, 2)] == [1, 2]
    (curves,) = read_studies([place / out]).curves
    assert [cell.value for cell in curves.of("facts")] == ["1", "2"]


@pytest.mark.slow
def test_what_cannot_be_filled_ends_the_sweep_before_it_starts(place):
    arguments = command(place, "unfilled", "+study=facts", "study.values=[1,3]")
    done = subprocess.run(arguments, cwd=place, env=environment(place), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "3 facts: the data to localise on has 2 that are not edited" in done.stderr
    assert not list((place / "unfilled").rglob("results.jsonl"))


def test_the_folder_of_a_point_does_not_depend_on_how_it_is_named(place, monkeypatch):
    monkeypatch.chdir(place)
    plan = plan_of(SETTINGS, ROOT / "hparams")
    named = {**SETTINGS, "study": {**SETTINGS["study"], "point": "KNE-facts@2"}}
    job = job_settings(named, ROOT / "hparams")
    assert job_folder(job) == job_folder(plan.point("KNE-facts@2").configured(without_study(SETTINGS)))
    assert "study" not in job and job["method"]["label"] == "KNE-facts@2"
    assert job["method"]["settings"] == {"layers": [2], "localization_offset": 0, "localization_size": 2}
    assert json.dumps(job_settings(without_study(SETTINGS), ROOT / "hparams")) == json.dumps(without_study(SETTINGS))


def test_without_a_sweep_a_study_has_no_point(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match=r"study\.point: names no point; give -m"):
        job_settings(SETTINGS, ROOT / "hparams")
    wrong = {**SETTINGS, "method": {**SETTINGS["method"], "hparams": "FT", "settings": {}}}
    with pytest.raises(ValueError, match=r"method\.hparams: 'FT'; the studies are of KNE"):
        plan_of(wrong, ROOT / "hparams")


@pytest.mark.parametrize("name", ["location", "facts", "share", "batch"])
def test_the_configurations_compose(name):
    assert composed(f"+study={name}").study.name == name
