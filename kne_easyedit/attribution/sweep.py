"""The fused sweep: the path integrals of a batch of facts, for every layer, module, answer token and step at once.

A path point is (module ``w`` of layer ``l``, answer token ``j``, step ``i``): at the position that predicts
``y_j`` the module's output is replaced by ``alpha_i * w``. All path points share **one** sweep: the batch of
rows grows by the points of each layer and runs on through the following layers, against the frozen keys and
values of one clean pass (see `replay`). Rows are independent, so one backward pass of the sum gives every row
its own gradient. Nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from kne_easyedit.attribution.replay import Replay, UnsupportedModel, capture_output, replaced_output
from kne_easyedit.facts.encoding import Fact, collate
from kne_easyedit.models.targets import Target

HEAD_ROWS = 512
"""Rows that pass the output head at once: bounds the logits, the widest tensor of all."""


class Sweep:
    """Accumulates the path integrals of a batch of facts over chunks of path points.

    Building it makes the clean pass and the self-check: raises UnsupportedModel for layers that cannot be
    replayed, ReplayMismatch for layers that replay differently.
    """

    def __init__(self, replay: Replay, targets: Sequence[Target], facts: Sequence[Fact]):
        self.replay = replay
        self.targets = targets
        self.modules: dict[int, dict[str, nn.Module]] = {}  # layer -> name -> module
        for target in targets:
            for i, name, module in zip(target.layers, target.names, target.modules):
                self.modules.setdefault(i, {})[name] = module
        self.longest = max(len(fact.answer) for fact in facts)
        self.answers = torch.tensor([_padded(fact.answer, self.longest) for fact in facts])
        self.counts = torch.tensor([[float(j < len(fact.answer)) for j in range(self.longest)] for fact in facts])
        positions = torch.tensor([_padded(fact.positions, self.longest) for fact in facts])
        everywhere = {name: module for found in self.modules.values() for name, module in found.items()}
        self.base: dict[str, Tensor] = {}
        self._traces: list[tuple[Tensor, dict[str, Tensor], Tensor]] = []
        with _as_unsupported(replay.model):
            self.clean = replay.clean_pass(collate(facts), positions, everywhere)
            self.saved = [self._probe(i) for i in range(len(replay.layers))]
        every, own = torch.arange(self.longest), self.clean.logits.flatten(0, 1)
        self._end = self._head(
            self.clean.inputs[-1], every, lambda logits, at: replay.require_equal(logits, own[at], "the output head")
        )
        dtype = torch.promote_types(self.clean.logits.dtype, torch.float32)
        self.integral = {
            name: torch.zeros_like(w, dtype=dtype) for name, w in self.clean.neurons.items()
        }  # (facts, s, d2)

    @property
    def paths(self) -> int:
        """Paths of one answer token of one fact: one a module and layer."""
        return sum(len(found) for found in self.modules.values())

    @property
    def row_bytes(self) -> float:
        """What one row keeps for the backward pass, on average over the layers where rows begin; measured."""
        return sum(len(found) * sum(self.saved[i:]) for i, found in self.modules.items()) / self.paths

    def run(self, tokens: Tensor, alphas: Tensor, weights: Tensor) -> None:
        """One forward and one backward sweep over path points ``(token, alpha)`` of all modules at once."""
        self._traces = []
        hidden, leaves = None, {}
        positions = self.clean.positions[
            :, tokens.to(self.clean.positions.device)
        ]  # (facts, points), the same in every block
        with torch.enable_grad():
            for i in range(min(self.modules), len(self.replay.layers)):
                hidden = self._enter(i, hidden, leaves, positions, tokens, alphas)
            probability, gradient = self._head(hidden, tokens)
            gradients = torch.autograd.grad(hidden, list(leaves.values()), gradient)
        for block, (name, grad) in enumerate(zip(leaves, gradients)):
            integral = self.integral[name]
            share = probability[:, block * len(tokens) : (block + 1) * len(tokens)] * weights.to(probability)
            grad = grad.to(integral.dtype) * share.to(grad.device).unsqueeze(-1).to(integral.dtype)
            integral.index_add_(1, tokens.to(integral.device), grad)

    def run_end(self, weight: float) -> None:
        """The end points ``alpha = 1`` of all modules at once: there the model is in its clean state, whatever the module,
        so that one backward pass through what `_probe` ran has the gradients of all. Once, and before `run`."""
        probability, gradient = self._end
        for i in reversed(range(min(self.modules), len(self.replay.layers))):
            own, outputs, out = self._traces[i]
            onward, *gradients = torch.autograd.grad(out, [own, *outputs.values()], gradient.to(out.device))
            gradient = onward
            for name, grad in zip(outputs, gradients):
                integral = self.integral[name]
                grad = grad.reshape(len(integral), -1, integral.shape[-1])[:, : self.longest]
                integral += grad.to(integral.dtype) * (weight * probability).to(integral).unsqueeze(-1)
        self._traces = []

    def scores(self) -> list[Tensor]:
        """Eq. 5: ``sum_j w_j * integral_j``, for each target ``(facts, layers, d2)``."""
        return [
            torch.stack([(self.integral[n] * self.clean.neurons[n]).sum(1).cpu() for n in t.names], 1)
            for t in self.targets
        ]

    def _enter(
        self, i: int, hidden: Tensor | None, leaves: dict, positions: Tensor, tokens: Tensor, alphas: Tensor
    ) -> Tensor:
        """The rows in flight through layer ``i``, joined by the path points that start there (added to ``leaves``)."""
        modules = self.modules.get(i, {})
        inside = [name for name in modules if name not in self.base]
        rows = [] if hidden is None else [hidden]
        if inside:
            own = self.clean.inputs[i]
            rows = [part.to(own.device) for part in rows] + [own[:, tokens.to(own.device)]] * len(inside)
        with ExitStack() as replaced:
            begin = 0 if hidden is None else hidden.shape[1]
            total = begin + len(inside) * len(tokens)
            for k, name in enumerate(inside):
                leaves[name] = self._points(name, tokens, alphas).requires_grad_()
                replaced.enter_context(
                    replaced_output(name, modules[name], leaves[name], begin + k * len(tokens), total)
                )
            rows = (
                [self._layer(i, torch.cat(rows, 1) if inside else hidden.to(self.clean.inputs[i].device), positions)]
                if rows
                else []
            )
        for name in modules:
            if name in self.base:  # the points can start behind the layer
                points = self._points(name, tokens, alphas)
                leaves[name] = (self.base[name][:, tokens.to(points.device)] + points).requires_grad_()
                rows.append(leaves[name])
        return torch.cat([part.to(rows[-1].device) for part in rows], 1) if len(rows) > 1 else rows[0]

    def _points(self, name: str, tokens: Tensor, alphas: Tensor) -> Tensor:
        """``alpha * w`` for each path point: ``(facts, points, d2)``."""
        neurons = self.clean.neurons[name]
        return neurons[:, tokens.to(neurons.device)] * alphas.to(neurons)[:, None]

    def _layer(self, i: int, hidden: Tensor, positions: Tensor) -> Tensor:
        blocks = hidden.shape[1] // positions.shape[1]
        return self.replay.layer(i, hidden, positions.repeat(1, blocks))

    def _head(self, hidden: Tensor, tokens: Tensor, look: Callable | None = None) -> tuple[Tensor, Tensor]:
        """Per row: the probability of its answer token, and the gradient of that probability's *logarithm*.

        ``dP = P dlogP``: the factor is put in at the end, in float32, since ``P`` itself may underflow in half
        precision on its way down. A row of an answer shorter than the longest counts nothing. ``look`` is shown
        the logits of each slice of the rows.
        """
        blocks = hidden.shape[1] // len(tokens)
        answers = self.answers[:, tokens].repeat(1, blocks).to(hidden.device)
        flat, wanted = hidden.detach().flatten(0, 1), answers.flatten()
        probability, gradient = [], []
        for start in range(0, len(flat), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            rows = flat[part].requires_grad_()
            with torch.enable_grad():
                logits = self.replay.head(rows)
            if look is not None:
                look(logits.detach(), part)
            index = wanted[part].to(logits.device).unsqueeze(1)
            with torch.no_grad():
                slope = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
                probability.append(slope.gather(1, index)[:, 0].to(hidden.device))
                slope.scatter_add_(1, index, -torch.ones_like(index, dtype=slope.dtype))
            gradient.append(-torch.autograd.grad(logits, rows, slope.to(logits.dtype))[0])
        counts = self.counts[:, tokens].repeat(1, blocks).to(hidden.device)
        probability = torch.cat(probability).view(answers.shape)
        return probability * counts.to(probability), torch.cat(gradient).view_as(hidden)

    def _probe(self, i: int) -> float:
        """Replays clean rows through layer ``i``: the self-check. Returns the bytes that a row keeps there for the backward pass.

        What was run is kept for `run_end`.

        Also finds the modules whose output the layer adds to its own and does nothing else with: so it is for
        ``down_proj`` of Llama or ``fc_out`` of GPT-J, but not where a norm, an attention or an activation comes
        after. Not looked up but tried, with the output at 0 and at half its value; ``base`` is what the layer adds.
        """
        clean, modules = self.clean, self.modules.get(i, {})
        own = clean.inputs[i]
        s = own.shape[1]
        trials = [name for name in modules if clean.neurons[name].shape[-1] == own.shape[-1]]
        outputs, leaf = {}, own.detach().requires_grad_()
        kept = _Kept(self.replay.model)
        with ExitStack() as hooks, kept, torch.enable_grad():
            for name, module in modules.items():
                hooks.callback(module.register_forward_hook(capture_output(outputs, name)).remove)
            for k, name in enumerate(trials):
                trial = torch.cat([0 * clean.neurons[name], clean.neurons[name] / 2], 1)
                hooks.enter_context(
                    replaced_output(name, modules[name], trial, (2 * k + 1) * s, (2 * len(trials) + 1) * s)
                )
            traced = self._layer(i, leaf.repeat(1, 2 * len(trials) + 1, 1), clean.positions)
        self._traces.append((leaf, outputs, traced[:, :s]))
        out = traced.detach()
        self.replay.require_equal(out[:, :s], clean.inputs[i + 1], f"layer {i}")
        for name, (zero, half) in zip(trials, (pair.chunk(2, 1) for pair in out[:, s:].split(2 * s, 1))):
            rounding = 4 * torch.finfo(out.dtype).eps * half.abs().max()
            if (zero + clean.neurons[name] / 2 - half).abs().max() <= rounding:
                self.base[name] = zero
        return kept.bytes / (out.shape[0] * out.shape[1])


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps inside, weights left out."""

    def __init__(self, model: nn.Module):
        self.bytes = 0
        seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor

        super().__init__(count, lambda tensor: tensor)


@contextmanager
def _as_unsupported(model: nn.Module) -> Iterator[None]:
    """What a model's own code raises inside because its layers run one by one, or on a cache of ours, says that they cannot."""
    try:
        yield
    except (UnsupportedModel, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "allocate" in str(error):  # out of memory on a CPU
            raise
        raise UnsupportedModel(
            f"{type(model).__name__}: its layers do not run one by one ({type(error).__name__}: {error})"
        ) from error


def _padded(values: Sequence[int], length: int) -> list[int]:
    return list(values) + [values[-1]] * (length - len(values))
