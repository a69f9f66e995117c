"""Fixtures of tests that store scores of the tiny Llama, or count what is attributed."""

from __future__ import annotations

import pytest
import torch
from conftest import all_layers, tiny_hparams
from localizing import Attributed

from kne_easyedit.attribution.score_cache import ScoreCache
from kne_easyedit.localization import localizer

STEPS = 4


@pytest.fixture
def target(llama):
    """``down_proj`` in all layers."""
    return all_layers(llama)


@pytest.fixture
def cache(llama, tmp_path):
    return ScoreCache(tmp_path, llama, STEPS)


@pytest.fixture
def scores():
    return torch.randn(4, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def stored(cache, target, facts, scores):
    """The file of one entry."""
    cache.put(target, facts[0], scores)
    return cache.path(target, facts[0])


@pytest.fixture
def attributed(monkeypatch):
    """Records what is attributed from here on."""
    recording = Attributed()
    monkeypatch.setattr(localizer, "attribute_facts", recording)
    return recording


@pytest.fixture
def hparams(tmp_path):
    """Each fact is its own sweep: its scores have the same bits whatever else is computed."""
    return tiny_hparams(cache_dir=str(tmp_path), chunk_rows=1)
