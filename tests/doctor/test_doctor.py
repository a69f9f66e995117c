"""The preflight check of a sound plan: it passes, estimates the time, and leaves nothing behind."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy
import pytest
import torch
from conftest import fingerprint, tiny_hparams
from doctor_plan import lines, planned  # noqa: F401 (the fixture "plan")
from transformers import LlamaConfig

from kne_easyedit import bridge
from kne_easyedit.bridge import patches
from kne_easyedit.doctor import trial
from kne_easyedit.doctor.memory import memory_needed


def test_a_sound_plan_passes_with_an_estimate(plan, capsys):
    assert plan.check() == 0
    out = capsys.readouterr().out
    assert out.endswith("\nThe run can succeed.\n")
    assert not lines(out, "FAILURE")
    names = {line.split(":")[0].removeprefix("ok").strip() for line in lines(out, "ok")}
    assert names >= {
        "packages",
        "EasyEdit",
        "device",
        "model",
        "tokenizer",
        "data",
        "cache",
        "modules of KNE",
        "modules of FT-L",
        "memory of KNE",
        "memory of FT-L",
        "localisation",
        "trial of KNE",
        "trial of FT-L",
        "estimate",
    }
    assert {f"patch {patch.name}" for patch in patches.report()} <= names
    assert "padding will be left for KNE, FT-L" in out
    (estimate,) = (line for line in lines(out, "ok") if "estimate:" in line)
    assert "for 4 records" in estimate and "KNE: edits" in estimate and "FT-L: evaluations" in estimate


def test_nothing_is_left_behind(plan, monkeypatch):
    loaded = []
    original = trial.load_model

    def load_model(hparams):
        model, tokenizer = original(hparams)
        loaded.append((model, fingerprint(model)))
        return model, tokenizer

    monkeypatch.setattr(trial, "load_model", load_model)
    bridge.register()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    before = (
        random.getstate(),
        str(numpy.random.get_state()),
        torch.get_rng_state().tolist(),
        [list(own.handlers) for own in loggers],
    )
    here = Path.cwd()
    assert plan.check() == 0
    assert before == (
        random.getstate(),
        str(numpy.random.get_state()),
        torch.get_rng_state().tolist(),
        [list(own.handlers) for own in loggers],
    )
    assert Path.cwd() == here and not list(here.iterdir())
    ((model, start),) = loaded  # one model for both methods
    assert fingerprint(model) == start


def test_without_the_trial_no_model_is_loaded_and_nothing_is_written(plan, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("KNE_CACHE", str(tmp_path / "no/such/cache"))
    monkeypatch.setattr(trial, "load_model", lambda hparams: pytest.fail("loaded"))
    assert plan.check("--no-trial") == 0
    out = capsys.readouterr().out
    assert "trial: left out" in out and "estimate:" not in out
    assert out.endswith("The run can succeed.\n")
    assert not (tmp_path / "no").exists()


def test_what_the_cache_has_is_not_counted_again(plan, capsys):
    for there, more in (("0", True), ("2", True), ("4", False)):
        assert plan.check(methods=["KNE"]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "localisation:" in line)
        assert f"{there} of 4 facts are in the cache" in line
        assert ("2 more since now" in line) == more


def test_the_shipped_plan_fits_this_machine():
    """The default of the command, without its trial: test_real_model.py edits that model."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    assert memory_needed(config, tiny_hparams(p=0.04)).total < 2 * 2**30
