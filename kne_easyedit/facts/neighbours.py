"""Neighbours of an edit: prompts that ask the same of other subjects, or something else of the same subject.

An edit should leave them alone. Some of them train, others are asked afterwards; `is_held_out` keeps the two apart.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from kne_easyedit.facts.index import FactIndex, KnownFact, facts_of, plain, probes_in, prompts_of, relation_key
from kne_easyedit.facts.templates import (
    SLOT,
    content_words,
    fill,
    normalised,
    slot_text,
    stands_in,
    subject_key,
    template_of,
    texts_in,
    without,
)

__all__ = [
    "FactPool",
    "KnownFact",
    "Neighbour",
    "is_held_out",
    "own_neighbourhood",
    "packaged_digest",
    "packaged_pool",
    "prompts_of",
    "run_exclusions",
    "template_of",
]

RELATION, SUBJECT = "relation", "subject"
"""Kinds of neighbours: the request's template with another subject, the request's subject in another template."""
KIN = (0, 2, 3)
"""Which of the sets that `FactPool._ranked` gives are of the subject's kind."""
FIRST = 4
"""How many of them are used together; each later one only where those before it have nothing."""
LAST = 6
"""The last one has subjects of which nothing is known."""
TYPICAL = math.log(0.75)
"""Evidence of a relation from which on it counts as one of the kind's."""
NEIGHBOURHOOD = ("neighborhood", "neighbourhood")
"""Names of a record's own locality category of neighbours (CounterFact, EasyEdit's flat fields), without capitals."""
QUESTION_MARKS = ("?", "？", "؟")
"""With which a question ends."""
RARE = 0.002
"""A relation is not typical of a kind if it is asked about a smaller share of its subjects."""


@dataclass(frozen=True)
class Neighbour:
    """A prompt whose answer the edit should leave alone."""

    prompt: str
    subject: str
    kind: str
    """``relation`` or ``subject``."""
    template: str
    answer: str | None = None
    """The true answer, where the pool knows it."""
    same_kind: bool = True
    """Whether the subject is known to be of the kind of the request's subject."""


def is_held_out(subject: str) -> bool:
    """Whether a subject is kept for asking: evaluation asks about these only, training uses the others only.

    About half of all subjects are, by a fixed hash of the subject without regard to case, blanks and a leading "the".
    """
    return hashlib.sha256(subject_key(subject).encode(errors="surrogatepass")).digest()[0] < 128


def own_neighbourhood(request: Mapping) -> list[str]:
    """The prompts about other subjects that a record brings itself: its locality category ``Neighborhood``."""
    return [
        prompt
        for name, probes in (request.get("locality") or {}).items()
        if name.casefold() in NEIGHBOURHOOD
        for prompt in probes_in(probes)
    ]


def run_exclusions(requests: Iterable[Mapping]) -> frozenset[str]:
    """What neither trains nor is asked where several requests are edited together: their prompts and subjects.

    To be given as ``exclude`` to `FactPool`'s methods.
    """
    found: set[str] = set()
    for request in requests:
        found.update(prompts_of(request))
        if request.get("subject"):
            found.add(request["subject"])
    return frozenset(found)


class FactPool(FactIndex):
    """Facts from which neighbours are made: which templates are asked about which subjects.

    What is returned depends on the set of facts, not on their order.
    """

    @classmethod
    def of_requests(cls, requests: Iterable[Mapping]) -> FactPool:
        """The facts of the records of a data file (`records.load_requests`): their prompts and their probes."""
        facts: list[KnownFact] = []
        follows: dict[Hashable, set[Hashable]] = defaultdict(set)
        for request in requests:
            template = template_of(request)
            if template is not None:
                found, others = facts_of(request, template)
                facts += found
                follows[relation_key(template)] |= others
        return cls(facts, follows)

    def relation_prompts(
        self,
        request: Mapping,
        n: int,
        *,
        held_out: bool,
        seed: int = 0,
        exclude: Iterable[str] = (),
        asked: Iterable[str] = (),
        strangers: bool = False,
    ) -> list[Neighbour]:
        """The request's template with other subjects: those that it names (``neighbours``), then those of its kind.

        Left out are subjects that are, have as a part, or are a part of the request's subject, its aliases, its
        answers or what its portability is about; prompts that stand in the request; and facts whose known answer is the
        new one. Where a subject of the same kind is found, none of another or an unknown kind is taken.

        Args:
            request: An EasyEdit request, as `records.load_requests` gives it.
            n: How many at most.
            held_out: The side of `is_held_out`: True to ask, False to train.
            seed: Other seeds choose others among those of the same rank.
            exclude: Prompts and subjects that are not to be used (`run_exclusions`).
            asked: Prompts about other subjects, in any words, that are asked later: none of these subjects is used.
            strangers: Where those of the same kind are fewer than ``n``, fill up with any subjects, the nearest first.

        Returns:
            The neighbours; fewer or none where the pool has no more.
        """
        place = self.locate(request)
        if place is None or n < 1:
            return []
        subject, template = place
        relation = self._relation(template, subject)
        barred = _Barred(request, subject, template, exclude, asked)
        chosen: list[Neighbour] = []
        own = subject_key(subject)
        named = {subject_key(name): name for name in request.get("neighbours") or ()}
        for rank, names in enumerate([named, *self._ranked(request, subject, template, relation)], start=-1):
            if rank >= FIRST and not strangers and (chosen or rank == LAST):
                break
            for name in sorted(names, key=lambda name: _shuffled(seed, own, name)):
                if len(chosen) == n:
                    return chosen
                if rank >= 0 and name in named:
                    continue
                spelling = named.get(name) or self._spelling(name)
                if is_held_out(spelling) != held_out or barred.subject(name):
                    continue
                begins = template.startswith(SLOT) and subject[:1].isupper()
                prompt = fill(template, spelling[:1].upper() + spelling[1:] if begins else spelling)
                if barred.prompt(prompt):
                    continue
                if barred.answer(self._answers(name, relation)):
                    continue
                truth = min(self._truths.get((name, relation), ()), default=None)
                chosen.append(Neighbour(prompt, spelling, RELATION, template, truth, same_kind=rank < 0 or rank in KIN))
        return chosen

    def subject_prompts(
        self,
        request: Mapping,
        n: int,
        *,
        seed: int = 0,
        exclude: Iterable[str] = (),
        together: Iterable[Mapping] = (),
        strangers: bool = False,
    ) -> list[Neighbour]:
        """The request's subject in templates of other relations that are asked about subjects of its kind.

        Left out are prompts that stand in the request or ask what one of them asks (by their words), relations that the
        data derive from the request's (its portability), and facts whose known answer is the new or the old one.

        Args:
            request: An EasyEdit request, as `records.load_requests` gives it.
            n: How many at most.
            seed: Other seeds choose others.
            exclude: Prompts that are not to be used. Subjects in it do not matter: the request's own is used.
            together: Requests about the same subject that are edited together: what they ask is left out, too.
            strangers: Where those are fewer than ``n``, fill up with other relations in statements, whatever they are
                asked about; but not with those that the data name another kind for. A question words a relation
                freely: it may ask for the edited fact in other words.

        Returns:
            The neighbours, each of another relation; fewer or none where the pool has no more. They are for training.
        """
        place = self.locate(request)
        if place is None or n < 1:
            return []
        subject, template = place
        name, relation = subject_key(subject), self._relation(template, subject)
        barred = _Barred(request, subject, template, exclude)
        others = [one for one in together if one is not request]
        prompts = [prompt for one in (request, *others) for prompt in prompts_of(one)]
        asked = [content_words(without(prompt, subject) or prompt) for prompt in prompts]
        edited = {relation, *(self._relation(place[1], subject) for place in map(self.locate, others) if place)}
        edited = edited.union(*(self._follows.get(one, ()) for one in edited))
        evidence, counts = self._evidence(self._features_of(request, subject, relation))
        enough = max(2, RARE * max(counts.values(), default=0))
        own = self._features.get(name, set())
        chosen: list[Neighbour] = []

        def typical(other: Hashable) -> bool:
            """Else it may make sense for a few subjects only."""
            return other in own or (counts[other] >= enough and evidence[other] >= TYPICAL)

        for other in sorted(
            (other for other in self._templates if typical(other) or (strangers and not self._kinds.get(other))),
            key=lambda other: (other not in own, not typical(other), _shuffled(seed, name, repr(plain(other)))),
        ):
            if len(chosen) == n:
                break
            if other in edited:
                continue
            answers = self._answers(name, other)
            if barred.answer(answers, old=True):
                continue
            patterns = [text for text in self._templates[other] if typical(other) or not text.endswith(QUESTION_MARKS)]
            for pattern in sorted(patterns, key=lambda text: _shuffled(seed, name, text)):
                words, prompt = content_words(pattern), fill(pattern, subject)
                alike = (self._ask_the_same(words, its) for its in asked)
                if words and not any(alike) and not barred.prompt(prompt) and not barred.names_answer(prompt):
                    truth = min(self._truths.get((name, other), ()), default=None)
                    chosen.append(Neighbour(prompt, subject, SUBJECT, pattern, truth))
                    break
        return chosen


def packaged_facts() -> list[KnownFact]:
    """The facts of the packaged relations, ``relations.json``, each under every template of its relation."""
    return [
        KnownFact(subject, template, answer, relation=name, kind=relation["kind"])
        for name, relation in json.loads(_packaged()).items()
        for template in relation["templates"]
        for subject, answer in relation["facts"].items()
    ]


@lru_cache(maxsize=1)
def packaged_pool() -> FactPool:
    """The packaged facts as a pool: for a fact of one's own, where there are no others."""
    relations = json.loads(_packaged())
    return FactPool(packaged_facts(), {name: relation.get("implies", ()) for name, relation in relations.items()})


def packaged_digest() -> str:
    """SHA-256 of the packaged relations."""
    return hashlib.sha256(_packaged()).hexdigest()


def _packaged() -> bytes:
    return files("kne_easyedit.facts").joinpath("relations.json").read_bytes()


class _Barred:
    """What must not be a neighbour of a request."""

    def __init__(
        self, request: Mapping, subject: str, template: str, exclude: Iterable[str], asked: Iterable[str] = ()
    ):
        exclude = tuple(exclude)
        self.excluded = {normalised(text) for text in exclude}
        self.subjects = {subject_key(text) for text in exclude}
        self.prompts = {normalised(prompt) for prompt in prompts_of(request)}
        self.about = [normalised(text) for text in (*texts_in(request.get("portability")), *asked)]
        aliases = (slot_text(prompt, template) for prompt in prompts_of({**request, "locality": {}}))
        self.new = request["target_new"]
        self.old = request.get("ground_truth")
        self.names = {subject_key(text) for text in (subject, self.new, self.old, *aliases) if isinstance(text, str)}

    def subject(self, name: str) -> bool:
        if name in self.subjects or any(stands_in(name, other) or stands_in(other, name) for other in self.names):
            return True
        return any(stands_in(name, text) for text in self.about)

    def prompt(self, prompt: str) -> bool:
        text = normalised(prompt)
        return text in self.excluded or text in self.prompts

    def answer(self, answers: Iterable[str], old: bool = False) -> bool:
        """Whether one of the answers is the new one (or the old one), or begins with it, or it with the answer."""
        wrong = [self.new, *([self.old] if old and isinstance(self.old, str) else [])]
        return any(_begins(a, b) or _begins(b, a) for a in answers for b in wrong)

    def names_answer(self, prompt: str) -> bool:
        return stands_in(subject_key(self.new), normalised(prompt))


def _begins(answer: str, other: str) -> bool:
    """Whether an answer begins with another, as whole words."""
    text, start = subject_key(answer), subject_key(other)
    return text.startswith(start) and stands_in(start, text)


def _shuffled(seed: int, *texts: str) -> bytes:
    """The place of a text in a fixed random order; another seed gives another order."""
    return hashlib.sha256("\0".join([str(seed), *texts]).encode(errors="surrogatepass")).digest()
