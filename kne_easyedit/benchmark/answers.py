"""Free greedy answers: generated, compared with the new answer, shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

import torch

from kne_easyedit.facts.encoding import SEPARATOR, Tokenizer

SHOWN = 12
"""Least number of tokens: enough to read the answer."""


@torch.no_grad()
def free_answer(model: Any, tokenizer: Tokenizer, request: Mapping, separator: str = SEPARATOR) -> str:
    """The greedy continuation of a request's prompt.

    Args:
        model: Its ``config.max_position_embeddings`` limits the length.
        tokenizer: Of the model.
        request: With ``prompt`` and ``target_new``.
        separator: Joins prompt and answer.

    Returns:
        As many tokens as the new answer has and two more, at least `SHOWN`, without special tokens.
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


def one_line(answer: str) -> str:
    """The beginning of an answer as one line of at most 70 characters, for the terminal."""
    return " ".join(answer.split())[:70] or "(ends at once)"


def begins_with(answer: str, target: str) -> bool:
    """Whether a free answer begins with the new one: blanks and capitals do not count, but words end where they end."""
    answer, target = " ".join(answer.split()).casefold(), " ".join(target.split()).casefold()
    following = answer[len(target) :][:1]
    return answer.startswith(target) and (not following.isalnum() or is_unspaced_script(following))


def is_unspaced_script(character: str) -> bool:
    """Whether a character is of a script without blanks between words: Chinese, Japanese, Thai and related ones."""
    return unicodedata.east_asian_width(character) in "WF" or unicodedata.name(character, "").startswith(
        ("THAI ", "LAO ", "KHMER ", "MYANMAR ")
    )
