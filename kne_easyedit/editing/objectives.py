"""An addition to the paper, off by default: a penalty for what an edit does to unrelated prompts (``kl_weight``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.facts.encoding import IGNORE, Batch, pad
from kne_easyedit.facts.readers import data_digest
from kne_easyedit.facts.records import load_requests
from kne_easyedit.models.devices import device_of


class Divergence:
    """Mean ``KL(before || now)`` of the next token's distribution after some prompts.

    Built before the edit, it keeps the distributions of that moment: ``(prompts, vocabulary)`` in float32 at least.
    """

    def __init__(self, model: nn.Module, tokenizer, prompts: Sequence[str]):
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        device = device_of(model)
        self.input_ids, self.attention_mask = (tensor.to(device) for tensor in pad(ids))
        self.last = torch.tensor([len(row) - 1 for row in ids], device=device)
        with torch.no_grad():
            self.before = self._log_probabilities(model)

    def now(self, model: nn.Module) -> Tensor:
        """The divergence of ``model`` as it is, a scalar; gradients flow."""
        return nn.functional.kl_div(self._log_probabilities(model), self.before, log_target=True, reduction="batchmean")

    def _log_probabilities(self, model: nn.Module) -> Tensor:
        out = model(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False)
        last = out.logits[torch.arange(len(self.last), device=out.logits.device), self.last.to(out.logits.device)]
        return last.to(torch.promote_types(last.dtype, torch.float32)).log_softmax(-1)


def unrelated_prompts(hparams: EditSettings, edited: Sequence[str]) -> list[str]:
    """``kl_size`` prompts of ``kl_data``, none of them among the ``edited`` ones.

    Raises ValueError if the file has none.
    """
    known = _prompts(str(hparams.kl_data), data_digest(str(hparams.kl_data)))
    chosen = [prompt for prompt in known if prompt not in edited][: hparams.kl_size]
    if not chosen:
        raise ValueError(f"kl_data: {hparams.kl_data!r} holds no prompt beside those that are edited")
    return chosen


@lru_cache(maxsize=4)
def _prompts(path: str, content: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(request["prompt"] for request in load_requests(path)))


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the answers' tokens of all facts, in float32 at least."""
    return _cross_entropy(*answer_logits(model, batch))


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits ``(tokens, vocabulary)`` that predict the answers' tokens, fact by fact, and these tokens ``(tokens,)``.

    Positions count from the first token that is not padding, so that the padding side makes no difference.
    """
    position_ids = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=position_ids, use_cache=False
    )
    labels = batch.labels[:, 1:].to(out.logits.device)
    answers = labels != IGNORE
    return out.logits[:, :-1][answers], labels[answers]  # the answers' rows only: padding never meets the loss


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction=reduction
    )
