"""The slow exact way: every path point takes a pass through the whole model, which needs nothing but hooks.

For models whose layers cannot be replayed one by one (see `replay`): states instead of keys and values, an
attention of their own, arguments that only they know. The steps of one path share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def _attribute_module(
    model: nn.Module, name: str, fact: Fact, alphas: Tensor, weights: Tensor, chunk_rows: int
) -> Tensor:
    total = 0
    for position, answer in zip(fact.positions, fact.answer):
        ids = torch.tensor(fact.ids[: position + 1], device=device_of(model))
        seen = []
        with torch.no_grad(), _last_output(model, name, ids[None], lambda own: seen.append(own.clone()) or own):
            model(input_ids=ids[None], use_cache=False)
        if not seen:
            raise never_called(name)
        neurons = seen[0]  # (1, d2)
        dtype = torch.promote_types(neurons.dtype, torch.float32)
        per_batch = max(1, chunk_rows // len(ids))
        for nodes, shares in zip(alphas.split(per_batch), weights.split(per_batch)):
            safe_point()
            points = (neurons * nodes.to(neurons)[:, None]).requires_grad_()
            batch = ids.expand(len(nodes), -1)
            with torch.enable_grad(), _last_output(model, name, batch, lambda own: points):
                logits = model(input_ids=batch, use_cache=False).logits[:, -1]
                # dP = P dlogP: P itself may underflow in half precision on its way down.
                logs = torch.log_softmax(logits, -1, dtype=dtype)[:, answer]
                slopes = torch.autograd.grad(logs.sum(), points)[0].to(dtype)
            share = shares.to(logs) * logs.detach().exp()
            total = total + (neurons[0].to(dtype) * (slopes * share.to(slopes.device)[:, None]).sum(0)).cpu()
    return total


@contextmanager
def _last_output(model: nn.Module, name: str, batch: Tensor, replace):
    """Inside, what module ``name`` gives at the last position of ``batch``, ``(len(batch), d2)``, is ``replace`` of it."""

    def hook(_, args, out):
        rows = unfolded(name, out, *batch.shape)
        return torch.cat([rows[:, :-1], replace(rows[:, -1])[:, None]], 1).view_as(out)

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
