"""glibc accepts the settings where there is a glibc; weights are moved without changing a bit."""

from __future__ import annotations

import platform

import torch
from conftest import make_llama, weights

from kne_easyedit.machine import align, keep_large_blocks


def test_takes_effect_on_glibc_only(monkeypatch):
    assert keep_large_blocks() == (platform.system() == "Linux" and platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_large_blocks() is False


def test_weights_are_moved_to_vector_boundaries_and_stay_the_same():
    model = make_llama()
    odd = model.model.layers[1].mlp.down_proj.weight
    memory = torch.empty(odd.numel() + 32)
    start = next(i for i in range(1, 17) if memory[i:].data_ptr() % 64)
    odd.data = memory[start : start + odd.numel()].view_as(odd).copy_(odd)
    before = weights(model)
    assert odd.data_ptr() % 64
    assert align(model) >= 1 and align(model) == 0
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
    assert weights(model) == before and model.lm_head.weight is model.model.embed_tokens.weight
