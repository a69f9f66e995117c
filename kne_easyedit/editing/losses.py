"""The answers' cross-entropy, and the logits that it is of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kne_easyedit.editing.reading import Reading, predicted_logits
from kne_easyedit.facts.encoding import IGNORE, Batch


def answer_loss(model: nn.Module, batch: Batch | Reading) -> Tensor:
    """The mean cross-entropy over the answers' tokens of all facts: what the rows of Eq. 8-11 are trained on.

    Args:
        model: A causal language model of transformers.
        batch: Facts as `collate` gives them, padded on either side, or `read_together`.

    Returns:
        A scalar in nats, in float32 at least; gradients flow.
    """
    return cross_entropy(*answer_logits(model, batch))


def answer_logits(model: nn.Module, batch: Batch | Reading) -> tuple[Tensor, Tensor]:
    """The logits ``(tokens, vocabulary)`` that predict the answers' tokens, and these tokens ``(tokens,)``, by fact.

    Positions count from the first token that is not padding, so that the padding side makes no difference.
    """
    if isinstance(batch, Reading):
        logits = predicted_logits(model, batch)
        return logits, batch.labels.to(logits.device)
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
