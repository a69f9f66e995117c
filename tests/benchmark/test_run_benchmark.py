"""scripts/run_benchmark.py as users call it: multirun with two workers, shards, a kill, launchers by configuration."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import HANGS
from hydra_jobs import ROOT, TINY, command, composed, environment, place_fixture, run  # noqa: F401  (a fixture)
from omegaconf import OmegaConf

from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.config import hparams_of, job_of, shard_of
from kne_easyedit.benchmark.publish import publish
from kne_easyedit.hparams import KNEHyperParams


def figures_of(folder: Path) -> list[dict]:
    """The lines without what time alone decides."""
    drop = ("seconds", "peak_bytes")
    return sorted(
        ({k: v for k, v in line.items() if k not in drop} for line in collect([folder]).lines),
        key=lambda line: (line["method"], line["index"]),
    )


@pytest.mark.slow
def test_two_methods_with_two_workers_and_shards_equal_one_run(place):
    """Joblib for real; the shards' lines merge to exactly those of one run, which a second run repeats exactly."""
    run(place, "whole", "benchmark/method@method=kne,ft")
    run(place, "parts", "benchmark/method@method=kne,ft", "shard=0/2,1/2", "hydra/launcher=two_workers")
    whole = figures_of(place / "whole")
    assert [(line["method"], line["index"]) for line in whole] == [
        ("FT", 0),
        ("FT", 1),
        ("FT", 2),
        ("KNE", 0),
        ("KNE", 1),
        ("KNE", 2),
    ]
    assert figures_of(place / "parts") == whole
    assert len(list((place / "parts").rglob("results.jsonl"))) == 4
    assert (
        len(list((place / "whole/before").glob("*.json"))) == 3
    )  # both methods share what was measured before the edits
    manifest = json.loads(next((place / "whole").rglob("KNE*/**/manifest.json")).read_text())
    wanted = {
        "easyedit",
        "model",
        "data",
        "methods",
        "seed",
        "padding",
        "fluency_variant",
        "machine",
        "environment",
        "fingerprints",
    }
    assert wanted <= set(manifest)
    assert len(manifest["data"]["sha256"]) == len(manifest["model"]["sha256"]) == 64
    publish(collect([place / "whole"]), place / "report")
    text = (place / "report/report.md").read_text()
    assert "records: 3;" in text
    assert all(fingerprint in text for fingerprint in manifest["fingerprints"].values())
    assert [list(m["methods"]) for m in json.loads((place / "report/manifests.json").read_text())] == [["FT"], ["KNE"]]


KILLED = """
import os, runpy, signal, sys
from kne_easyedit.benchmark.store import Lines

append, lines = Lines.append, []

def dying(self, line):
    append(self, line)
    lines.append(line)
    if len(lines) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Lines.append = dying
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script and kills it from within, right after its second line."""


def test_a_killed_run_goes_on_and_repeats_nothing(place):
    python, *script = command(place, "killed", "benchmark/method@method=ft", "evaluation.fluency=false")
    done = subprocess.run(
        [python, "-c", KILLED, *script],
        cwd=place,
        env=environment(place),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=HANGS,
    )
    assert done.returncode == -signal.SIGKILL
    (results,) = (place / "killed").rglob("results.jsonl")
    kept = results.read_text()
    assert kept.count("\n") == 2
    run(place, "killed", "benchmark/method@method=ft", "evaluation.fluency=false")
    assert results.read_text().startswith(kept[: kept.rindex("\n") + 1])
    assert [json.loads(line)["index"] for line in results.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.slow
def test_another_process_knows_the_lines_of_an_ensemble(place):
    """Sets have another order in every process; what stands for an ensemble must not."""
    for seed in ("1", "2"):
        run(
            place,
            "again",
            "benchmark/method@method=kne",
            "++method.settings.p=0.5",
            "++method.settings.layers=[]",
            PYTHONHASHSEED=seed,
        )
    (results,) = (place / "again").rglob("results*.jsonl")  # nothing was moved aside
    assert len(results.read_text().splitlines()) == 3
    assert json.loads((results.parent / "manifest.json").read_text())["localization"]["KNE"]["neurons"] > 10


@pytest.mark.parametrize(
    ("launcher", "plugin", "settings"),
    [
        ("two_workers", "joblib_launcher.JoblibLauncher", {"n_jobs": 2}),
        (
            "slurm",
            "submitit_launcher.SlurmLauncher",
            {"timeout_min": 720, "gpus_per_node": 1, "cpus_per_task": 8, "mem_gb": 64},
        ),
        (
            "ray_cluster",
            "ray_launcher.RayLauncher",
            {
                "ray": {
                    "init": {"address": "auto", "object_store_memory": None},
                    "remote": {"num_cpus": 8, "num_gpus": 1, "max_retries": 3},
                }
            },
        ),
    ],
)
def test_launchers_are_a_matter_of_configuration(launcher, plugin, settings):
    """Composed against the plugin's own schema: a setting that it does not know would be refused."""
    found = OmegaConf.to_container(composed(f"hydra/launcher={launcher}").hydra.launcher)
    assert found["_target_"].endswith(plugin)
    assert {name: found[name] for name in settings} == settings


def test_a_launchers_setting_that_its_plugin_does_not_know_is_refused():
    with pytest.raises(Exception, match="minutes"):
        composed("hydra/launcher=slurm", "hydra.launcher.minutes=3")


@pytest.mark.parametrize("method", sorted(path.stem for path in (ROOT / "hparams/benchmark/method").glob("*.yaml")))
@pytest.mark.parametrize("data", sorted(path.stem for path in (ROOT / "hparams/benchmark/data").glob("*.yaml")))
def test_every_combination_of_groups_composes_and_its_hparams_are_there(method, data):
    for model in sorted(path.stem for path in (ROOT / "hparams/benchmark/model").glob("*.yaml")):
        config = composed(
            f"benchmark/method@method={method}", f"benchmark/data@data={data}", f"benchmark/model@model={model}"
        )
        assert (ROOT / "hparams" / config.method.hparams / f"{config.model.file}.yaml").is_file()


def test_the_facts_of_localisation_are_none_of_those_that_are_edited():
    for data in ("counterfact", "zsre", "recent", "embedded"):
        found = composed(f"benchmark/data@data={data}").data
        if found.file == found.localization.file:
            localised = range(found.localization.offset, found.localization.offset + found.localization.size)
            edited = range(found.offset, found.offset + (found.records or 10**6))
            assert not set(localised) & set(edited), data


@pytest.mark.parametrize("method", ["kne", "kne_up"])
def test_kne_means_the_papers_settings_whatever_a_models_file_says(method):
    defaults = {f.name: f.default for f in fields(KNEHyperParams)}  # the class has the paper's
    settings = OmegaConf.to_container(composed(f"benchmark/method@method={method}").method.settings)
    tuned = OmegaConf.to_container(composed("benchmark/method@method=kne_tuned").method.settings)
    on_up = composed("benchmark/method@method=kne_up_tuned").method.settings
    assert on_up == {**tuned, "target_modules": ["model.layers.{}.mlp.up_proj"]}
    assert {name: settings[name] for name in tuned} == {name: defaults[name] for name in tuned}
    spare = OmegaConf.to_container(composed("benchmark/method@method=kne_spare").method.settings)
    shipped = KNEHyperParams.from_hparams(ROOT / "hparams/KNE/smollm2-135m.yaml")
    assert {name: getattr(shipped, name) for name in spare} == spare != {name: defaults[name] for name in spare}


def test_text_for_second_moments_comes_from_facts_that_are_not_edited(place, monkeypatch):
    monkeypatch.chdir(place)
    common = [
        "benchmark/data@data=embedded",
        "data.file=records.json",
        "data.offset=0",
        "data.localization.file=facts.json",
        *TINY[:2],
    ]
    jobs = {}
    for method in ("memit", "ft"):
        config = composed(f"benchmark/method@method={method}", *common)
        config = OmegaConf.masked_copy(config, [name for name in config if name != "hydra"])
        jobs[method] = job_of(OmegaConf.to_container(config, resolve=True), ROOT / "hparams")
    assert jobs["memit"].moments_text.prompts == ("The capital of Italy is", "The capital of Rome is")
    assert jobs["ft"].text_source.prompts == ()  # needs no other facts, so none are asked for


@pytest.mark.parametrize(
    ("localized", "settings", "expected"),
    [
        ("facts.json", {"input_projection": True}, "facts.json"),
        ("facts.json", {}, None),  # nothing trains on neighbours: the fingerprint stays
        ("records.json", {"input_projection": True}, None),  # its other records are edited
        ("embedded", {"input_projection": True}, None),
        ("facts.json", {"input_projection": True, "neighbour_data": "embedded"}, "embedded"),
    ],
)
def test_neighbours_are_made_of_the_whole_file_localised_on_unless_its_records_are_edited(
    localized, settings, expected, place, monkeypatch
):
    monkeypatch.chdir(place)
    config = composed(
        "benchmark/method@method=kne",
        "benchmark/data@data=embedded",
        "data.file=records.json",
        "data.offset=0",
        "data.records=1",
        f"data.localization.file={localized}",
        "data.localization.offset=1",
        *(f"++method.settings.{name}={str(value).lower()}" for name, value in settings.items()),
        *TINY[:2],
    )
    config = OmegaConf.masked_copy(config, [name for name in config if name != "hydra"])
    job = job_of(OmegaConf.to_container(config, resolve=True), ROOT / "hparams")
    assert job.hparams["KNE"].neighbour_data == expected


def test_shards_expect_each_other_at_the_facts_that_all_are_localised_on(place, monkeypatch):
    monkeypatch.chdir(place)
    data = ["benchmark/data@data=embedded", "data.file=records.json", "data.offset=0"]
    config = composed(*data, "data.localization.file=facts.json", "shard=1/3", *TINY[:2])
    config = OmegaConf.masked_copy(config, [name for name in config if name != "hydra"])
    job = job_of(OmegaConf.to_container(config, resolve=True), ROOT / "hparams")
    assert job.jobs == 3 and len(job.requests) == 1


@pytest.mark.parametrize("text", ["2/2", "1", "a/b", "-1/2", "0/0", ""])
def test_a_shard_that_is_none(text):
    with pytest.raises(ValueError, match=r"shard: .* is no part i/n"):
        shard_of(text)


def settings_of(*overrides: str) -> dict:
    config = composed("benchmark/data@data=embedded", *overrides, *TINY[:2])
    own = OmegaConf.masked_copy(config, [name for name in config if name != "hydra"])
    return OmegaConf.to_container(own, resolve=True)


@pytest.mark.parametrize("mode", ["sequential", "batch"])
def test_parts_of_what_belongs_together_are_refused(mode, place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match=f"shard: 1/3 with evaluation.mode {mode}: .*run it whole"):
        job_of(settings_of(f"evaluation.mode={mode}", "shard=1/3"), ROOT / "hparams")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lr=fast", "method.settings.lr: 'fast' is a str, expected a float, as 0.0005 is"),
        ("layers=2", r"method.settings.layers: 2 is a int, expected a list, as \[21\] is"),
        ("layers=[x]", r"method.settings.layers: \['x'\] is a str, expected a int"),
        ("num_steps=2.5", "method.settings.num_steps: 2.5 is a float, expected a int, as 25 is"),
    ],
)
def test_a_baselines_setting_of_another_type_is_refused(override, says, place, monkeypatch):
    """EasyEdit's classes take anything, and every record fails by it."""
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match=says):
        hparams_of(settings_of("benchmark/method@method=ft", f"++method.settings.{override}"), ROOT / "hparams")


def test_a_rate_that_yaml_reads_as_a_text_is_one(place, monkeypatch):
    monkeypatch.chdir(place)
    ft = "benchmark/method@method=ft"
    assert hparams_of(settings_of(ft, "++method.settings.lr='5e-4'"), ROOT / "hparams").lr == 5e-4
    assert hparams_of(settings_of(ft, "++method.settings.lr=1"), ROOT / "hparams").lr == 1.0


@pytest.mark.parametrize(("method", "refused"), [("kne", True), ("memit", True), ("ft", False)])
def test_facts_that_are_localised_on_are_not_edited(method, refused, place, monkeypatch):
    """Wherever the ranges come from, and however the file is written; FT learns of no other facts."""
    monkeypatch.chdir(place)
    ranges = ["data.localization.offset=0", "data.localization.size=2", "data.offset=1", "data.records=1"]
    files = ["data.file=records.json", f"data.localization.file={place}/records.json"]
    settings = settings_of(f"benchmark/method@method={method}", *files, *ranges)
    if refused:
        with pytest.raises(ValueError, match=r"data.localization: records 1 to 1 of .*records.json are both localised"):
            job_of(settings, ROOT / "hparams")
    else:
        assert len(job_of(settings, ROOT / "hparams").requests) == 1
    settings["data"]["localization"]["size"] = 1
    assert len(job_of(settings, ROOT / "hparams").requests) == 1
