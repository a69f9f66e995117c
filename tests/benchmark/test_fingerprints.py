"""Fingerprints and folders of earlier versions: if one changes, finished runs would be computed again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kne_easyedit.benchmark import Run
from kne_easyedit.benchmark.config import job_folder
from kne_easyedit.benchmark.job import fingerprint, record_digest
from kne_easyedit.hparams import KNEHyperParams

REQUEST = {"prompt": "The capital of France is", "target_new": "Rome", "index": 0}


def job(mode: str, **changes) -> Run:
    hparams = KNEHyperParams(
        model_name="tiny",
        target_modules=["model.layers.{}.mlp.down_proj"],
        layers=[1, 2],
        device="cpu",
        **changes,
    )
    return Run(
        make_llama(), make_tokenizer(), [REQUEST], {"KNE": hparams}, "data", Path("out"), mode=mode, neighbours=0
    )


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("single", "38b86e2069286985"), ("batch", "c3ec02e1e49e464f"), ("sequential", "dcf34683f3be2089")],
)
def test_the_fingerprint_of_a_method(mode, expected):
    assert fingerprint(job(mode), "KNE", ["base"], None) == expected
    assert fingerprint(job(mode, p=0.5), "KNE", ["base"], None) != expected


def test_what_is_asked_beside_the_probes_of_easyedit_counts():
    """Of other records only where edits meet; the seed's choice of neighbours is no other setting."""
    without = job("single")
    found = {fingerprint(without, "KNE", ["base"], None)}
    for mode, changes in (("single", {"neighbours": 8}), ("single", {"contradiction": True}), ("batch", {})):
        run = replace(job(mode), neighbours=8, **changes) if mode == "batch" else replace(job(mode), **changes)
        found |= {fingerprint(run, "KNE", ["base"], None, {0: key}) for key in "ab"}
    assert len(found) == 1 + 1 + 1 + 2


def test_the_digest_of_a_record():
    expected = "584847790f0699ef4817664376aa1940cbb7618206aa2d7d7fffab6747ae2787"
    assert record_digest(REQUEST) == record_digest({**REQUEST, "index": 9}) == expected
    assert record_digest({**REQUEST, "target_new": "Oslo"}) != expected


def test_the_folder_of_a_job(monkeypatch):
    monkeypatch.setenv("KNOWEDIT", "data")
    hparams = Path(__file__).parents[2] / "hparams"

    def folder(*overrides: str) -> str:
        with initialize_config_dir(config_dir=str(hparams), version_base="1.3"):
            return str(
                job_folder(OmegaConf.to_container(compose("benchmark", overrides=list(overrides)), resolve=True))
            )

    of_before = "outputs/benchmark/smollm2-135m/counterfact/KNE-488cedb4/seed-42/shard-0-of-1"
    assert folder("evaluation.neighbours=0") == of_before
    assert "KNE-488cedb4" not in folder("evaluation.neighbours=0", "statistics.samples=7")
    assert len({of_before, folder(), folder("evaluation.neighbours=4"), folder("evaluation.contradiction=true")}) == 4
