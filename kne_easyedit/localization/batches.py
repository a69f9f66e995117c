"""Which facts share a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from kne_easyedit.facts.encoding import Fact
from kne_easyedit.models.targets import Target


@dataclass(frozen=True, eq=False)
class Sweep:
    """What is attributed together. By identity: a target holds modules."""

    targets: tuple[Target, ...]
    facts: tuple[Fact, ...]


def batches(facts: Sequence[Fact], points: int, rows: int, processes: int = 1) -> Iterator[list[Fact]]:
    """Facts that share a sweep: of equal answer length, so that answers need no padding.

    Args:
        facts: All facts.
        points: Path points of one answer token of one fact: layers times steps.
        rows: Path points in flight at most; a batch has one fact at least.
        processes: That share the facts: a batch has at most its share of them.

    Yields:
        The facts of each sweep.
    """
    most = max(1, min(rows // points, -(-len(facts) // processes)))
    for _, group in groupby(sorted(facts, key=lambda f: (len(f.answer), len(f.ids))), key=lambda f: len(f.answer)):
        alike = list(group)
        yield from (alike[i : i + most] for i in range(0, len(alike), most))


def unique_facts(facts: Sequence[Fact]) -> list[Fact]:
    """Each fact once: facts of equal tokens are the same, as in the cache."""
    return list({tokens_of(fact): fact for fact in facts}.values())


def tokens_of(fact: Fact) -> tuple[tuple[int, ...], int]:
    """By which facts are told apart."""
    return fact.ids, fact.prompt_length
