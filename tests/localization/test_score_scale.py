"""Scores scaled by layer (``score_scale: layer``): each layer's scores count relative to its largest."""

from __future__ import annotations

import pytest
import torch
from conftest import LLAMA_DOWN

from kne_easyedit import select_ensemble


def scores() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 25, generator=generator).abs() * torch.tensor([100.0, 1.0, 0.1, 10.0])[:, None]


def test_scaled_scores_spread_the_ensemble_over_the_layers():
    plain = select_ensemble(scores(), 0.2, target_module=LLAMA_DOWN)
    scaled = select_ensemble(scores(), 0.2, target_module=LLAMA_DOWN, scale="layer")
    assert plain.counts()[LLAMA_DOWN][1] == plain.counts()[LLAMA_DOWN][2] == 0
    assert min(scaled.counts()[LLAMA_DOWN].values()) >= 1
    assert plain.size == scaled.size == 20


def test_a_layers_scale_does_not_matter_to_scaled_scores():
    factors = torch.tensor([3.0, 50.0, 0.01, 1.0])[:, None]
    one = select_ensemble(scores(), 0.2, target_module=LLAMA_DOWN, scale="layer")
    other = select_ensemble(scores() * factors, 0.2, target_module=LLAMA_DOWN, scale="layer")
    assert one.members() == other.members()
    assert (
        select_ensemble(scores() * factors, 0.2, target_module=LLAMA_DOWN).members()
        != select_ensemble(scores(), 0.2, target_module=LLAMA_DOWN).members()
    )


def test_a_layer_without_a_positive_score_stays_empty():
    values = scores()
    values[1] = -values[1]
    found = select_ensemble(values, 0.9, target_module=LLAMA_DOWN, scale="layer")
    assert found.counts()[LLAMA_DOWN][1] == 0


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale: 'module' must be one of"):
        select_ensemble(scores(), 0.2, target_module=LLAMA_DOWN, scale="module")
