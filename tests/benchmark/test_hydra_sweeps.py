"""Sweeps of scripts/run_benchmark.py: every job keeps its results; what a report would refuse is refused first."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import LLAMA_DOWN
from hydra_jobs import ROOT, command, composed, environment, place_fixture, run  # noqa: F401  (a fixture)
from omegaconf import OmegaConf

from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.config import job_folder, job_of
from kne_easyedit.benchmark.hydra_sweep import first_clash

FAST = ["++method.settings.num_steps=2", "evaluation.fluency=false"]


def settings(*overrides: str) -> dict:
    config = composed(*overrides)
    return OmegaConf.to_container(
        OmegaConf.masked_copy(config, [name for name in config if name != "hydra"]), resolve=True
    )


@pytest.mark.parametrize(
    "changes",
    [
        ["data.localization.size=7"],
        ["data.localization.offset=7"],
        ["data.localization.file=f.json"],
        ["data.offset=7"],
        ["data.records=7"],
        ["data.file=f.json"],
        ["evaluation.mode=sequential"],
        ["evaluation.mode=batch", "evaluation.batch_size=2"],
        ["evaluation.retention_every=7"],
        ["evaluation.chat_template=true"],
        ["evaluation.fluency=false"],
        ["statistics.samples=7"],
        ["statistics.length=7"],
        ["statistics.file=f.txt"],
        ["++method.settings.p=0.5"],
        ["++model.settings.model_name=m"],
        ["on_bad_record=fail"],
    ],
)
def test_whatever_distinguishes_jobs_distinguishes_their_folders(changes):
    assert job_folder(settings(*changes)) != job_folder(settings())
    assert job_folder(settings(*changes)) == job_folder(settings(*changes))


def test_what_is_to_be_read_in_a_folder(tmp_path):
    folder = job_folder(settings("out=o", "seed=7", "shard=1/3", "method.label=mine"))
    out, model, data, method, seed, shard = folder.parts
    assert (out, model, data, method.rpartition("-")[0], seed, shard) == (
        "o",
        "smollm2-135m",
        "counterfact",
        "mine",
        "seed-7",
        "shard-1-of-3",
    )
    assert job_folder(settings("seed=7")).parent.parent == job_folder(settings("seed=8")).parent.parent


@pytest.mark.parametrize(
    "name",
    ["../up", "a/b", "/root", "..", ".", "", "x" * 101, "é" * 101, "dot.", " blank", "a\x00b", "a\nb", "a:b", "a\\b"],
)
@pytest.mark.parametrize("field", ["method.label", "data.name", "model.file"])
def test_names_never_leave_their_folder(field, name):
    found = settings()
    group, key = field.split(".")
    found[group][key] = name
    with pytest.raises(ValueError, match=rf"{field}: .*folders and files are called by it"):
        job_folder(found)


@pytest.mark.parametrize("launcher", ["two_workers"])
def test_every_job_of_a_sweep_keeps_its_results(place, launcher):
    """Over what the method's own settings do not say; with two workers they may not even meet in one folder."""
    out = f"swept-{launcher}"
    run(
        place,
        out,
        f"hydra/launcher={launcher}",
        "benchmark/method@method=ft",
        "evaluation.fluency=true,false",
        'method.label="FT-${evaluation.fluency}"',
        "data.records=2,1",
        "++method.settings.num_steps=2",
    )
    lines = [
        line
        for file in (place / out).rglob("results.jsonl")
        for line in map(json.loads, file.read_text().split("\n")[:-1])
    ]
    assert sorted((line["method"], line["index"]) for line in lines) == [
        (label, index) for label in ("FT-False", "FT-True") for index in (0, 0, 1)
    ]
    assert [len(collect([place / out]).of("records", label)) for label in ("FT-False", "FT-True")] == [2, 2]


def test_a_longer_run_takes_over_the_lines_of_a_shorter_one_and_of_one_of_old(place):
    run(place, "longer", "benchmark/method@method=ft", "data.records=1", *FAST)
    (short,) = (place / "longer").rglob("results.jsonl")
    old = short.parents[2].with_name("FT")  # as folders were called when all settings were the shipped ones
    short.parents[2].rename(old)
    (line,) = (old / "seed-42/shard-0-of-1/results.jsonl").read_text().split("\n")[:-1]
    run(place, "longer", "benchmark/method@method=ft", "data.records=2", *FAST)
    (longer,) = [file for file in (place / "longer").rglob("results.jsonl") if old not in file.parents]
    assert longer.read_text().startswith(line + "\n")  # seconds and all: it was not made again
    assert [json.loads(text)["index"] for text in longer.read_text().split("\n")[:-1]] == [0, 1]


MODULES = f'++method.settings.target_modules=["{LLAMA_DOWN}"],["model.layers.{{}}.mlp.up_proj"]'


@pytest.mark.slow
def test_modules_and_shares_are_told_apart_without_labels(place):
    run(place, "axes", "benchmark/method@method=kne", MODULES, "++method.settings.p=0.2,0.4", "data.records=1", *FAST)
    found = collect([place / "axes"])
    assert found.methods == [f"KNE-{module}@{p}" for module in ("down_proj", "up_proj") for p in ("0.2", "0.4")]


@pytest.mark.parametrize("launcher", ["basic", "two_workers"])
def test_a_sweep_whose_report_would_be_refused_does_not_start(place, launcher):
    out = f"refused-{launcher}"
    swept = "++method.settings.num_steps=2,3"
    arguments = command(place, out, "benchmark/method@method=kne", swept, f"hydra/launcher={launcher}")
    done = subprocess.run(arguments, cwd=place, env=environment(place), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "two jobs of this sweep would both be called 'KNE' in the report on records" in done.stderr
    assert (
        "method.settings.num_steps" in done.stderr
        and "'method.label=" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list((place / out).rglob("manifest.json"))


def test_which_jobs_can_stand_in_one_report():
    """Converses: seeds, shards, more records and other data sets are no other settings; a label of its own helps."""
    same = [
        settings(*changes)
        for changes in ([], ["seed=1"], ["shard=0/2"], ["data.records=3"], ["data.offset=3"], ["out=elsewhere"])
    ]
    others = [settings(f"benchmark/data@data={name}") for name in ("zsre", "recent")]
    methods = [settings(f"benchmark/method@method={name}") for name in ("ft", "kne_up", "kne_tuned")]
    assert first_clash([*same, *others, *methods]) is None
    for change in (
        "evaluation.fluency=false",
        "evaluation.mode=sequential",
        "++method.settings.lr=0.5",
        "statistics.samples=7",
    ):
        changed = settings(change)
        assert change.partition("=")[0].removeprefix("++") in first_clash([settings(), changed])
        changed["method"]["label"] = "another"
        assert first_clash([settings(), changed]) is None
    for axis in ("data.localization.size=7", "++method.settings.p=0.5", "++method.settings.target_modules=[a]"):
        assert first_clash([settings(), settings(axis)]) is None  # the report tells them apart
        ft = [settings(*changes, "benchmark/method@method=ft") for changes in ([], [axis])]
        assert axis.partition("=")[0].removeprefix("++") in first_clash(ft)
    assert first_clash([settings("evaluation.mode=batch", f"evaluation.batch_size={n}") for n in (1, 5)]) is None
    sequences = [settings("evaluation.mode=sequential", f"data.records={n}") for n in (3, 4)]
    assert "data.records: 3 and 4" in first_clash(sequences)  # in a sequence each edit depends on the others


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=abc", "seed: 'abc' is a str, expected int"),
        ("data.records=0", "data.records: 0 must be at least 1"),
        ("data.records=x", "data.records: 'x'"),
        ("evaluation.batch_size=two", "evaluation.batch_size: 'two'"),
        ("evaluation.fluency=3", "evaluation.fluency: 3"),
        ("data.localization.size=0", "data.localization.size: 0"),
        ("method.settings=3", "method.settings: 3"),
        ("data.file=null", "data.file: None"),
        ("statistics.samples=many", "statistics.samples: 'many'"),
        ("method.label=../up", "method.label: '../up'"),
    ],
)
def test_odd_values_in_a_configuration_are_named(override, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        job_of(settings(override), ROOT / "hparams")


def test_relative_paths_mean_where_the_command_was_given_whatever_hydra_does(place):
    run(
        place,
        "moved",
        "benchmark/method@method=kne",
        "hydra.job.chdir=true",
        "++method.settings.kl_data=records.json",
        "++method.settings.kl_weight=1",
        "++method.settings.cache_dir=my-cache",
        "data.records=1",
        *FAST,
    )
    assert list((place / "moved").rglob("results.jsonl"))
    assert (place / "my-cache").is_dir() and Path(place / "my-cache/scores").is_dir()
