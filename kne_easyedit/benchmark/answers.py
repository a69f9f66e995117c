"""Free greedy answers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

SHOWN = 12
"""Tokens of an answer at least: enough to read it."""


@torch.no_grad()
def free_answer(model: nn.Module, tokenizer, request: Mapping) -> str:
    """The greedy continuation of the request's prompt, as long as its new answer and two tokens more, or `SHOWN`."""
    tokens = tokenizer(request["prompt"], return_tensors="pt").to(next(model.parameters()).device)
    length = len(tokenizer(" " + request["target_new"], add_special_tokens=False)["input_ids"]) + 2
    out = model.generate(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        max_new_tokens=max(SHOWN, length),
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
