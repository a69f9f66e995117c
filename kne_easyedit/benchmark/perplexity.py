"""The perplexity of a fixed text: what an edit does to language at large, with no other package."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from kne_easyedit._util.files import expand_path
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.models.devices import device_of

WINDOW = 1024
"""Tokens in one pass at most; fewer if the model takes fewer."""


def read_text(file: str | Path) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no UTF-8 text, or empty.
    """
    path = expand_path(file)
    if not path.is_file():
        raise FileNotFoundError(f"perplexity: {path} is no file; name a text file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"perplexity: {path} is no UTF-8 text ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"perplexity: {path} is empty")
    return text


@torch.no_grad()
def perplexity(model: Any, tokenizer: Tokenizer, text: str, window: int = WINDOW) -> float | None:
    """The exponential of the mean negative log-likelihood of a text's tokens, each counted once, all with one weight.

    The text is read in windows that overlap by half. A token is scored in the first window that holds it, so that it
    has at least half a window of context, or all that is before it. The first token of the text has none, and is not
    scored. Logits are taken to float32, sums are in double precision.

    Args:
        model: A model of transformers; ``config.max_position_embeddings`` bounds the window.
        tokenizer: Of the model; special tokens as it adds them.
        text: Any text.
        window: Tokens in one pass, at least 2.

    Returns:
        The perplexity, at least 1; None for a model whose log-likelihood is not finite, or too small for a number.

    Raises:
        ValueError: The text has fewer than two tokens.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < 2:
        raise ValueError(f"perplexity: the text has {len(ids)} tokens; at least 2 are needed, one to be predicted")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or window
    device = device_of(model)
    total = 0.0
    for begin, first, end in _windows(len(ids), max(2, min(window, limit))):
        part = ids[begin:end].to(device)
        logits = model(input_ids=part[None], use_cache=False).logits[0, first - begin - 1 : -1]
        total += cross_entropy(logits.float(), part[first - begin :], reduction="none").double().sum().item()
    mean = total / (len(ids) - 1)
    try:
        return math.exp(mean) if math.isfinite(mean) else None
    except OverflowError:
        return None


def _windows(tokens: int, size: int) -> Iterator[tuple[int, int, int]]:
    """``(begin, first token that is scored, end)`` of each window; every token but the first is scored once."""
    scored, end = 1, min(size, tokens)
    while scored < tokens:
        yield max(0, end - size), scored, end
        scored, end = end, min(end + max(1, size // 2), tokens)
