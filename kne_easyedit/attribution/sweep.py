"""The fused sweep: the path integrals of a batch of facts, for every layer, module, answer token and step at once.

A path point is (module ``w`` of layer ``l``, answer token ``j``, step ``i``): at the position that predicts ``y_j`` the
module's output is replaced by ``alpha_i * w`` (Eq. 3). All path points share **one** sweep: the batch of rows grows by
the points of each layer and runs on through the following layers, against the frozen keys and values of one clean pass
(see `replay`). Rows are independent, so one backward pass of the sum gives every row its own gradient. Nothing is
approximated.

What the sweep starts from is the value that `preparation.prepare` returns; integrals add up over chunks of path points.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from kne_easyedit.attribution.preparation import PreparedSweep, head_gradient, run_layer
from kne_easyedit.attribution.replay import Replay, replaced_output
from kne_easyedit.models.targets import Target


def start_integrals(prepared: PreparedSweep, end_weight: float | None) -> dict[str, Tensor]:
    """The path integrals of Eq. 5 before any inner point: zeros, or the end points ``alpha = 1``.

    Args:
        prepared: The batch, with end gradients unless ``end_weight`` is None.
        end_weight: The quadrature's weight of ``alpha = 1``; None: it is none of the nodes.

    Returns:
        Module name -> ``(facts, s, d2)``, in float32 at least.
    """
    dtype = torch.promote_types(prepared.clean.logits.dtype, torch.float32)
    integrals = {name: torch.zeros_like(w, dtype=dtype) for name, w in prepared.clean.neurons.items()}
    if end_weight is not None:
        if prepared.end_gradients is None:
            raise ValueError("prepared without end gradients")
        for name, gradient in prepared.end_gradients.items():
            integral = integrals[name]
            share = (end_weight * prepared.probability).to(integral).unsqueeze(-1)
            integral += gradient.to(integral.dtype) * share
    return integrals


def add_points(
    replay: Replay,
    prepared: PreparedSweep,
    integrals: dict[str, Tensor],
    tokens: Tensor,
    alphas: Tensor,
    weights: Tensor,
) -> None:
    """Adds path points to ``integrals``, in place: one forward and one backward sweep.

    Args:
        replay: The `Replay` with which ``prepared`` was made, still entered.
        prepared: The batch.
        integrals: Module name -> ``(facts, s, d2)``.
        tokens: Number of each point's answer token, ``(points,)``.
        alphas: Nodes of the quadrature, ``(points,)``.
        weights: Its weights, ``(points,)``.
    """
    with torch.enable_grad():
        hidden, leaves = _forward(replay, prepared, tokens, alphas)
        probability, gradient = head_gradient(replay, prepared.answers, hidden, tokens)
        gradients = torch.autograd.grad(hidden, list(leaves.values()), gradient)
    for block, (name, grad) in enumerate(zip(leaves, gradients)):
        integral = integrals[name]
        share = probability[:, block * len(tokens) : (block + 1) * len(tokens)] * weights.to(probability)
        grad = grad.to(integral.dtype) * share.to(grad.device).unsqueeze(-1).to(integral.dtype)
        integral.index_add_(1, tokens.to(integral.device), grad)


def scores(prepared: PreparedSweep, integrals: dict[str, Tensor], targets: Sequence[Target]) -> list[Tensor]:
    """Eq. 5: ``sum_j w_j * integral_j``, for each target ``(facts, layers, d2)`` on the CPU."""
    neurons = prepared.clean.neurons
    return [torch.stack([(integrals[n] * neurons[n]).sum(1).cpu() for n in t.names], 1) for t in targets]


@torch.no_grad()
def probability_changes(
    replay: Replay, prepared: PreparedSweep, targets: Sequence[Target], points_per_chunk: int
) -> list[Tensor]:
    """``sum_j P(w_j) - P(0)``: what a layer's scores add up to in the limit, for each target ``(facts, layers)``.

    Takes one forward sweep of a single point a path.
    """
    changes = {name: torch.zeros(()) for found in prepared.modules.values() for name in found}
    for tokens in torch.arange(prepared.answers.longest).split(points_per_chunk):
        hidden, leaves = _forward(replay, prepared, tokens, torch.zeros(len(tokens)))
        at_zero, _ = head_gradient(replay, prepared.answers, hidden, tokens)
        clean = prepared.probability[:, tokens.to(prepared.probability.device)].to(at_zero.device)
        for name, part in zip(leaves, at_zero.split(len(tokens), 1)):
            changes[name] = changes[name] + (clean - part).sum(1).cpu()
    return [torch.stack([changes[name] for name in target.names], 1) for target in targets]


def _forward(
    replay: Replay, prepared: PreparedSweep, tokens: Tensor, alphas: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Path points ``(token, alpha)`` of all modules through all layers.

    Returns the rows that leave the last layer, ``(facts, modules * points, hidden)``, one block a module, and the
    leaves of the graph by module, in the order of the blocks.
    """
    leaves: dict[str, Tensor] = {}
    hidden = prepared.clean.inputs[prepared.first_layer][:, :0]  # no rows yet
    positions = prepared.clean.positions[:, tokens.to(prepared.clean.positions.device)]  # the same in every block
    for i in range(prepared.first_layer, len(replay.layers)):
        hidden = _through_layer(replay, prepared, i, hidden, leaves, positions, tokens, alphas)
    return hidden, leaves


def _through_layer(
    replay: Replay,
    prepared: PreparedSweep,
    i: int,
    hidden: Tensor,
    leaves: dict[str, Tensor],
    positions: Tensor,
    tokens: Tensor,
    alphas: Tensor,
) -> Tensor:
    """The rows in flight through layer ``i``, joined by the path points that start there (added to ``leaves``)."""
    modules, own = prepared.modules.get(i, {}), prepared.clean.inputs[i]
    inside = [name for name in modules if name not in prepared.bases]
    begin = hidden.shape[1]
    entering = [hidden.to(own.device)] if begin else []
    entering += [own[:, tokens.to(own.device)]] * len(inside)
    rows: list[Tensor] = []
    with ExitStack() as replaced:
        total = begin + len(inside) * len(tokens)
        for k, name in enumerate(inside):
            leaves[name] = _points(prepared, name, tokens, alphas).requires_grad_()
            replaced.enter_context(replaced_output(name, modules[name], leaves[name], begin + k * len(tokens), total))
        if entering:
            joined = torch.cat(entering, 1) if len(entering) > 1 else entering[0]
            rows.append(run_layer(replay, i, joined, positions))
    for name in modules:
        if name in prepared.bases:  # the points can start behind the layer
            points = _points(prepared, name, tokens, alphas)
            leaves[name] = (prepared.bases[name][:, tokens.to(points.device)] + points).requires_grad_()
            rows.append(leaves[name])
    return torch.cat([part.to(rows[-1].device) for part in rows], 1) if len(rows) > 1 else rows[0]


def _points(prepared: PreparedSweep, name: str, tokens: Tensor, alphas: Tensor) -> Tensor:
    """``alpha * w`` for each path point: ``(facts, points, d2)``."""
    neurons = prepared.clean.neurons[name]
    return neurons[:, tokens.to(neurons.device)] * alphas.to(neurons)[:, None]
