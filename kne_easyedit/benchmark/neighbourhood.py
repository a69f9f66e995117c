"""What an edit does to the neighbours of its fact, and whether it is denied: measured before and after the edit.

Neighbours are prompts about other subjects, which an edit of one fact should leave alone. *Bleed* is that they give the
new answer. An alias of the subject has the same template: where every subject gives the new answer, so does the alias,
which is why alias success is counted beyond bleed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypedDict

from kne_easyedit.benchmark.answers import begins_with, first_word, has_stop
from kne_easyedit.benchmark.asking import AT_ONCE, continuations, predicted, probabilities
from kne_easyedit.benchmark.probes import Asked, is_alias_category
from kne_easyedit.facts.encoding import SEPARATOR, Fact, Tokenizer, encode

LENGTH = 8
"""Tokens of a neighbour's free answer at least; at most so many are compared."""


class Before(TypedDict):
    """The unedited model's answers to what is asked of a record."""

    tokens: list[list[int]]
    """Of each neighbour's free answer, up to its natural stop and at most `LENGTH`: what is compared."""
    answers: list[str]
    """The free answers of neighbours and aliases (`Asked.prompts`)."""
    forced: list[float]
    """For each neighbour the share of the new answer's tokens that are predicted, the right ones before given."""
    denial: float | None


class NeighbourLine(TypedDict):
    """A neighbour in a result line."""

    prompt: str
    subject: str
    kind: str
    """``own``: of the record; ``relation``: made of another subject's fact."""
    before: str
    """The free greedy answer of the unedited model."""
    after: str
    kept: float
    """Share of the tokens of the answer before that are still predicted."""
    forced_before: float
    """Share of the new answer's tokens that are predicted, the right ones before given."""
    forced_after: float


class AliasLine(TypedDict):
    """An alias prompt in a result line."""

    prompt: str
    before: str
    after: str


class Shares(TypedDict):
    """Fields of a result line, from 0 to 1; None where nothing was asked."""

    neighbourhood: float | None
    """Mean of ``kept``."""
    neighbourhood_free: float | None
    """Share of neighbours whose free answer has the first word that it had."""
    bleed: float | None
    """Share of neighbours whose free answer begins with the new answer, of those that did not do so before."""
    bleed_forced: float | None
    """Mean of ``forced_after``."""
    alias_beyond_bleed: float | None
    """Share of alias prompts whose free answer begins with the new answer, minus ``bleed``."""
    alias_beyond_bleed_forced: float | None
    """EasyEdit's accuracy of aliases minus ``bleed_forced``."""


class Figures(Shares):
    """The fields of a result line that this module measures."""

    neighbours: list[NeighbourLine]
    aliases: list[AliasLine]
    denial_before: float | None
    denial: float | None
    """Probability that the new fact is denied, of the probability of denying or affirming it; mean over templates."""


class Questioner:
    """Asks a model about records.

    Args:
        tokenizer: Of the model.
        separator: Joins prompt and answer.
    """

    def __init__(self, tokenizer: Tokenizer, separator: str = SEPARATOR):
        self.tokenizer, self.separator = tokenizer, separator

    def before(self, model: Any, request: Mapping, asked: Asked) -> Before:
        """The answers of the unedited model.

        Args:
            model: The model.
            request: A record with ``target_new``.
            asked: What is asked of it.
        """
        found = self._free(model, request, asked, AT_ONCE)
        return {
            "tokens": [self._compared(ids) for ids in found[: len(asked.neighbours)]],
            "answers": [self._text(ids) for ids in found],
            "forced": self._forced(model, request, asked, AT_ONCE),
            "denial": self._denial(model, asked, AT_ONCE),
        }

    def after(
        self, model: Any, request: Mapping, asked: Asked, before: Before, post: Mapping, *, at_once: int = AT_ONCE
    ) -> Figures:
        """The figures of an edit.

        Args:
            model: The edited model.
            request: The record with ``target_new``.
            asked: What is asked of it.
            before: The answers of the unedited model to the same.
            post: EasyEdit's metrics after the edit.
            at_once: Texts in one pass.
        """
        found = self._free(model, request, asked, at_once)
        answers = [self._text(ids) for ids in found]
        neighbours: list[NeighbourLine] = [
            {
                "prompt": neighbour.prompt,
                "subject": neighbour.subject,
                "kind": neighbour.kind,
                "before": was,
                "after": now,
                "kept": kept,
                "forced_before": forced_before,
                "forced_after": forced_after,
            }
            for neighbour, was, now, kept, forced_before, forced_after in zip(
                asked.neighbours,
                before["answers"],
                answers,
                self._kept(model, asked, before, found, at_once),
                before["forced"],
                self._forced(model, request, asked, at_once),
            )
        ]
        start = len(neighbours)
        aliases: list[AliasLine] = [
            {"prompt": prompt, "before": was, "after": now}
            for prompt, was, now in zip(asked.aliases, before["answers"][start:], answers[start:])
        ]
        return {
            **neighbour_figures(neighbours, aliases, request["target_new"], post),
            "neighbours": neighbours,
            "aliases": aliases,
            "denial_before": before["denial"],
            "denial": self._denial(model, asked, at_once),
        }

    def _free(self, model: Any, request: Mapping, asked: Asked, at_once: int) -> list[list[int]]:
        answer = self.tokenizer(self.separator + request["target_new"], add_special_tokens=False)["input_ids"]
        length = max(LENGTH, len(answer) + 2)
        return continuations(model, self.tokenizer, asked.prompts, length, at_once=at_once)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _compared(self, ids: list[int]) -> list[int]:
        """The tokens before the one that ends the answer, a sentence or a line; at least one, at most `LENGTH`."""
        special = set(self.tokenizer.all_special_ids)
        for number in range(1, min(len(ids), LENGTH)):
            if ids[number] in special or has_stop(self._text(ids[: number + 1])):
                return ids[:number]
        return ids[:LENGTH]

    def _kept(
        self, model: Any, asked: Asked, before: Before, found: Sequence[Sequence[int]], at_once: int
    ) -> list[float]:
        """For each neighbour the share of the tokens before that are predicted; a free answer that is the same has all.

        Only the others cost a pass.
        """
        facts: dict[int, Fact] = {}
        for i, (neighbour, ids) in enumerate(zip(asked.neighbours, before["tokens"])):
            if found[i][: len(ids)] != ids:
                prompt = self.tokenizer(neighbour.prompt)["input_ids"]
                facts[i] = Fact(neighbour.prompt, "", (*prompt, *ids), len(prompt))
        now = dict(zip(facts, predicted(model, list(facts.values()), at_once=at_once)))
        return [_share(now[i], ids) if i in now else 1.0 for i, ids in enumerate(before["tokens"])]

    def _forced(self, model: Any, request: Mapping, asked: Asked, at_once: int) -> list[float]:
        facts = [
            encode(self.tokenizer, neighbour.prompt, request["target_new"], self.separator)
            for neighbour in asked.neighbours
        ]
        return [_share(now, fact.answer) for fact, now in zip(facts, predicted(model, facts, at_once=at_once))]

    def _denial(self, model: Any, asked: Asked, at_once: int) -> float | None:
        facts = [
            encode(self.tokenizer, denial.prompt, answer, self.separator)
            for denial in asked.denials
            for answer in (denial.denies, denial.affirms)
        ]
        found = probabilities(model, facts, at_once=at_once)
        pairs = list(zip(found[::2], found[1::2]))
        return _mean(denies / (denies + affirms) for denies, affirms in pairs if denies + affirms > 0)


def neighbour_figures(neighbours: Sequence[Mapping], aliases: Sequence[Mapping], target: str, post: Mapping) -> Shares:
    """The shares from the answers of one record.

    Args:
        neighbours: As in `NeighbourLine`.
        aliases: As in `AliasLine`.
        target: The new answer.
        post: EasyEdit's metrics after the edit.
    """
    bleed = _mean(
        float(begins_with(its["after"], target)) for its in neighbours if not begins_with(its["before"], target)
    )
    forced = _mean(its["forced_after"] for its in neighbours)
    free = _mean(float(begins_with(its["after"], target)) for its in aliases)
    return {
        "neighbourhood": _mean(its["kept"] for its in neighbours),
        "neighbourhood_free": _mean(float(first_word(its["after"]) == first_word(its["before"])) for its in neighbours),
        "bleed": bleed,
        "bleed_forced": forced,
        "alias_beyond_bleed": _minus(free, bleed),
        "alias_beyond_bleed_forced": _minus(_alias_accuracy(post), forced),
    }


def _alias_accuracy(post: Mapping) -> float | None:
    """EasyEdit's accuracy of the aliases, as it averages a category."""
    found = [
        value
        for name, values in (post.get("portability") or {}).items()
        if name.endswith("_acc") and is_alias_category(name.removesuffix("_acc"))
        for value in (values if isinstance(values, list) else [values])
    ]
    return _mean(found)


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _share(predicted_tokens: Sequence[int], tokens: Sequence[int]) -> float:
    return fmean(float(now == token) for now, token in zip(predicted_tokens, tokens, strict=True))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None
