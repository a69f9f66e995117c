"""The sweep starts from a value: frozen, without graphs of autograd, as good for a second sweep as for the first."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from conftest import FACTS, SIZE, resolve_target
from families import make

from kne_easyedit.attribution import gauss_legendre, preparation, riemann
from kne_easyedit.attribution.preparation import prepare
from kne_easyedit.attribution.replay import Replay
from kne_easyedit.attribution.sweep import add_points, scores, start_integrals
from kne_easyedit.facts.encoding import encode
from kne_easyedit.models.state import preserve_state


@pytest.fixture
def targets(family):
    return [resolve_target(family.model, family.down), resolve_target(family.model, family.up, [1, 3])]


@pytest.fixture
def replay(family, targets):
    with preserve_state(family.model), Replay(family.model, targets[0].layers_path) as entered:
        yield entered


def sweep(replay, prepared, targets, quadrature=riemann, chunks=1, end=True):
    alphas, weights = quadrature(5)
    inner = (alphas != 1).nonzero().flatten() if end else torch.arange(len(alphas))
    points = torch.cartesian_prod(torch.arange(prepared.answers.longest), inner)
    integrals = start_integrals(prepared, float(weights[alphas == 1].sum()) if end else None)
    for chunk in reversed(points.chunk(chunks)):
        add_points(replay, prepared, integrals, chunk[:, 0], alphas[chunk[:, 1]], weights[chunk[:, 1]])
    return scores(prepared, integrals, targets)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in tensors(one)]
    if isinstance(value, list):
        return [tensor for one in value for tensor in tensors(one)]
    return [t for f in dataclasses.fields(value) for t in tensors(getattr(value, f.name))] if is_value(value) else []


def is_value(value):
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def test_it_serves_any_number_of_sweeps(replay, targets, facts):
    """Sweeping changes nothing in it: the same bits again, whatever ran in between."""
    prepared = prepare(replay, targets, facts)
    first = sweep(replay, prepared, targets)
    sweep(replay, prepared, targets, gauss_legendre, end=False)
    assert all(torch.equal(one, other) for one, other in zip(first, sweep(replay, prepared, targets), strict=True))


def test_the_order_of_chunks_does_not_matter(replay, targets, facts):
    prepared = prepare(replay, targets, facts)
    for one, other in zip(sweep(replay, prepared, targets), sweep(replay, prepared, targets, chunks=4), strict=True):
        assert one.abs().max() > 0.01
        assert (one - other).abs().max() < 1e-12


def test_end_points_from_the_preparation_are_those_of_the_sweep(replay, targets, facts):
    """``alpha = 1`` by the clean states' gradients, and as points of the sweep; without them the scores differ."""
    prepared = prepare(replay, targets, facts)
    by_preparation = sweep(replay, prepared, targets)
    by_points = sweep(replay, prepared, targets, end=False)
    for one, other in zip(by_preparation, by_points, strict=True):
        assert (one - other).abs().max() < 1e-12
    weight = float(riemann(5)[1][-1])
    assert max(t.abs().max() for t in start_integrals(prepared, weight).values()) > 1e-3
    assert not any(t.any() for t in start_integrals(prepared, None).values())


def test_it_is_frozen_and_holds_no_graph(replay, targets, facts):
    prepared = prepare(replay, targets, facts)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prepared.row_bytes = 1.0
    held = tensors(prepared)
    assert len(held) > SIZE["layers"]
    assert not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in held)


@pytest.mark.parametrize("end_gradients", [True, False])
def test_the_graphs_are_freed_before_the_chunks_run(replay, targets, facts, monkeypatch, end_gradients):
    """They are as large as the activations of all layers. Meanwhile there is one a layer, or one in all."""
    alive: list[weakref.ref] = []
    most = 0
    real = preparation._probe

    def watched(*args):
        nonlocal most
        probe = real(*args)
        alive.append(weakref.ref(probe.trace.leaving))
        most = max(most, sum(ref() is not None for ref in alive))
        return probe

    monkeypatch.setattr(preparation, "_probe", watched)
    gc.disable()
    try:
        prepared = prepare(replay, targets, facts, end_gradients=end_gradients)
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
    assert most == (SIZE["layers"] if end_gradients else 1)
    assert (prepared.end_gradients is None) is not end_gradients


def test_end_points_need_their_gradients(replay, targets, facts):
    prepared = prepare(replay, targets, facts, end_gradients=False)
    with pytest.raises(ValueError, match="prepared without end gradients"):
        start_integrals(prepared, 0.2)


@pytest.mark.parametrize(
    ("name", "template", "added"),
    [
        ("llama", "model.layers.{}.mlp.down_proj", True),
        ("llama", "model.layers.{}.self_attn.o_proj", False),
        ("llama", "model.layers.{}.self_attn.q_proj", False),
        ("gemma2", "model.layers.{}.mlp.down_proj", False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_a_layer_adds_to_its_output_starts_behind_it(name, template, added, dtype, tokenizer):
    """Also where one dimension of the states is so large that, in half precision, all others are within its rounding,
    as in real models. Before a norm (Gemma 2) or the MLP a module is not only added.
    """
    model = make(name, torch.float32)
    model.get_input_embeddings().weight.data[:, 5] = 400.0
    model.get_submodule("model.norm").weight.data[5] = -1.0 if name == "gemma2" else 0.0
    model = model.to(dtype)
    target = resolve_target(model, template)
    fact = encode(tokenizer, *FACTS[0])
    with preserve_state(model), Replay(model, target.layers_path) as replay:
        prepared = prepare(replay, [target], [fact])
    assert len(prepared.bases) == (len(target.layers) if added else 0)
