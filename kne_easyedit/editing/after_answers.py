"""What a model says after the answers of an edit: it is spared, or the edited model says the answer again and again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any
from unicodedata import category

from torch import nn

from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.editing.divergence import AT_ONCE, continuations
from kne_easyedit.editing.endings import added_text, most_probable
from kne_easyedit.facts.encoding import Fact, Tokenizer, longest_text

MARKS = 4
"""So many punctuation marks (line ends included) that may follow an answer: behind them it would be said again."""
BRANCHES = 1 + MARKS
"""Texts of a fact: the model's own continuation, and those that begin with such a mark."""
COMPARED = 4
"""So many tokens behind the first one after an answer: where an edited model would begin to say the answer again."""


def after_answers(
    model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact], tokens: int, most: int
) -> dict[tuple[int, ...], range]:
    """Texts that begin with a fact and go on as the model would, with the places of what follows the answer.

    The token that is most probable after the answer begins one, each of the `MARKS` most probable punctuation marks
    another one; the model's greedy continuation follows, up to the end token.

    Args:
        model: The model before the edit, frozen and in evaluation mode (`preserve_state`).
        tokenizer: Its tokenizer.
        facts: Prompts with their new answers.
        tokens: How many tokens follow the answer at most. A fact after which ``config.max_position_embeddings`` leaves
            fewer has no texts.
        most: Places of all texts at most. The most probable branch of each fact comes first, then the next of each; the
            first one that is too long for what is left ends them. If that is the very first, it is cut.

    Returns:
        Token ids of a text -> its places.
    """
    end = tokenizer.eos_token_id
    able = [fact for fact in facts if len(fact.ids) + tokens <= longest_text(model.config)]
    groups = [able[start : start + AT_ONCE] for start in range(0, len(able), AT_ONCE)]
    branches = [of_fact for group in groups for of_fact in _branches(model, tokenizer, group)]
    texts = [text for turn in zip_longest(*branches) for text in turn if text is not None]
    found: dict[tuple[int, ...], range] = {}
    for start in range(0, len(texts), AT_ONCE):
        safe_point()
        some = texts[start : start + AT_ONCE]
        said = continuations(model, [ids for ids, _ in some], tokens - 1, end)[0] if tokens > 1 else [[]] * len(some)
        for (ids, begin), more in zip(some, said):
            text = (*ids, *(token for token in more if token != end))
            if not found:  # rather a part of it than nothing at all
                text = text[: begin + most]
            if sum(map(len, found.values())) + len(text) - begin > most or len(text) == begin:
                return found
            found[text] = range(begin, len(text))
    return found


def texts_after_answers(model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact]) -> list[Fact]:
    """The texts of `after_answers` whose answers are the `COMPARED` tokens after the first one that follows an answer.

    One token more follows, the label of the last one that is compared. For arguments see `after_answers`.
    """
    able = [fact for fact in facts if len(fact.ids) + COMPARED + 1 <= longest_text(model.config)]
    said = after_answers(model, tokenizer, able, COMPARED, len(able) * BRANCHES * COMPARED)
    end = next(end for end in (tokenizer.eos_token_id, 0) if end is not None)
    return [Fact("", "", (*ids, end), places.start + 1) for ids, places in said.items()]


def _branches(model: Any, tokenizer: Tokenizer, facts: Sequence[Fact]) -> list[list[tuple[tuple[int, ...], int]]]:
    """Of each fact its ids with each token that may follow, and where that token stands."""
    special = set(tokenizer.all_special_ids)
    found = []
    for fact, candidates in zip(facts, most_probable(model, facts)):
        likely = [token for token in candidates if token not in special]
        marks = [token for token in likely[1:] if is_mark(tokenizer, fact.answer, token)][:MARKS]
        found.append([((*fact.ids, token), len(fact.ids)) for token in (*likely[:1], *marks)])
    return found


def is_mark(tokenizer: Tokenizer, answer: Sequence[int], token: int) -> bool:
    """Whether a token adds nothing to an answer but punctuation or a line end."""
    marks = added_text(tokenizer, answer, token).strip(" ")
    return bool(marks) and all(c == "\n" or category(c)[0] == "P" for c in marks)
