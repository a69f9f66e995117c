"""The slow exact way: every path point takes a pass through the whole model, which needs nothing but hooks.

For models whose layers cannot be replayed one by one (see `replay`): states instead of keys and values, an attention of
their own, arguments that only they know. The steps of one path share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.attribution.replay import never_called, unfolded
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.targets import Target


def attribute_by_full_passes(
    model: nn.Module, targets: Sequence[Target], fact: Fact, alphas: Tensor, weights: Tensor, chunk_rows: int
) -> list[Tensor]:
    """Eq. 5 for one fact: for each target ``(layers, d2)``. ``chunk_rows`` bounds the tokens of one batch."""
    return [
        torch.stack([_attribute_module(model, name, fact, alphas, weights, chunk_rows) for name in t.names])
        for t in targets
    ]


def changes_by_full_passes(model: nn.Module, targets: Sequence[Target], fact: Fact) -> list[Tensor]:
    """``sum_j P(w_j) - P(0)`` for one fact: for each target ``(layers,)``, by two passes a module and answer token."""
    return [torch.stack([_probability_change(model, name, fact) for name in t.names]) for t in targets]


def _attribute_module(
    model: nn.Module, name: str, fact: Fact, alphas: Tensor, weights: Tensor, chunk_rows: int
) -> Tensor:
    total = torch.zeros(())
    for position, answer in zip(fact.positions, fact.answer):
        ids = torch.tensor(fact.ids[: position + 1], device=device_of(model))
        neurons = _clean_output(model, name, ids)  # (1, d2)
        dtype = torch.promote_types(neurons.dtype, torch.float32)
        per_batch = max(1, chunk_rows // len(ids))
        for nodes, shares in zip(alphas.split(per_batch), weights.split(per_batch)):
            points = (neurons * nodes.to(neurons)[:, None]).requires_grad_()
            with torch.enable_grad():
                logs = _log_probabilities(model, name, ids, answer, points)
                slopes = torch.autograd.grad(logs.sum(), points)[0].to(dtype)
            share = shares.to(logs) * logs.detach().exp()  # dP = P dlogP
            total = total + (neurons[0].to(dtype) * (slopes * share.to(slopes.device)[:, None]).sum(0)).cpu()
    return total


@torch.no_grad()
def _probability_change(model: nn.Module, name: str, fact: Fact) -> Tensor:
    change = torch.zeros(())
    for position, answer in zip(fact.positions, fact.answer):
        ids = torch.tensor(fact.ids[: position + 1], device=device_of(model))
        neurons = _clean_output(model, name, ids)
        at_zero, clean = _log_probabilities(model, name, ids, answer, torch.cat([0 * neurons, neurons])).exp()
        change = change + (clean - at_zero).cpu()
    return change


@torch.no_grad()
def _clean_output(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    """What module ``name`` gives at the last position of ``ids``: ``(1, d2)``."""
    seen: list[Tensor] = []

    def keep(own: Tensor) -> Tensor:
        seen.append(own.clone())
        return own

    with _last_output(model, name, ids[None], keep):
        model(input_ids=ids[None], use_cache=False)
    if not seen:
        raise never_called(name)
    return seen[0]


def _log_probabilities(model: nn.Module, name: str, ids: Tensor, answer: int, points: Tensor) -> Tensor:
    """``log P`` of ``answer`` after ``ids`` with each of ``points`` ``(n, d2)`` as the module's output: ``(n,)``.

    The logarithm, since ``P`` itself may underflow in half precision on its way down.
    """
    safe_point()
    batch = ids.expand(len(points), -1)
    with _last_output(model, name, batch, lambda own: points):
        logits = model(input_ids=batch, use_cache=False).logits[:, -1]
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(points.dtype, torch.float32))[:, answer]


@contextmanager
def _last_output(model: nn.Module, name: str, batch: Tensor, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, ``replace`` maps what module ``name`` gives at the last position of ``batch``, ``(len(batch), d2)``."""

    def hook(_: nn.Module, args: object, out: Tensor) -> Tensor:
        rows = unfolded(name, out, *batch.shape)
        return torch.cat([rows[:, :-1], replace(rows[:, -1])[:, None]], 1).view_as(out)

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
