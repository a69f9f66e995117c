"""Variants of the subject's name, trained to the same answer, so that the edit holds for aliases, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit.editing.losses import answer_loss, cross_entropy
from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.facts.encoding import Fact, Tokenizer, collate, with_end
from kne_easyedit.facts.name_variants import variant_prompts
from kne_easyedit.localization.data import encode_facts
from kne_easyedit.models.devices import device_of


class Variants:
    """The mean cross-entropy of the answers of further facts: a `SharedObjective` of weight 1.

    Training goes on until each of them is below ``stop_loss``. They are neither answers of the edit nor in its losses.

    Args:
        facts: The facts.
        stop_loss: In nats.
    """

    name, weight = "variants", 1.0

    def __init__(self, facts: Sequence[Fact], stop_loss: float):
        self._facts, self._stop_loss = list(facts), stop_loss

    def texts(self, step: int) -> list[Fact]:
        """All facts, in every step."""
        return self._facts

    def loss_of(self, logits: Tensor, step: int) -> Tensor:
        """The mean over their answers' tokens."""
        return cross_entropy(logits, self._labels(logits))

    def may_stop(self, logits: Tensor, step: int) -> bool:
        """Whether every fact's own loss is below ``stop_loss``."""
        losses = cross_entropy(logits, self._labels(logits), "none")
        own = losses.split([len(fact.answer) for fact in self._facts])
        return all(one.mean().item() < self._stop_loss for one in own)

    def loss(self, model: nn.Module) -> Tensor:
        """The term in a pass of its own."""
        return answer_loss(model, collate(self._facts).to(device_of(model)))

    def _labels(self, logits: Tensor) -> Tensor:
        return torch.tensor([token for fact in self._facts for token in fact.answer], device=logits.device)


def variant_facts(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Mapping[str, Any]], hparams: EditSettings
) -> list[Fact]:
    """The requests with ``subject_variants`` other names of their subjects each, encoded as the requests are.

    Variants that cannot be encoded are left out.
    """
    found: list[Fact] = []
    for request in requests:
        for prompt in variant_prompts(request, hparams.subject_variants):
            varied = {"prompt": prompt, "target_new": request["target_new"]}
            with suppress(ValueError):
                (fact,) = encode_facts(model, tokenizer, [varied], hparams)
                found.append(with_end(tokenizer, fact, model.config) if hparams.append_eos else fact)
    return found
