"""Variants of the subject's name, trained to the same answer, so that the edit holds for aliases, too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit.editing.earlier import earlier_requests
from kne_easyedit.editing.endings import endings
from kne_easyedit.editing.losses import answer_loss, cross_entropy
from kne_easyedit.editing.neighbours import as_said, asked_of_others, known_facts
from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.facts.encoding import Fact, Tokenizer, collate, with_ending
from kne_easyedit.facts.name_variants import variant_prompts
from kne_easyedit.facts.neighbours import run_exclusions
from kne_easyedit.localization.data import encode_facts
from kne_easyedit.models.devices import device_of


class Variants:
    """The cross-entropy of the answers of further facts, a few at each step: a `SharedObjective` of weight 1.

    A step trains those whose loss was the largest when they were last trained, for all of them are nearly one fact: a
    step with one of five costs a third of a step with five, and takes the others along. Training goes on until each
    was last seen below ``stop_loss``. They are neither answers of the edit nor in its losses.

    Args:
        facts: The facts.
        stop_loss: In nats.
        per_step: How many of them one step trains.
    """

    name, weight, binding = "variants", 1.0, False

    def __init__(self, facts: Sequence[Fact], stop_loss: float, per_step: int = 1):
        self._facts, self._stop_loss, self._per_step = list(facts), stop_loss, per_step
        self._losses = [math.inf] * len(self._facts)  # as they were last seen
        self._now: list[int] = []

    def texts(self, step: int) -> list[Fact]:
        """The facts of this step; the first of those that are equal."""
        by_loss = sorted(range(len(self._facts)), key=lambda i: -self._losses[i])
        self._now = by_loss[: self._per_step]
        return [self._facts[i] for i in self._now]

    def loss_of(self, logits: Tensor, step: int) -> Tensor:
        """The mean over the answers' tokens of this step's facts."""
        return self._seen(logits).mean()

    def may_stop(self, logits: Tensor, step: int) -> bool:
        """Whether every fact's own loss, as it was last seen, is below ``stop_loss``."""
        self._seen(logits)
        return max(self._losses) < self._stop_loss

    def loss(self, model: nn.Module) -> Tensor:
        """The mean over all facts, in a pass of its own."""
        return answer_loss(model, collate(self._facts).to(device_of(model)))

    def _seen(self, logits: Tensor) -> Tensor:
        """The loss of each answer token of this step's facts, which are remembered."""
        facts = [self._facts[i] for i in self._now]
        labels = torch.tensor([token for fact in facts for token in fact.answer], device=logits.device)
        losses = cross_entropy(logits, labels, "none")
        for i, own in zip(self._now, losses.detach().split([len(fact.answer) for fact in facts])):
            self._losses[i] = own.mean().item()
        return losses


def variant_facts(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Mapping[str, Any]], hparams: EditSettings
) -> list[Fact]:
    """The requests with ``subject_variants`` other names of their subjects each, encoded as the requests are.

    Variants that cannot be encoded are left out, and names of what other facts are about: the other requests, those
    that ``model`` was edited with before, and what is known of subjects (`known_facts`). So are names that stand in
    what any of the requests brings to be asked about other subjects (`asked_of_others`).
    """
    said = as_said([*requests, *earlier_requests(model, requests)], hparams, tokenizer)
    exclude, known = run_exclusions(said), known_facts(hparams)
    asked = asked_of_others(said)
    found: list[Fact] = []
    for request in said[: len(requests)]:
        for prompt in variant_prompts(request, hparams.subject_variants, exclude, known, asked):
            varied = {"prompt": prompt, "target_new": request["target_new"]}
            with suppress(ValueError):
                found += encode_facts(model, tokenizer, [varied], hparams)
    ended: list[Fact] = []
    for fact, ending in zip(found, endings(model, tokenizer, found, hparams)):
        with suppress(ValueError):
            ended.append(with_ending(fact, ending, model.config))
    return ended
