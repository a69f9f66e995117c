"""What the fused sweep starts from, as a value: the clean states of a batch of facts, after the self-check.

`prepare` makes the clean pass, replays every layer and the output head on the clean states, and compares them with what
the model computed itself. The same pass measures what a row costs, finds the modules behind which a path can start,
and gives the gradients at the end points ``alpha = 1``, where the model is in its clean state for every module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit._util.errors import lacks_memory
from kne_easyedit.attribution.replay import Clean, Replay, UnsupportedModel, capture_neurons, replaced_output
from kne_easyedit.facts.encoding import Fact, collate
from kne_easyedit.models.offload import pack, unpack
from kne_easyedit.models.targets import Target

HEAD_ROWS = 512
"""Rows that pass the output head at once: bounds the memory of the logits."""


@dataclass(frozen=True)
class Answers:
    """The answer tokens of a batch of facts, padded to the longest answer ``s``."""

    tokens: Tensor
    """``(facts, s)`` token ids; a shorter answer repeats its last."""
    counts: Tensor
    """``(facts, s)``: 1 for a token of the answer, 0 for padding."""
    positions: Tensor
    """``(facts, s)``: the positions that predict them."""

    @classmethod
    def of(cls, facts: Sequence[Fact]) -> Answers:
        """The answers of ``facts``."""
        longest = max(len(fact.answer) for fact in facts)
        return cls(
            torch.tensor([_padded(fact.answer, longest) for fact in facts]),
            torch.tensor([[float(j < len(fact.answer)) for j in range(longest)] for fact in facts]),
            torch.tensor([_padded(fact.positions, longest) for fact in facts]),
        )

    @property
    def longest(self) -> int:
        """Number of tokens of the longest answer."""
        return self.tokens.shape[1]


@dataclass(frozen=True)
class PreparedSweep:
    """A batch of facts and a set of modules, ready for the sweep."""

    modules: Mapping[int, Mapping[str, nn.Module]]
    """Decoder layer -> module name -> module: where paths begin."""
    answers: Answers
    clean: Clean
    bases: Mapping[str, Tensor]
    """Module name -> what its layer gives without it, ``(facts, s, hidden)``, for the modules whose output the layer
    only adds: their paths can start behind the layer."""
    row_bytes: float
    """What one row keeps for the backward pass, measured: the mean over the layers where rows begin."""
    probability: Tensor
    """``(facts, s)``: the clean probability ``P(w)`` of each answer token, 0 for padding."""
    end_gradients: Mapping[str, Tensor] | None
    """Module name -> gradient of ``log P`` at ``alpha = 1``, ``(facts, s, d2)``; None if they were not asked for."""

    @property
    def paths(self) -> int:
        """Paths of one answer token of one fact: one a module and layer."""
        return sum(len(found) for found in self.modules.values())

    @property
    def first_layer(self) -> int:
        """The first layer in which a path begins."""
        return min(self.modules)


def prepare(
    replay: Replay, targets: Sequence[Target], facts: Sequence[Fact], end_gradients: bool = True
) -> PreparedSweep:
    """The clean pass and the self-check, and all that the sweep needs of them.

    Args:
        replay: An entered `Replay` of the model.
        targets: The modules, of one decoder.
        facts: The facts of one batch.
        end_gradients: Also keep the graph of the replayed layers, and go back through it once.

    Returns:
        The value that `sweep.add_points` runs on. It holds no graph of autograd.

    Raises:
        UnsupportedModel: The model's layers cannot be replayed.
        ReplayMismatch: They give other results than the model itself.
        FloatingPointError: The model gives values that are not finite.
    """
    modules: dict[int, dict[str, nn.Module]] = {}
    for target in targets:
        for i, name, module in zip(target.layers, target.names, target.modules):
            modules.setdefault(i, {})[name] = module
    everywhere = {name: module for found in modules.values() for name, module in found.items()}
    answers = Answers.of(facts)
    bases: dict[str, Tensor] = {}
    costs: list[float] = []
    traces: list[_Trace] = []
    with _as_unsupported(replay.model):
        clean = replay.clean_pass(collate(facts), answers.positions, everywhere)
        for i in range(len(replay.layers)):
            probe = _probe(replay, clean, i, modules.get(i, {}))
            bases.update(probe.bases)
            costs.append(probe.row_bytes)
            if end_gradients and i >= min(modules):
                traces.append(probe.trace)
            del probe  # or the last layer's graph would outlive the list
        own = clean.logits.flatten(0, 1)
        probability, gradient = head_gradient(
            replay,
            answers,
            clean.inputs[-1],
            torch.arange(answers.longest),
            lambda logits, at: replay.require_equal(logits, own[at], "the output head"),
        )
    return PreparedSweep(
        modules,
        answers,
        clean,
        bases,
        sum(len(found) * sum(costs[i:]) for i, found in modules.items()) / sum(map(len, modules.values())),
        probability,
        _end_gradients(traces, gradient, clean) if end_gradients else None,
    )


def head_gradient(
    replay: Replay,
    answers: Answers,
    hidden: Tensor,
    tokens: Tensor,
    inspect: Callable[[Tensor, slice], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Per row: the probability of its answer token, and the gradient of that probability's *logarithm*.

    ``dP = P dlogP``: the factor is applied at the end, in float32, since ``P`` itself may underflow in half precision
    on its way down.

    Args:
        replay: An entered `Replay` of the model.
        answers: The answers; a row of padding gets the probability 0.
        hidden: Rows that leave the last layer, ``(facts, blocks * len(tokens), hidden)``.
        tokens: Number of each row's answer token, ``(len(tokens),)``, the same in every block.
        inspect: Called with the logits of each slice of the rows, and that slice.

    Returns:
        Probabilities ``(facts, rows)``, in float32 at least, and gradients of the shape of ``hidden``.
    """
    blocks = hidden.shape[1] // len(tokens)
    wanted = answers.tokens[:, tokens].repeat(1, blocks).to(hidden.device)
    flat, flat_wanted = hidden.detach().flatten(0, 1), wanted.flatten()
    probability, gradient = [], []
    for start in range(0, len(flat), HEAD_ROWS):
        part = slice(start, start + HEAD_ROWS)
        rows = flat[part].requires_grad_()
        with torch.enable_grad():
            logits = replay.head(rows)
        if inspect is not None:
            inspect(logits.detach(), part)
        index = flat_wanted[part].to(logits.device).unsqueeze(1)
        with torch.no_grad():
            slope = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
            probability.append(slope.gather(1, index)[:, 0].to(hidden.device))
            slope.scatter_add_(1, index, -torch.ones_like(index, dtype=slope.dtype))
        gradient.append(-torch.autograd.grad(logits, rows, slope.to(logits.dtype))[0])
    counts = answers.counts[:, tokens].repeat(1, blocks).to(hidden.device)
    found = torch.cat(probability).view(wanted.shape)
    return found * counts.to(found), torch.cat(gradient).view_as(hidden)


def run_layer(replay: Replay, i: int, hidden: Tensor, positions: Tensor) -> Tensor:
    """Rows ``(facts, blocks * n, hidden)`` through layer ``i``; each block is at ``positions`` ``(facts, n)``."""
    blocks = hidden.shape[1] // positions.shape[1]
    return replay.layer(i, hidden, positions.repeat(1, blocks))


@dataclass(frozen=True)
class _Trace:
    """A layer's graph of autograd on the clean states."""

    entering: Tensor
    outputs: Mapping[str, Tensor]
    """Module name -> what it gave."""
    leaving: Tensor


@dataclass(frozen=True)
class _Probe:
    bases: Mapping[str, Tensor]
    row_bytes: float
    trace: _Trace


def _probe(replay: Replay, clean: Clean, i: int, modules: Mapping[str, nn.Module]) -> _Probe:
    """Replays clean rows through layer ``i``: the self-check, and the bytes that a row keeps for the backward pass.

    Also finds the modules whose output the layer only adds to its own: ``down_proj`` of Llama or ``fc_out`` of GPT-J,
    but not those before a norm, an attention or an activation. This is tried out, with the output at 0 and at half its
    value: what the layer gives must differ by that, and a gradient must pass through unchanged. The values alone do not
    tell: in half precision a few large dimensions of the states hide what the others do. What the layer gives at 0 is
    the module's base.
    """
    own = clean.inputs[i]
    s = own.shape[1]
    width = own.shape[-1]
    trials = {
        name: torch.cat([0 * clean.neurons[name], clean.neurons[name] / 2], 1).requires_grad_()
        for name in modules
        if clean.neurons[name].shape[-1] == width
    }
    outputs: dict[str, Tensor] = {}
    leaf = own.detach().requires_grad_()
    kept = _Kept(replay.model)
    with ExitStack() as hooks, kept, torch.enable_grad():
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(capture_neurons(outputs, name)).remove)
        for k, (name, trial) in enumerate(trials.items()):
            hooks.enter_context(replaced_output(name, modules[name], trial, (2 * k + 1) * s, (2 * len(trials) + 1) * s))
        traced = run_layer(replay, i, leaf.repeat(1, 2 * len(trials) + 1, 1), clean.positions)
    out = traced.detach()
    replay.require_equal(out[:, :s], clean.inputs[i + 1], f"layer {i}")
    bases = {}
    for (name, trial), given in zip(trials.items(), traced[:, s:].split(2 * s, 1)):
        zero, half = given.detach().chunk(2, 1)
        rounding = 4 * torch.finfo(out.dtype).eps * half.abs().max()
        if (zero + clean.neurons[name] / 2 - half).abs().max() <= rounding and _passes_unchanged(trial, given):
            bases[name] = zero
    return _Probe(bases, kept.bytes / (out.shape[0] * out.shape[1]), _Trace(leaf, outputs, traced[:, :s]))


def _passes_unchanged(rows: Tensor, given: Tensor) -> bool:
    """Whether a gradient at ``given`` arrives at ``rows`` bit for bit, in a sum; both ``(facts, n, hidden)``."""
    # Signs are exact in every type, so that a layer may add in another one.
    signs = torch.randint(0, 2, given.shape, generator=torch.Generator().manual_seed(0)).to(given) * 2 - 1
    (found,) = torch.autograd.grad(given, rows, signs, retain_graph=True)
    return torch.equal(found.to(signs), signs)


def _end_gradients(traces: list[_Trace], gradient: Tensor, clean: Clean) -> dict[str, Tensor]:
    """One backward pass through all ``traces``, last layer first: module name -> gradient ``(facts, s, d2)``.

    Empties the list on the way.
    """
    gradients = {}
    while traces:
        trace = traces.pop()
        inputs = [trace.entering, *trace.outputs.values()]
        gradient, *found = torch.autograd.grad(trace.leaving, inputs, gradient.to(trace.leaving.device))
        for name, grad in zip(trace.outputs, found):
            facts, s, d2 = clean.neurons[name].shape
            gradients[name] = grad.reshape(facts, -1, d2)[:, :s].clone()  # the trials' rows need not be kept
    return gradients


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps inside, without the weights."""

    def __init__(self, model: nn.Module):
        self.bytes = 0
        seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def count(tensor: Tensor) -> Any:
            packed, storage = pack(tensor), tensor.untyped_storage()
            if packed is tensor and storage.data_ptr() not in seen:  # else an offloaded weight, which is read again
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return packed

        super().__init__(count, unpack)


@contextmanager
def _as_unsupported(model: nn.Module) -> Iterator[None]:
    """Turns an error that the model's own code raises when its layers run one by one into UnsupportedModel."""
    try:
        yield
    except UnsupportedModel:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if lacks_memory(error):
            raise
        raise UnsupportedModel(
            f"{type(model).__name__}: its layers do not run one by one ({type(error).__name__}: {error})"
        ) from error


def _padded(values: Sequence[int], length: int) -> list[int]:
    return list(values) + [values[-1]] * (length - len(values))
