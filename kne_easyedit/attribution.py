"""Eq. 3-5: integrated gradients of the answer's token probabilities with respect to output neurons.

A path point is (layer ``l``, answer token ``j``, step ``i``): at the position that predicts ``y_j`` the target
module's output in layer ``l`` is replaced by ``alpha_i * w``. All path points share **one** sweep: the batch of
rows grows by the points of each layer and runs on through the following layers, against the frozen keys and
values of one clean pass (see `replay`). Rows are independent, so one backward pass of the sum gives every row
its own gradient. Nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from kne_easyedit.batching import Fact, collate, encode
from kne_easyedit.layout import Target, resolve_target
from kne_easyedit.replay import Clean, Replay, capture_output, replaced_output
from kne_easyedit.state import undisturbed

CHUNK_ROWS = 1200
HEAD_ROWS = 512
"""Rows that pass the output head at once: bounds the logits, the widest tensor of all."""


def riemann(steps: int) -> tuple[Tensor, Tensor]:
    """Nodes ``i/m`` and weights ``1/m``, ``i = 1..m``, of the right Riemann sum of Eq. 5 (float64)."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"attribution_steps: {steps!r} must be a whole number of at least 1 (20 is customary)")
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps, torch.full((steps,), 1 / steps, dtype=torch.float64)


def attribute(
    model: nn.Module,
    tokenizer,
    prompt: str,
    target: str,
    target_module: str,
    steps: int = 20,
    *,
    layers: Sequence[int] = (),
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Eq. 5: the attribution of every output neuron of ``target_module`` for one fact.

    Parameters
    ----------
    model, tokenizer:
        A causal language model of transformers. It is left exactly as it was found.
    prompt, target:
        The fact: its answer ``target`` follows ``prompt`` after one blank.
    target_module:
        Template such as ``model.layers.{}.mlp.down_proj``.
    steps:
        ``m`` of the right Riemann sum.
    layers:
        Numbers of the layers to attribute; empty: all.
    chunk_rows:
        Path points in flight at most (one point in every layer at least). Bounds memory, not the result.

    Returns
    -------
    Tensor ``(layers, d2)`` in float32 (float64 for a float64 model) on the CPU, in probability: for one answer
    token and ``m -> inf`` a row sums to ``P(w) - P(0)``.

    Raises ValueError for a fact or template that cannot be used, UnsupportedModel for a model whose layers
    cannot be replayed, FloatingPointError for scores that are not finite.
    """
    chosen = resolve_target(model, target_module, layers)
    return attribute_facts(model, chosen, [encode(tokenizer, prompt, target)], steps, chunk_rows=chunk_rows)[0]


def attribute_facts(
    model: nn.Module,
    target: Target,
    facts: Sequence[Fact],
    steps: int = 20,
    *,
    chunk_rows: int = CHUNK_ROWS,
    quadrature: Callable[[int], tuple[Tensor, Tensor]] = riemann,
) -> Tensor:
    """`attribute` for several facts in one sweep: ``(facts, layers, d2)``."""
    alphas, weights = quadrature(steps)
    longest = max(len(fact.answer) for fact in facts)
    positions = torch.tensor([_padded(fact.positions, longest) for fact in facts])
    answers = torch.tensor([_padded(fact.answer, longest) for fact in facts])
    counts = torch.tensor([[float(j < len(fact.answer)) for j in range(longest)] for fact in facts])
    with undisturbed(model), Replay(model, target) as replay:
        clean = replay.clean_pass(collate(facts), positions)
        replay.check(clean)
        sweep = _Sweep(replay, clean, target, answers, counts)
        per_chunk = max(1, chunk_rows // (len(target.layers) * len(facts)))
        inner = (alphas != 1).nonzero().flatten()
        if len(inner) < len(alphas):
            sweep.run_end(float(weights[alphas == 1].sum()))
        points = torch.cartesian_prod(torch.arange(longest), inner)  # (token, step)
        for chunk in points.split(per_chunk) if len(points) else ():
            sweep.run(chunk[:, 0], alphas[chunk[:, 1]], weights[chunk[:, 1]])
        scores = sweep.scores()
    bad = (~scores.isfinite()).flatten(1).any(1)
    if bad.any():
        fact = facts[int(bad.nonzero()[0])]
        raise FloatingPointError(f"attribution of {fact.prompt!r} -> {fact.target!r} is not finite; load the model in float32 or bfloat16")
    return scores


class _Sweep:
    """Accumulates the path integral of a batch of facts over chunks of path points."""

    def __init__(self, replay: Replay, clean: Clean, target: Target, answers: Tensor, counts: Tensor):
        self.replay, self.clean, self.target = replay, clean, target
        self.answers, self.counts = answers, counts
        self.modules = dict(zip(target.layers, target.modules))
        self.base = {i: self._constant_part(i) for i in target.layers}
        dtype = torch.promote_types(clean.logits.dtype, torch.float32)
        self.integral = {i: torch.zeros_like(w, dtype=dtype) for i, w in clean.neurons.items()}  # (facts, s, d2)

    def run(self, tokens: Tensor, alphas: Tensor, weights: Tensor) -> None:
        """One forward and one backward sweep over path points ``(token, alpha)`` in all layers at once."""
        hidden, leaves = None, {}
        positions = self.clean.positions[:, tokens.to(self.clean.positions.device)]  # (facts, points), the same in each layer's block
        with torch.enable_grad():
            for i in range(self.target.layers[0], len(self.replay.layers)):
                if i in self.modules:
                    hidden, leaves[i] = self._enter(i, hidden, positions, tokens, alphas)
                else:
                    hidden = self._layer(i, hidden, positions)
            probability, gradient = self._head(hidden, tokens)
            gradients = torch.autograd.grad(hidden, list(leaves.values()), gradient)
        for block, (i, grad) in enumerate(zip(leaves, gradients)):
            integral = self.integral[i]
            share = probability[:, block * len(tokens) : (block + 1) * len(tokens)] * weights.to(probability)
            grad = grad.to(integral.dtype) * share.to(grad.device).unsqueeze(-1).to(integral.dtype)
            integral.index_add_(1, tokens.to(integral.device), grad)

    def run_end(self, weight: float) -> None:
        """The end points ``alpha = 1`` of all layers at once: there the model is in its clean state, whatever the layer,
        so that one row an answer token has the gradients of every layer."""
        clean, outputs = self.clean, {}
        first = self.target.layers[0]
        with torch.enable_grad(), ExitStack() as hooks:
            for i, module in self.modules.items():
                hooks.callback(module.register_forward_hook(capture_output(outputs, i)).remove)
            hidden = clean.inputs[first].detach().requires_grad_()
            for i in range(first, len(self.replay.layers)):
                hidden = self._layer(i, hidden, clean.positions)
            probability, gradient = self._head(hidden, torch.arange(clean.positions.shape[1]))
            gradients = torch.autograd.grad(hidden, list(outputs.values()), gradient)
        for i, grad in zip(outputs, gradients):
            integral = self.integral[i]
            integral += grad.to(integral.dtype) * (weight * probability).to(integral).unsqueeze(-1)

    def scores(self) -> Tensor:
        """Eq. 5: ``sum_j w_j * integral_j``, ``(facts, layers, d2)``."""
        return torch.stack([(self.integral[i] * self.clean.neurons[i]).sum(1).cpu() for i in self.target.layers], 1)

    def _enter(self, i: int, hidden: Tensor | None, positions: Tensor, tokens: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """The rows in flight through layer ``i``, joined by the path points that start there."""
        clean = self.clean
        point = clean.neurons[i][:, tokens.to(clean.neurons[i].device)]
        point = point * alphas.to(point)[:, None]
        if self.base[i] is not None:
            # The module's output is the last term of a sum: the points can start behind the layer.
            leaf = (self.base[i][:, tokens.to(point.device)] + point).requires_grad_()
            if hidden is None:
                return leaf, leaf
            return torch.cat([self._layer(i, hidden, positions).to(leaf.device), leaf], 1), leaf
        leaf = point.requires_grad_()
        start = clean.inputs[i][:, tokens.to(clean.inputs[i].device)]
        keep = 0 if hidden is None else hidden.shape[1]
        joined = start if hidden is None else torch.cat([hidden.to(start.device), start], 1)
        with replaced_output(self.modules[i], keep, leaf):
            return self._layer(i, joined, positions), leaf

    def _layer(self, i: int, hidden: Tensor, positions: Tensor) -> Tensor:
        blocks = hidden.shape[1] // positions.shape[1]
        return self.replay.layer(i, hidden, positions.repeat(1, blocks))

    def _head(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Per row: the probability of its answer token, and the gradient of that probability's *logarithm*.

        ``dP = P dlogP``: the factor is put in at the end, in float32, since ``P`` itself may underflow in half
        precision on its way down. A row of an answer shorter than the longest counts nothing.
        """
        blocks = hidden.shape[1] // len(tokens)
        answers = self.answers[:, tokens].repeat(1, blocks).to(hidden.device)
        flat, wanted = hidden.detach().flatten(0, 1), answers.flatten()
        probability, gradient = [], []
        for start in range(0, len(flat), HEAD_ROWS):
            rows = flat[start : start + HEAD_ROWS].requires_grad_()
            logits = self.replay.tail(rows.unsqueeze(0))[0]
            index = wanted[start : start + HEAD_ROWS].to(logits.device).unsqueeze(1)
            with torch.no_grad():
                # In place if the type allows it: the logits are the widest tensor of all, and not needed any more.
                slope = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
                slope = torch.softmax(slope, -1, out=slope)
                probability.append(slope.gather(1, index)[:, 0].to(hidden.device))
                slope = slope.neg_().scatter_add_(1, index, torch.ones_like(index, dtype=slope.dtype))
            gradient.append(torch.autograd.grad(logits, rows, slope.to(logits.dtype))[0])
        counts = self.counts[:, tokens].repeat(1, blocks).to(hidden.device)
        probability = torch.cat(probability).view(answers.shape)
        return probability * counts.to(probability), torch.cat(gradient).view_as(hidden)

    @torch.no_grad()
    def _constant_part(self, i: int) -> Tensor | None:
        """What layer ``i`` adds to the module's output, ``(facts, s, hidden)``, if it does nothing else with it.

        So it is for ``down_proj`` of Llama or ``fc_out`` of GPT-J, but not where a norm, an attention or an
        activation comes after. Not looked up but tried: with the output at 0 and at half its value.
        """
        clean, neurons = self.clean, self.clean.neurons[i]
        if neurons.shape[-1] != clean.inputs[i].shape[-1]:
            return None
        probe = torch.cat([torch.zeros_like(neurons), neurons / 2], 1)
        with replaced_output(self.modules[i], 0, probe):
            out = self._layer(i, clean.inputs[i].repeat(1, 2, 1), clean.positions)
        base, half = out.chunk(2, 1)
        epsilon = torch.finfo(out.dtype).eps
        return base if (base + neurons / 2 - half).abs().max() <= 4 * epsilon * half.abs().max() else None


def _padded(values: Sequence[int], length: int) -> list[int]:
    return list(values) + [values[-1]] * (length - len(values))
