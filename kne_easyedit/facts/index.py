"""What is known of subjects, and how near they are to that of a request: an index of facts."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from kne_easyedit.facts.templates import (
    SLOT,
    content_words,
    normalised,
    slot_text,
    stands_in,
    subject_key,
    subject_pattern,
    template_key,
    template_of,
    texts_in,
    without,
)

__all__ = ["FactIndex", "KnownFact", "facts_of", "plain", "probes_in", "prompts_of", "relation_key"]

CLEAR = math.log(2)
"""Log odds of a subject's kind from which on it counts as told (`FactPool._evidence`)."""
LONGEST_SUBJECT = 6
"""Words of a subject that no request names and no fact is about."""


@dataclass(frozen=True)
class KnownFact:
    """What a pool knows of a subject."""

    subject: str
    template: str
    truth: str | None = None
    """The true answer."""
    claims: tuple[str, ...] = ()
    """Answers that data give beside it, for instance an edit's new one."""
    relation: Hashable = None
    """The relation's name; None: named by the template's words."""
    kind: str | None = None
    """The subject's kind, as a path from the general one (``person/author``); None: told by what is asked about it."""
    derived: bool = False
    """Whether it is asked for what follows from an edit, or of an edit: it tells of the subject's kind only."""


def prompts_of(request: Mapping) -> list[str]:
    """Every prompt that stands in a request: its own, the rephrased one, all probes."""
    found = [request["prompt"], *texts_in(request.get("rephrase_prompt"))]
    for section in ("portability", "locality"):
        found += probes_in(request.get(section))
    return found


def probes_in(value: object) -> Iterator[str]:
    """All prompts of a section of probes: by category as EasyEdit has them, or lists of records as data files do."""
    if isinstance(value, Mapping):
        yield from texts_in(value.get("prompt"))
        for name, its in value.items():
            if name != "prompt":
                yield from probes_in(its)
    elif isinstance(value, (list, tuple)):
        for its in value:
            yield from probes_in(its)


class FactIndex:
    """Which templates are asked about which subjects, with their answers, and what tells the kind of a subject.

    Attributes:
        subjects: Number of different subjects.
    """

    def __init__(self, facts: Iterable[KnownFact], follows: Mapping[Hashable, Iterable[Hashable]] | None = None):
        """Takes in the facts.

        Args:
            facts: The facts.
            follows: Relation -> relations whose answers follow from it, so that an edit of it changes them, too.
        """
        self._spellings: dict[str, Counter[str]] = defaultdict(Counter)
        self._features: dict[str, set[Hashable]] = defaultdict(set)
        self._having: dict[Hashable, set[str]] = defaultdict(set)
        self._words: dict[str, set[str]] = defaultdict(set)
        self._asking: dict[str, set[Hashable]] = defaultdict(set)
        self._truths: dict[tuple[str, Hashable], set[str]] = defaultdict(set)
        self._claims: dict[tuple[str, Hashable], set[str]] = defaultdict(set)
        self._templates: dict[Hashable, Counter[str]] = defaultdict(Counter)
        self._relations: dict[Hashable, set[Hashable]] = defaultdict(set)
        self._patterns: list[tuple[re.Pattern[str], Hashable]] | None = None
        self._kinds: dict[Hashable, set[str]] = defaultdict(set)
        self._profiles: dict[frozenset[Hashable], tuple[dict[Hashable, float], Counter[Hashable]]] = {}
        self._follows = {relation: frozenset(others) for relation, others in (follows or {}).items()}
        for fact in facts:
            self._add(fact)
        self.subjects = len(self._spellings)

    def _add(self, fact: KnownFact) -> None:
        name = subject_key(fact.subject)
        relation = relation_key(fact.template) if fact.relation is None else fact.relation
        self._spellings[name][fact.subject] += 1
        features: set[Hashable] = {relation}
        if fact.kind is not None:
            parts = fact.kind.split("/")
            features |= {("kind", "/".join(parts[:depth])) for depth in range(1, len(parts) + 1)}
            self._kinds[relation].add(fact.kind)
            self._kinds[name].add(fact.kind)
        self._features[name] |= features
        for feature in features:
            self._having[feature].add(name)
        for word in content_words(fact.template):
            self._words[word].add(name)
            self._asking[word].add(relation)
        if not fact.derived:
            self._templates[relation][fact.template] += 1
        for key in (template_key(fact.template), relation_key(fact.template)):
            self._relations[key].add(relation)
        if fact.truth is not None:
            self._truths[name, relation].add(fact.truth)
        self._claims[name, relation].update(fact.claims)

    def knows(self, subject: str) -> bool:
        """Whether a fact is about the subject, whatever its case, blanks and leading "the"."""
        return subject_key(subject) in self._spellings

    def _answers(self, name: str, relation: Hashable) -> set[str]:
        return self._truths.get((name, relation), set()) | self._claims.get((name, relation), set())

    def _spelling(self, name: str) -> str:
        return min(self._spellings[name], key=lambda text: (-self._spellings[name][text], text))

    def locate(self, request: Mapping) -> tuple[str, str] | None:
        """Subject and template of a request, which may have no ``subject``.

        Without one, the prompt is compared with the known templates, whatever its case, articles and final marks; else
        a known subject is looked for in it.

        Returns:
            Subject and template, the prompt with the subject replaced by ``{}``; None if no subject is found.
        """
        template = template_of(request)
        if template is not None:
            return self._with_article(request["subject"], template)
        if request.get("subject") is not None:
            return None
        prompt = request["prompt"]
        found = []
        for pattern, relation in self._compiled():
            match = pattern.fullmatch(prompt)
            if match and len(match[1].split()) <= LONGEST_SUBJECT and SLOT not in prompt:
                known = relation in self._features.get(subject_key(match[1]), ())
                template = f"{prompt[: match.start(1)]}{SLOT}{prompt[match.end(1) :]}"
                found.append((not known, len(match[1]), match[1], template))
        for spelling in {text for names in self._spellings.values() for text in names}:
            capital = spelling[:1].upper() + spelling[1:]
            template = without(prompt, capital, any_case=False) if len(spelling) > 1 else None
            # "Gold melts at", but not "The lead actor is"
            if template is not None and (capital == spelling or template.startswith(SLOT)):
                found.append((True, -len(spelling), spelling, template))
        exact = [choice for choice in found if not choice[0]]
        listed = [choice for choice in found if choice[1] < 0]
        best = min(exact or listed or found, default=None)
        return None if best is None else self._with_article(best[2], best[3])

    def _compiled(self) -> list[tuple[re.Pattern[str], Hashable]]:
        if self._patterns is None:
            templates = {(text, relation) for relation, texts in self._templates.items() for text in texts}
            self._patterns = [
                (subject_pattern(text), relation)
                for text, relation in templates
                if text.count(SLOT) == 1 and template_key(text) != SLOT
            ]
        return self._patterns

    def _with_article(self, subject: str, template: str) -> tuple[str, str]:
        """An article belongs to the subject or to the template as in the pool: "the Netherlands", but "Nile"."""
        name = subject_key(subject)
        spelling = self._spelling(name) if name in self._spellings else subject
        had, has = (text[:4].lower() == "the " for text in (subject, spelling))
        if has and not had and re.search(r"\b[Tt]he \{\}", template):
            return f"the {subject}", re.sub(r"\b[Tt]he \{\}", SLOT, template)
        if had and not has:
            template = re.sub(r"^\{\}", "The {}", template)
            return subject[4:], re.sub(r"(?<!\b[Tt]he )\{\}", "the {}", template)
        return subject, template

    def _relation(self, template: str, subject: str) -> Hashable:
        """The relation that a template asks: of those with its text or words one that the subject has, else any."""
        words = relation_key(template)
        known = self._relations.get(template_key(template)) or self._relations.get(words) or {words}
        own = self._features.get(subject_key(subject), ())
        return min(known, key=lambda relation: (relation not in own, repr(plain(relation))))

    def _ask_the_same(self, words: frozenset[str], others: frozenset[str]) -> bool:
        """Whether prompts with these content words ask the same: they share most words, or one of one relation only."""
        shared = words & others
        return 2 * len(shared) > min(len(words), len(others)) or any(len(self._asking[word]) == 1 for word in shared)

    def _features_of(self, request: Mapping, subject: str, relation: Hashable) -> frozenset[Hashable]:
        """What tells the kind of a request's subject: a named kind, else all that is asked about it elsewhere."""
        name = subject_key(subject)
        wanted, own = self._kinds.get(relation, ()), self._kinds.get(name, ())
        kinds = {kind for kind in own if not wanted or any(f"{kind}/".startswith(f"{other}/") for other in wanted)}
        kinds = {kind for kind in kinds or wanted if not any(other.startswith(f"{kind}/") for other in kinds)}
        if kinds:
            return frozenset(("kind", kind) for kind in kinds)
        features = set(self._features.get(name, ()))
        patterns = (without(prompt, subject) for prompt in prompts_of(request))
        features |= {self._relation(pattern, subject) for pattern in patterns if pattern}
        return frozenset(features - {relation})

    def _evidence(self, features: frozenset[Hashable]) -> tuple[dict[Hashable, float], Counter[Hashable]]:
        """How much each feature speaks for a subject's being of the kind that has these features.

        That is log((s n + 1) / (u n + 1)) with n subjects that have one of ``features``: their kin. s is the share of
        them that have the feature, where each of ``features`` counts the same, however many subjects have it; u is the
        share of all subjects. Summed over a subject's features these are the log odds of naive Bayes.

        Returns:
            The evidence by feature, and the number of kin that have it.
        """
        if features not in self._profiles:
            weights: dict[str, list[float]] = defaultdict(list)
            for feature in features:
                having = self._having.get(feature, ())
                for name in having:
                    weights[name].append(1 / len(having))
            # fsum: a sum that does not depend on the order, which for sets differs from process to process
            kin = {name: math.fsum(parts) for name, parts in weights.items()}
            total, n = math.fsum(kin.values()), len(kin)
            shares: dict[Hashable, list[float]] = defaultdict(list)
            for name, weight in kin.items():
                for feature in self._features[name]:
                    shares[feature].append(weight / total)
            evidence = {
                feature: math.log((math.fsum(shares.get(feature, ())) * n + 1) / (len(having) / self.subjects * n + 1))
                for feature, having in self._having.items()
            }
            self._profiles[features] = evidence, Counter({feature: len(parts) for feature, parts in shares.items()})
        return self._profiles[features]

    def _ranked(self, request: Mapping, subject: str, template: str, relation: Hashable) -> Iterator[set[str]]:
        """Subjects by how near they are to the request's.

        Those that are asked the relation and are of the kind; that are asked it, and nothing tells their kind; of the
        kind, first by what is asked about both, then by what is typical of it; asked, but of another kind; with words
        of the request's prompts in what is asked about them; all others.
        """
        features = self._features_of(request, subject, relation)
        evidence, _ = self._evidence(features)
        direct = set().union(*(self._having.get(feature, ()) for feature in features))
        named = any(isinstance(feature, tuple) for feature in features)  # kinds by name need no evidence
        asked = self._having.get(relation, set())
        kin, others = set(), set()
        for name, found in self._features.items():
            odds = math.fsum(evidence[feature] for feature in found if feature != relation)
            if (named and name in direct) or odds > (0.0 if name in direct else CLEAR):
                kin.add(name)
            elif odds < -CLEAR:
                others.add(name)
        yield from (kin & asked, asked - kin - others, kin & direct - asked, kin - direct - asked, asked & others)
        near: dict[str, list[float]] = defaultdict(list)
        for word in set().union(*(content_words(without(prompt, subject) or "") for prompt in prompts_of(request))):
            having = self._words.get(word, ())
            for other in having:
                near[other].append(math.log(1 + self.subjects / len(having)))
        scores = {other: math.fsum(parts) for other, parts in near.items()}
        best = max(scores.values(), default=0.0)
        alike = {other for other, score in scores.items() if score >= best / 2} - kin - asked
        yield alike
        yield set(self._spellings) - kin - asked - alike


def relation_key(template: str) -> Hashable:
    """Names the relation of a template by its words; one of function words only by its text."""
    return content_words(template) or template_key(template)


def facts_of(request: Mapping, template: str) -> tuple[list[KnownFact], set[Hashable]]:
    """The facts of a record, and the relations that follow from its own."""
    subject, relation = request["subject"], relation_key(template)
    truth, claims = request.get("ground_truth"), (request["target_new"],)
    facts = [KnownFact(subject, template, truth, claims)]
    rephrased = without(request.get("rephrase_prompt") or "", subject)
    if rephrased is not None:
        facts.append(KnownFact(subject, rephrased, truth, claims, relation))
    follows: set[Hashable] = set()
    answers = [normalised(text) for text in (request["target_new"], truth) if isinstance(text, str)]
    for section in ("portability", "locality"):
        for probes in (request.get(section) or {}).values():
            for prompt, answer in zip(probes["prompt"], probes["ground_truth"]):
                pattern, other = without(prompt, subject), slot_text(prompt, template)
                if other is not None:
                    # A neighbour that the record itself brings; in portability it is an alias of the subject, and
                    # "The capital of France, which is not Rome, is" is no fact of a subject.
                    if section == "locality" and pattern is None:
                        facts.append(KnownFact(other, template, answer))
                elif pattern is None or any(stands_in(text, normalised(pattern)) for text in answers):
                    continue
                elif section == "locality":
                    facts.append(KnownFact(subject, pattern, answer))
                else:
                    facts.append(KnownFact(subject, pattern, None, (answer,), derived=True))
                    follows.add(relation_key(pattern))
    return facts, follows - {relation}


def plain(relation: Hashable) -> object:
    """A relation in a form whose repr is the same in every process."""
    return sorted(relation) if isinstance(relation, frozenset) else relation
