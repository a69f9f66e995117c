"""The training loss: the answers' cross-entropy, and further objectives.

A further objective is a class with a ``name``, a ``weight`` and a ``loss(model)``, a function that builds it from the
settings, and a line in `OBJECTIVES`. Those that exist go beyond the paper and are off by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.facts.encoding import IGNORE, Batch, Tokenizer, chat_prompt, pad
from kne_easyedit.facts.readers import data_digest
from kne_easyedit.facts.records import load_requests
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.state import preserve_state


class Objective(Protocol):
    """A further term of the training loss. Training stops by the answers' cross-entropy alone."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def weight(self) -> float:
        """Factor of `loss` in the sum that is minimised."""

    def loss(self, model: nn.Module) -> Tensor:
        """The term for ``model`` with its present weights: a scalar through which gradients flow."""


class Divergence:
    """Mean ``KL(before || now)``, in nats, of the next token's distribution after each of some prompts.

    ``before`` are the distributions of ``model`` when the objective is built, ``(prompts, vocabulary)`` in float32 at
    least.

    Args:
        model: The model before the edit.
        tokenizer: Its tokenizer.
        prompts: Texts whose continuation an edit should leave as it is.
        weight: Factor in the training loss.
    """

    name = "kl"

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str], weight: float = 1.0):
        self.weight = weight
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        device = device_of(model)
        self._input_ids, self._attention_mask = (tensor.to(device) for tensor in pad(ids))
        self._last = torch.tensor([len(row) - 1 for row in ids], device=device)
        with torch.no_grad():
            self._before = self._log_probabilities(model)

    def loss(self, model: nn.Module) -> Tensor:
        """The divergence of ``model`` from what it was: a scalar, 0 for an unchanged model."""
        return nn.functional.kl_div(
            self._log_probabilities(model), self._before, log_target=True, reduction="batchmean"
        )

    def _log_probabilities(self, model: nn.Module) -> Tensor:
        out = model(input_ids=self._input_ids, attention_mask=self._attention_mask, use_cache=False)
        last = out.logits[torch.arange(len(self._last), device=out.logits.device), self._last.to(out.logits.device)]
        return last.to(torch.promote_types(last.dtype, torch.float32)).log_softmax(-1)


def unrelated_prompts(hparams: EditSettings, edited: Sequence[str]) -> list[str]:
    """The first ``kl_size`` prompts of ``kl_data`` that are not among the ``edited`` ones.

    Raises:
        ValueError: The file has none.
    """
    known = _prompts(str(hparams.kl_data), data_digest(str(hparams.kl_data)))
    chosen = [prompt for prompt in known if prompt not in edited][: hparams.kl_size]
    if not chosen:
        raise ValueError(f"kl_data: {hparams.kl_data!r} holds no prompt beside those that are edited")
    return chosen


@lru_cache(maxsize=4)
def _prompts(path: str, content: str | None) -> tuple[str, ...]:
    """The prompts of a file; ``content``, its digest, makes a changed file another entry of the cache."""
    return tuple(dict.fromkeys(request["prompt"] for request in load_requests(path)))


def _divergence(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Mapping[str, Any]], hparams: EditSettings
) -> Divergence:
    prompts = unrelated_prompts(hparams, [request["prompt"] for request in requests])
    if hparams.use_chat_template:
        prompts = [chat_prompt(tokenizer, prompt) for prompt in prompts]
    return Divergence(model, tokenizer, prompts, hparams.kl_weight)


ObjectiveBuilder = Callable[[nn.Module, Tokenizer, Sequence[Mapping[str, Any]], EditSettings], Objective]

OBJECTIVES: dict[str, ObjectiveBuilder] = {"kl_weight": _divergence}
"""Setting that is an objective's weight -> what builds the objective from model, tokenizer, requests and settings."""


def objectives_for(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Mapping[str, Any]], hparams: EditSettings
) -> list[Objective]:
    """The objectives of `OBJECTIVES` whose weight is not 0 in ``hparams``, for an edit of ``requests``.

    They may run ``model``, which is left exactly as it was.
    """
    chosen = [build for weight, build in OBJECTIVES.items() if getattr(hparams, weight)]
    if not chosen:
        return []
    with preserve_state(model):
        return [build(model, tokenizer, requests, hparams) for build in chosen]


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy over the answers' tokens of all facts: what the rows of Eq. 8-11 are trained on.

    Args:
        model: A causal language model of transformers.
        batch: Facts as `collate` gives them, padded on either side.

    Returns:
        A scalar in nats, in float32 at least; gradients flow.
    """
    return cross_entropy(*answer_logits(model, batch))


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits ``(tokens, vocabulary)`` that predict the answers' tokens, and these tokens ``(tokens,)``, by fact.

    Positions count from the first token that is not padding, so that the padding side makes no difference.
    """
    position_ids = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=position_ids, use_cache=False
    )
    labels = batch.labels[:, 1:].to(out.logits.device)
    answers = labels != IGNORE
    return out.logits[:, :-1][answers], labels[answers]  # the answers' rows only: padding never meets the loss


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Torch's cross-entropy, computed in float32 at least."""
    return nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction=reduction
    )
