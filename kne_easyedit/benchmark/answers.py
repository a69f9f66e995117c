"""Free greedy answers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kne_easyedit.facts.encoding import SEPARATOR

SHOWN = 12
"""Tokens of an answer at least: enough to read it."""


@torch.no_grad()
def free_answer(model: nn.Module, tokenizer, request: Mapping, separator: str = SEPARATOR) -> str:
    """The greedy continuation of the request's prompt: as long as its new answer and two tokens more, at least `SHOWN`.

    Shorter where the model (its ``config.max_position_embeddings``) has no room for more.
    """
    tokens = tokenizer(request["prompt"], return_tensors="pt").to(next(model.parameters()).device)
    prompt_length = tokens["input_ids"].shape[1]
    length = max(SHOWN, len(tokenizer(separator + request["target_new"], add_special_tokens=False)["input_ids"]) + 2)
    limit = getattr(model.config, "max_position_embeddings", None)
    out = model.generate(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        max_new_tokens=min(length, limit - prompt_length) if limit else length,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, prompt_length:], skip_special_tokens=True)
