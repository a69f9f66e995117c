"""Free greedy answers, and whether they are right."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

SHOWN = 12
"""Tokens of an answer at least: enough to read it."""


class Answers:
    """Greedy continuations of prompts by one model."""

    def __init__(self, model: nn.Module, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def to(self, request: Mapping) -> str:
        """The continuation of the request's prompt, as long as its new answer and two tokens more, or `SHOWN`."""
        tokens = self.tokenizer(request["prompt"], return_tensors="pt").to(next(self.model.parameters()).device)
        length = len(self.tokenizer(" " + request["target_new"], add_special_tokens=False)["input_ids"]) + 2
        out = self.model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=max(SHOWN, length),
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        return self.tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def begins_with(answer: str, target: str) -> bool:
    """Whether a free answer begins with the wanted one: blanks and capitals do not count, but words end where they end."""
    answer, target = " ".join(answer.split()).casefold(), " ".join(target.split()).casefold()
    return answer.startswith(target) and not answer[len(target) :][:1].isalnum()
