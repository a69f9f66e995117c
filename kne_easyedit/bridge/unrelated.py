"""Texts that have nothing to do with what is edited, of the packaged facts.

WISE trains on one beside a fact. MEMIT and its kin keep what second moments say of other texts: if these repeat the
subjects that are edited, the edits resist.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import Any

from kne_easyedit.bridge.methods import UNRELATED, traits_of
from kne_easyedit.facts.neighbours import is_held_out, packaged_facts
from kne_easyedit.facts.records import load_requests
from kne_easyedit.facts.templates import fill, texts_in

LOCALISING = 20
"""The packaged facts on which ensembles are found; those behind them are edited, and asked."""


@cache
def _packaged() -> list[dict]:
    return load_requests("embedded", LOCALISING)


def with_unrelated(alg_name: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The request; if its method wants an unrelated text and it has none, with one of the packaged facts.

    The fact is chosen by the request's prompt alone. One whose subject stands in any text of the request, its probes
    included, is not taken: what is asked of the edited model is never trained.

    Args:
        alg_name: EasyEdit's name of the method.
        request: One fact.

    Returns:
        A copy.
    """
    if traits_of(alg_name).request_field != UNRELATED or request.get(UNRELATED):
        return dict(request)
    asked = " ".join(texts_in(request)).casefold()
    free = [
        fact
        for fact in _packaged()
        if fact["subject"].casefold() not in asked and not is_held_out(fact["subject"])  # neighbours are never trained
    ]
    if not free:
        return dict(request)
    fact = free[zlib.crc32(request["prompt"].encode()) % len(free)]
    return {**request, UNRELATED: f"{fact['prompt']} {fact['ground_truth']}"}


def unrelated_prompts(requests: Iterable[Mapping[str, Any]]) -> list[str]:
    """Prompts of the packaged relations about subjects that stand in no text of the requests.

    Args:
        requests: What is edited, with all that is asked.

    Returns:
        One prompt a fact. None is about a held-out subject, which may be asked as a neighbour.
    """
    return list(_about_others(" ".join(text for request in requests for text in texts_in(request)).casefold()))


@lru_cache(maxsize=1)  # a run asks for each of its methods
def _about_others(asked: str) -> tuple[str, ...]:
    facts = packaged_facts()
    others = {its for its in {fact.subject for fact in facts} if its.casefold() not in asked and not is_held_out(its)}
    found: dict[tuple[Any, str], str] = {}
    for fact in facts:
        if fact.subject in others:
            found.setdefault((fact.relation, fact.subject), fill(fact.template, fact.subject))
    return tuple(found.values())
