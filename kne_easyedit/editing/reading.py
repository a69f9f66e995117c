"""What a model reads to predict some answers: no beginning twice, and no logits but those that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from kne_easyedit.facts.encoding import Fact, pad
from kne_easyedit.models.devices import device_of

_heads: WeakKeyDictionary[nn.Module, tuple[ref[nn.Module], bool]] = WeakKeyDictionary()
"""Model -> its output head, and whether the model returns what that gives (`learn_head`)."""


@dataclass(frozen=True)
class Reading:
    """Texts, padded on the right, and the places in them that predict answers: facts in order, token by token."""

    input_ids: Tensor
    """``(texts, longest)``."""
    attention_mask: Tensor
    """``(texts, longest)``."""
    rows: Tensor
    """The text of each answer token, ``(tokens,)``."""
    positions: Tensor
    """The position in it that predicts the token, ``(tokens,)``."""
    labels: Tensor
    """The answers' tokens, ``(tokens,)``."""

    def to(self, device: torch.device) -> Reading:
        """The same on ``device``."""
        return Reading(*(tensor.to(device) for tensor in vars(self).values()))


def read_together(facts: Sequence[Fact]) -> Reading:
    """Facts in as few texts as needed: one whose input is the beginning of another's is read in that one.

    Attention is causal, so that what follows changes nothing there. The last token of an answer predicts nothing, and
    is not read.
    """
    inputs = [fact.ids[:-1] for fact in facts]
    longest_of: dict[tuple[int, ...], int] = {}  # beginning -> the longest fact that has it, the first of equal ones
    for i in sorted(range(len(facts)), key=lambda i: -len(inputs[i])):
        for end in range(1, len(inputs[i]) + 1):
            longest_of.setdefault(inputs[i][:end], i)
    within = [longest_of[ids] for ids in inputs]
    row_of = {i: row for row, i in enumerate(dict.fromkeys(within))}
    input_ids, attention_mask = pad([inputs[i] for i in row_of])
    return Reading(
        input_ids,
        attention_mask,
        torch.tensor([row_of[i] for i, fact in zip(within, facts) for _ in fact.answer]),
        torch.tensor([position for fact in facts for position in fact.positions]),
        torch.tensor([token for fact in facts for token in fact.answer]),
    )


def predicted_logits(model: Any, reading: Reading) -> Tensor:
    """The logits that predict the answers of a reading, ``(tokens, vocabulary)``; gradients flow."""
    position_ids = (reading.attention_mask.cumsum(1) - 1).clamp(min=0)
    with logits_at(model, reading.input_ids, reading.rows, reading.positions) as chosen:
        out = model(
            input_ids=reading.input_ids,
            attention_mask=reading.attention_mask,
            position_ids=position_ids,
            use_cache=False,
        )
    return chosen(out.logits)


@contextmanager
def logits_at(
    model: nn.Module, input_ids: Tensor, rows: Tensor, positions: Tensor
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, the output head of a model that `learn_head` knows computes the logits of some places alone.

    In a vocabulary of 50,000 the head is a fifth of SmolLM2's work, and few positions predict an answer.

    Args:
        model: A causal language model of transformers, for one pass inside.
        input_ids: What it will read, ``(texts, longest)``.
        rows: A text for each place, ``(places,)``.
        positions: A position for each place, ``(places,)``.

    Yields:
        Takes the ``logits`` of the pass, and gives those of the places, ``(places, vocabulary)``.
    """
    head, done = _known_head(model), False

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        nonlocal done
        if len(args) != 1 or args[0].shape[:-1] != input_ids.shape:
            return None
        done = True
        return (args[0][rows.to(args[0].device), positions.to(args[0].device)].unsqueeze(0),)

    def chosen(logits: Tensor) -> Tensor:
        return logits[0] if done else logits[rows.to(logits.device), positions.to(logits.device)]

    hook = None if head is None else head.register_forward_pre_hook(choose)
    try:
        yield chosen
    finally:
        if hook is not None:
            hook.remove()


@torch.no_grad()
def learn_head(model: Any) -> None:
    """Finds out, by a pass of two tokens, whether a model's logits are what its output head gives, as they are.

    A model that changes them behind its head (Gemma 2 caps them) computes those of all positions. Once for each model
    and head.

    Args:
        model: A causal language model of transformers, inside `preserve_state`.
    """
    head = _output_head(model)
    if head is None or (model in _heads and _heads[model][0]() is head):
        return
    given: list[tuple[tuple[Any, ...], Any]] = []
    hook = head.register_forward_hook(lambda _, args, out: given.append((args, out)))
    try:
        ids = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        hook.remove()
    is_last = False
    if len(given) == 1:
        args, out = given[0]
        is_last = len(args) == 1 and args[0].shape[:-1] == ids.shape and torch.equal(out.to(logits), logits)
    _heads[model] = ref(head), is_last


def _known_head(model: nn.Module) -> nn.Module | None:
    """The head of a model that `learn_head` has found to be the last thing that is computed; None: not known."""
    if model not in _heads:
        return None
    head, is_last = _heads[model]
    return head() if is_last and head() is _output_head(model) else None


def _output_head(model: Any) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
