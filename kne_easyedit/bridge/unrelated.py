"""A text that has nothing to do with a fact, for methods that train on one beside it (WISE)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from kne_easyedit.bridge.methods import UNRELATED, traits_of
from kne_easyedit.facts.neighbours import is_held_out
from kne_easyedit.facts.records import load_requests
from kne_easyedit.facts.templates import texts_in

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
