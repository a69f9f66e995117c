"""What is trained after the answer's last token, so that the edited model ends the answer there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kne_easyedit._util.interrupts import safe_point
from kne_easyedit._util.messages import shorten
from kne_easyedit.editing.divergence import AT_ONCE, continuations
from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.facts.encoding import Fact, Tokenizer, end_token, longest_text
from kne_easyedit.facts.words import continues_word
from kne_easyedit.models.state import preserve_state

CANDIDATES = 100
"""The most probable tokens after an answer, among which one that ends it, or a mark, is looked for."""
_PART_OF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def endings(model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact], hparams: EditSettings) -> list[int | None]:
    """The token that is trained after each answer, for `encoding.with_ending`; None: nothing is.

    Args:
        model: The unedited model; it is left exactly as it was.
        tokenizer: Its tokenizer.
        facts: The facts as they are localised.
        hparams: ``append_eos``: the end token. ``append_break``: `breaks`.

    Raises:
        ValueError: ``append_eos``, and the tokenizer has no end token.
    """
    if hparams.append_eos:
        return [end_token(tokenizer)] * len(facts)
    return breaks(model, tokenizer, facts) if hparams.append_break else [None] * len(facts)


def require_room(model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact], hparams: EditSettings) -> None:
    """Raises ValueError, before anything is computed, for a fact that takes no token more under the settings above."""
    setting = "append_eos" if hparams.append_eos else "append_break" if hparams.append_break else None
    limit = longest_text(model.config)
    for fact in facts if setting else ():
        if len(fact.ids) >= limit and fact.ids[-1] != tokenizer.eos_token_id:
            raise ValueError(
                f"{setting}: true trains one token more, but {shorten(fact.prompt)} has {len(fact.ids)} tokens with "
                f"its target already, and the model takes {limit}; shorten the prompt, or set {setting}: false"
            )


def breaks(model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact]) -> list[int | None]:
    """The token that ``model`` finds most probable after each answer, of those that end a word.

    They begin with a blank, a line end or a punctuation mark, or are the end token. Where none of the `CANDIDATES` is
    such a token it is the end token (None if the tokenizer has none), as after an answer that ends with it.
    """
    found: list[int | None] = []
    end = tokenizer.eos_token_id
    for start in range(0, len(facts), AT_ONCE):
        some = facts[start : start + AT_ONCE]
        for fact, candidates in zip(some, most_probable(model, some)):
            ends = (token for token in candidates if token == end or ends_word(tokenizer, fact.answer, token))
            found.append(end if fact.ids[-1] == end else next(ends, end))
    return found


def ends_word(tokenizer: Tokenizer, answer: Sequence[int], token: int) -> bool:
    """Whether the last word of an answer, token ids, has ended if ``token`` follows."""
    following = added_text(tokenizer, answer, token)[:1]
    return following not in ("", _PART_OF_A_CHARACTER) and not continues_word(following)


def added_text(tokenizer: Tokenizer, answer: Sequence[int], token: int) -> str:
    """What ``token`` adds to the text of an answer, token ids.

    Empty where it makes another text of it, or adds nothing that can be seen: it may be a part of a character.
    """
    before, after = tokenizer.decode(list(answer)), tokenizer.decode([*answer, token])
    return after.removeprefix(before) if after.startswith(before) else ""


def most_probable(model: nn.Module, facts: Sequence[Fact]) -> list[list[int]]:
    """For each fact the `CANDIDATES` tokens that ``model`` finds most probable after it, best first."""
    safe_point()
    with preserve_state(model):
        _, after = continuations(model, [fact.ids for fact in facts], 1, None)
    return [rows[0].topk(min(CANDIDATES, rows.shape[-1])).indices.tolist() for rows in after]
