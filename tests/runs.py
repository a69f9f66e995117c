"""A tiny run for tests of the benchmark: records, a job, and what its edits are counted by."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer, tiny_hparams

from kne_easyedit.benchmark import Run
from kne_easyedit.bridge import MethodEditor, load_method
from kne_easyedit.facts.records import to_request

HPARAMS = Path(__file__).parents[1] / "hparams"


def record(subject="France", target="Rome", **changes) -> dict:
    probe = [{"prompt": "The river that flows through Rome is", "ground_truth": [["the Tiber"]]}]
    base = {
        "subject": subject,
        "prompt": f"The capital of {subject} is",
        "target_new": target,
        "ground_truth": "Paris",
        "portability": {"Reasoning": probe},
        "locality": {"Relation_Specificity": deepcopy(probe), "Forgetfulness": deepcopy(probe)},
    }
    return {**base, **changes}


RECORDS = [record(), record("Spain", "Oslo")]


@pytest.fixture(name="job")
def job_fixture(tmp_path):
    data = tmp_path / "localize.json"
    data.write_text(json.dumps([record("Peru", "Lima"), record("Italy", "Madrid")]))
    hparams = tiny_hparams(localization_data=str(data), localization_size=2)
    requests = [{**to_request(r), "index": i} for i, r in enumerate(RECORDS)]
    return Run(make_llama(), make_tokenizer(), requests, {"KNE": hparams}, "RECORDS", tmp_path / "out")


@pytest.fixture(name="no_fluency")
def no_fluency_fixture(job):
    """Without the texts of hundreds of tokens that fluency is measured on: a third of a run's time."""
    job.fluency = False


@pytest.fixture(name="quick")
def quick_fixture(job, monkeypatch):
    """A run for its files and lines: edits need not succeed, and nothing is drawn."""
    job.fluency = False
    job.hparams["KNE"].num_steps = 3
    monkeypatch.setattr("kne_easyedit.benchmark.figures.draw_ensemble", lambda *_args, **_kwargs: None)
    monkeypatch.setattr("kne_easyedit.benchmark.figures.draw_retention", lambda *_args, **_kwargs: None)


def ft():
    """FT of EasyEdit for the tiny model."""
    hparams = load_method("FT", HPARAMS / "FT/smollm2-135m.yaml")
    hparams.layers, hparams.num_steps = [2], 3
    return hparams


def lines_of(job) -> list[dict]:
    return [json.loads(line) for line in (job.folder / "results.jsonl").read_text().splitlines()]


def counting(monkeypatch, stop_at: int | None = None) -> list[int]:
    """Counts EasyEdit's edits by the subjects that it edits; the ``stop_at``-th is interrupted."""
    edited: list[str] = []
    apply = MethodEditor.apply

    def counted(self, requests):
        if len(edited) + 1 == stop_at:
            raise KeyboardInterrupt
        edited.extend(request["subject"] for request in requests)
        return apply(self, requests)

    monkeypatch.setattr(MethodEditor, "apply", counted)
    return edited
