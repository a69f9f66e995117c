"""The divergence of a model from what it was, in texts that an edit should leave alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.editing.reading import logits_at, predicted_logits, read_together
from kne_easyedit.facts.encoding import Fact, Tokenizer, pad
from kne_easyedit.models.devices import device_of

AT_ONCE = 16
"""Texts that the unedited model reads in one pass, unless a step has more."""


class Divergence:
    """Mean ``KL(before || now)``, in nats, of the next token's distribution in some texts: a `SharedObjective`.

    The distributions that predict the texts' answers are compared. Objectives are built by `after_prompts`, where the
    answers are what the unedited model says, and by `in_texts`, where they are given.

    Args:
        texts: Texts in which an edit should leave the model as it is; their answers say at which tokens.
        before: Of each the log-probabilities that predict its answer before the edit, ``(tokens, vocabulary)``, in
            float32 at least.
        weight: Factor in the training loss.
        name: For messages.
        per_step: Texts of one training step: the first so many, then the next, and again from the start; 0: all.
        bound: Training goes on while the term of a step is not below.
    """

    def __init__(
        self,
        texts: Sequence[Fact],
        before: Sequence[Tensor],
        weight: float = 1.0,
        *,
        name: str = "kl",
        per_step: int = 0,
        bound: float = math.inf,
    ):
        self.name, self.weight, self.bound, self.binding = name, weight, bound, not math.isinf(bound)
        self._texts, self._before = list(texts), list(before)
        self._per_step = min(per_step or len(texts), len(texts))

    @classmethod
    def after_prompts(
        cls,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        weight: float = 1.0,
        *,
        tokens: int = 1,
        per_step: int = 0,
        **more: Any,
    ) -> Divergence:
        """The objective after prompts: with what the unedited model says after each, its greedy continuation.

        Args:
            model: The model before the edit.
            tokenizer: Its tokenizer.
            prompts: The prompts.
            weight: Factor in the training loss.
            tokens: Length of the continuations; one that ends with the end token is shorter. 1: the distributions
                after the prompts are compared.
            per_step: Texts of one training step.
            more: As for the class.
        """
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        at_once = max(min(per_step or len(prompts), len(prompts)), AT_ONCE)
        texts: list[Fact] = []
        before: list[Tensor] = []
        for start in range(0, len(ids), at_once):
            safe_point()
            some = ids[start : start + at_once]
            said, found = continuations(model, some, tokens, tokenizer.eos_token_id)
            before += found
            for prompt, row, answer in zip(prompts[start:], some, said):
                texts.append(Fact(prompt, tokenizer.decode(answer), (*row, *answer), len(row)))
        return cls(texts, before, weight, per_step=per_step, **more)

    @classmethod
    def in_texts(cls, model: nn.Module, texts: Sequence[Fact], weight: float = 1.0, **more: Any) -> Divergence:
        """The objective at the answers of ``texts``, for ``model`` before the edit; ``more``: as for the class."""
        before: list[Tensor] = []
        with torch.no_grad():
            for start in range(0, len(texts), AT_ONCE):
                safe_point()
                some = texts[start : start + AT_ONCE]
                found = _log_probabilities(_predicted(model, some))
                before += found.split([len(text.positions) for text in some])
        return cls(texts, before, weight, **more)

    def texts(self, step: int) -> list[Fact]:
        """The texts of a training step; their answers are the continuations."""
        return [self._texts[i] for i in self._turn(step)]

    def loss_of(self, logits: Tensor, step: int) -> Tensor:
        """The divergence of the logits ``(tokens, vocabulary)`` that predict the continuations of a step's texts."""
        return _divergence(logits, torch.cat([self._before[i] for i in self._turn(step)]))

    def may_stop(self, logits: Tensor, step: int) -> bool:
        """Whether the term of a step is below the bound."""
        return not self.binding or self.loss_of(logits, step).item() < self.bound

    def loss(self, model: nn.Module) -> Tensor:
        """The divergence of ``model`` from what it was, in all texts: a scalar, 0 for an unchanged model."""
        return _divergence(_predicted(model, self._texts), torch.cat(self._before))

    def _turn(self, step: int) -> list[int]:
        start = step * self._per_step
        return [i % len(self._texts) for i in range(start, start + self._per_step)]


def _predicted(model: nn.Module, texts: Sequence[Fact]) -> Tensor:
    """The logits that predict the texts' answers, ``(tokens, vocabulary)``, text by text."""
    return predicted_logits(model, read_together(texts).to(device_of(model)))


def _divergence(logits: Tensor, before: Tensor) -> Tensor:
    now = _log_probabilities(logits)
    return nn.functional.kl_div(now, before.to(now.device), log_target=True, reduction="batchmean")


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@torch.no_grad()
def continuations(
    model: nn.Module, prompts: Sequence[Sequence[int]], tokens: int, end: int | None
) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy continuations: at each step the most probable token.

    Args:
        model: A causal language model of transformers.
        prompts: Token ids of each prompt.
        tokens: How many tokens at most.
        end: The end token; None: there is none. A continuation ends with it.

    Returns:
        For each prompt the tokens, and the log-probabilities ``(tokens, vocabulary)`` that predict them, in float32 at
        least.
    """
    device = device_of(model)
    # Padded on the left, or a model with a sliding window would count the padding between a prompt and what follows it.
    # On the right if nothing follows, as in the passes of training (`Divergence.loss`).
    side, longest = "left" if tokens > 1 else "right", max(map(len, prompts))
    input_ids, attention_mask = (tensor.to(device) for tensor in pad(prompts, padding_side=side))
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    texts = torch.arange(len(prompts))
    last = torch.tensor([longest - 1 if side == "left" else len(row) - 1 for row in prompts])
    with logits_at(model, input_ids, texts, last) as chosen:
        out = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=tokens > 1)
    logits = chosen(out.logits)
    found, best = [_log_probabilities(logits)], [logits.argmax(-1)]
    while len(found) < tokens:
        safe_point()
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(prompts), 1)], 1)
        latest = best[-1].unsqueeze(1).to(device)
        if (kept := getattr(out, "past_key_values", None)) is None:  # as of Mamba: all is read again
            input_ids = torch.cat([input_ids, latest], 1)
            places = (attention_mask.cumsum(1) - 1).clamp(min=0)
            with logits_at(model, input_ids, texts, torch.full_like(last, input_ids.shape[1] - 1)) as chosen:
                out = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=places, use_cache=False)
            logits = chosen(out.logits)
        else:
            out = model(
                input_ids=latest,
                attention_mask=attention_mask,
                position_ids=position_ids[:, -1:] + len(found),
                past_key_values=kept,
                use_cache=True,
            )
            logits = out.logits[:, -1]
        found.append(_log_probabilities(logits))
        best.append(logits.argmax(-1))
    before = torch.stack(found, 1)  # (prompts, tokens, vocabulary)
    said = [row[: row.index(end) + 1] if end in row else row for row in torch.stack(best, 1).tolist()]
    return said, [rows[: len(row)] for rows, row in zip(before, said)]
