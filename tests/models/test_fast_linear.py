"""oneDNN's products are torch's own up to rounding, and are used only where they may be."""

import pytest
import torch
from conftest import LLAMA_DOWN, ONE_TOKEN, fingerprint, tiny_hparams
from rounding import A_MODEL, ONE_SUM, roundings
from torch.nn import functional

from kne_easyedit import NeuronEnsemble, answer_loss, collate, encode, train_rows
from kne_easyedit.models import fast_linear as products
from kne_easyedit.models.fast_linear import fast_linear, linear, onednn_is_faster

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="THIS TORCH HAS NO ONEDNN: its products were not tested"
)


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch"])
def chosen(request, monkeypatch):
    """Counts oneDNN's products; the choice is forced both ways, whatever is faster here."""
    calls = []
    real = products._onednn
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(products, "_onednn", lambda *arguments: calls.append(1) or real(*arguments))
    return request.param, calls


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradient_are_torchs_own(chosen, shape, bias):
    faster, calls = chosen
    drawn = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=drawn).requires_grad_(), torch.randn(40, 24, generator=drawn)
    offset = torch.randn(40, generator=drawn) if bias else None
    expected = functional.linear(x, weight, offset)
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    found = linear(x, weight, offset)
    (own_slope,) = torch.autograd.grad(found.square().sum(), x)
    assert len(calls) == (2 if faster else 0)
    assert roundings(found, expected) < ONE_SUM and roundings(own_slope, slope) < ONE_SUM
    assert roundings(functional.linear(x, weight.roll(1, 0), offset), expected) > 1000 * ONE_SUM


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "trained weight", "trained bias", "no rows"])
def test_everything_else_is_left_to_torch(monkeypatch, kind):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_onednn", lambda *arguments: pytest.fail("not for this product"))
    dtype = getattr(torch, kind, torch.float32)
    x = torch.randn(0 if kind == "no rows" else 3, 8, dtype=dtype)
    weight = torch.randn(5, 8, dtype=dtype, requires_grad=kind == "trained weight")
    bias = torch.randn(5, dtype=dtype, requires_grad=kind == "trained bias")
    assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))  # the very same call


def test_a_model_has_it_inside_only(chosen, llama):
    faster, calls = chosen
    ids = torch.tensor([[3, 4, 5]])
    llama.requires_grad_(False)
    before, logits = fingerprint(llama), llama(input_ids=ids).logits
    with pytest.raises(KeyboardInterrupt), fast_linear(llama):
        assert roundings(llama(input_ids=ids).logits, logits) < A_MODEL
        raise KeyboardInterrupt
    assert bool(calls) is faster
    assert fingerprint(llama) == before
    del calls[:]
    assert torch.equal(llama(input_ids=ids).logits, logits) and not calls


@pytest.fixture
def asked(monkeypatch):
    """The question put afresh to a machine of one's own."""

    def ask(capability="AVX512", vendor="AuthenticAMD"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(products, "_vendor", lambda: vendor)
        return onednn_is_faster.__wrapped__()

    return ask


def test_only_where_mkl_leaves_avx512_unused(asked):
    assert asked() is True
    assert asked(capability="AVX2") is False and asked(vendor="GenuineIntel") is False and asked(vendor="") is False


def test_a_torch_without_the_entry_is_taken_as_it_is(asked, monkeypatch):
    def missing(*arguments):
        raise AttributeError("_linear_pointwise")

    monkeypatch.setattr(products, "_onednn", missing)
    assert asked() is False


def test_training_multiplies_by_the_faster_library(chosen, llama, tokenizer):
    faster, calls = chosen
    facts = [encode(tokenizer, *ONE_TOKEN)]
    ensemble = NeuronEnsemble({LLAMA_DOWN: {1: (0, 3, 5), 2: (1, 2)}}, {LLAMA_DOWN: 24}, (0, 1, 2, 3))
    before = fingerprint(llama)
    found = train_rows(llama, facts, ensemble, tiny_hparams(num_steps=1, stop_loss=0.0))
    assert fingerprint(llama) == before and bool(calls) == faster
    with torch.no_grad():
        expected = answer_loss(llama, collate(facts)).double()
    first, second = map(torch.tensor, found.losses)
    assert roundings(first, expected, torch.float32) < A_MODEL < roundings(second, expected, torch.float32)
