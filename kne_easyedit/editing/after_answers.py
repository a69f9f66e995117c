"""What a model says after the answers of an edit: it is spared, or the edited model says the answer again and again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from torch import nn

from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.editing.divergence import AT_ONCE, continuations
from kne_easyedit.facts.encoding import Fact

BRANCHES = 4
"""So many tokens that may follow an answer, each with what the model says then: sampled text takes one of them."""


def after_answers(
    model: nn.Module, facts: Sequence[Fact], tokens: int, end: int | None, most: int
) -> dict[tuple[int, ...], range]:
    """Texts that begin with a fact and go on as the model would, with the places of what follows the answer.

    Each of the `BRANCHES` tokens that are most probable after the answer begins one, the model's greedy continuation
    follows.

    Args:
        model: The model before the edit, frozen and in evaluation mode (`preserve_state`).
        facts: Prompts with their new answers.
        tokens: How many tokens follow the answer at most; ``config.max_position_embeddings`` may leave fewer.
        end: The end token, with which a text ends; None: there is none.
        most: Places of all texts at most. The most probable branch of each fact comes first, then the next of each.

    Returns:
        Token ids of a text -> its places.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    able = [fact for fact in facts if limit is None or len(fact.ids) + tokens <= limit]
    branches = [_branches(model, able[start : start + AT_ONCE], end) for start in range(0, len(able), AT_ONCE)]
    texts = [text for some in branches for turn in zip_longest(*some) for text in turn if text is not None]
    found: dict[tuple[int, ...], range] = {}
    for start in range(0, len(texts), AT_ONCE):
        safe_point()
        some = texts[start : start + AT_ONCE]
        said = continuations(model, [ids for ids, _ in some], tokens - 1, end)[0] if tokens > 1 else [[]] * len(some)
        for (ids, begin), more in zip(some, said):
            text = (*ids, *(token for token in more if token != end))
            if sum(map(len, found.values())) + len(text) - begin > most:
                return found
            found[text] = range(begin, len(text))
    return found


def _branches(model: Any, facts: Sequence[Fact], end: int | None) -> list[list[tuple[tuple[int, ...], int]]]:
    """Of each fact its ids with each token that may follow, and where that token stands."""
    safe_point()
    _, after = continuations(model, [fact.ids for fact in facts], 1, None)
    found = []
    for fact, (rows,) in zip(facts, after):
        likely = [token for token in rows.topk(min(BRANCHES + 1, len(rows))).indices.tolist() if token != end]
        found.append([((*fact.ids, token), len(fact.ids)) for token in likely[:BRANCHES]])
    return found
