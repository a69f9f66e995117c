"""Free greedy answers: generated, compared with the new answer, shown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kne_easyedit._util.messages import printable
from kne_easyedit.benchmark.asking import continuations
from kne_easyedit.facts.encoding import SEPARATOR, Tokenizer
from kne_easyedit.facts.words import continues_word, is_unspaced_script

SHOWN = 12
"""Least number of tokens: enough to read the answer."""
LONGEST = 32
"""Tokens of an answer that comes to no natural stop."""

_NO_ANSWER = "(ends at once)"
_SENTENCE_END = r"[.!?](?=\s|$)|[。！？]|\n"
_STOP = re.compile(_SENTENCE_END)
_STOP_WITHIN = re.compile(r"[.!?]\s|[。！？\n]")
"""Before a text's end, where the next token may continue a number or an abbreviation."""


@dataclass(frozen=True)
class FreeAnswer:
    """The greedy continuation of a prompt, as texts without special tokens."""

    beginning: str
    """As many tokens as the new answer has and two more, at least `SHOWN`: for exact match."""
    whole: str
    """Up to the end token, or a little beyond the first end of a sentence or line (`up_to_stop` cuts there); at most
    `LONGEST` tokens."""


def free_answers(model: Any, tokenizer: Tokenizer, request: Mapping, separator: str = SEPARATOR) -> FreeAnswer:
    """The greedy continuation of a request's prompt.

    Args:
        model: Its ``config.max_position_embeddings`` limits the length.
        tokenizer: Of the model.
        request: With ``prompt`` and ``target_new``.
        separator: Joins prompt and answer.
    """
    shown = max(SHOWN, len(tokenizer(separator + request["target_new"], add_special_tokens=False)["input_ids"]) + 2)

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    (ids,) = continuations(
        model,
        tokenizer,
        [request["prompt"]],
        max(shown, LONGEST),
        ended=lambda ids: len(ids) >= shown and bool(_STOP_WITHIN.search(text(ids).lstrip())),
    )
    return FreeAnswer(text(ids[:shown]), text(ids))


def up_to_stop(text: str) -> str:
    """A text up to its first end of a sentence or line; blanks and line ends before it do not count."""
    text = text.lstrip()
    found = _STOP.search(text)
    return (text[: found.end()] if found else text).strip()


def has_stop(text: str) -> bool:
    """Whether a sentence or a line ends in a text, its beginning apart."""
    return _STOP.search(text.lstrip()) is not None


def is_whole(answer: str, target: str) -> bool:
    """Whether an answer is the new one and nothing else up to its natural stop: the end of text, sentence or line.

    Blanks and capitals do not count. A full stop within the new answer (``St. Louis``) ends nothing.
    """
    words = r"\s+".join(map(re.escape, target.split()))
    return re.match(rf"\s*{words}[ \t]*(?:$|{_SENTENCE_END})", answer, re.IGNORECASE) is not None


def one_line(answer: str) -> str:
    """The beginning of an answer as one line of at most 70 characters without effect on a terminal."""
    return printable(answer)[:70] or _NO_ANSWER


def in_full(answer: str) -> str:
    """The whole of an answer as one line without effect on a terminal (`printable`)."""
    return printable(answer) or _NO_ANSWER


def begins_with(answer: str, target: str) -> bool:
    """Whether a free answer begins with the new one: blanks and capitals do not count, but words end where they end."""
    answer, target = " ".join(answer.split()).casefold(), " ".join(target.split()).casefold()
    return answer.startswith(target) and not continues_word(answer[len(target) :][:1])


def first_word(answer: str) -> str:
    """The first word of an answer, without punctuation and capitals; of a script without blanks, its first character.

    Empty for an answer that ends at once.
    """
    for word in answer.casefold().split():
        if letters := "".join(c for c in word if c.isalnum() or unicodedata.combining(c)):
            return letters[0] if is_unspaced_script(letters[0]) else letters
    return ""
