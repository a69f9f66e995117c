"""Which neighbours an edit trains on (`kne_easyedit.facts.neighbours`): from which facts, how many of which kind."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from torch import nn

from kne_easyedit._util.messages import shorten
from kne_easyedit.editing.own_neighbours import own_pool
from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.facts.encoding import Tokenizer, chat_prompt, longest_text
from kne_easyedit.facts.neighbours import (
    FactPool,
    Neighbour,
    own_neighbourhood,
    packaged_digest,
    packaged_pool,
    run_exclusions,
)
from kne_easyedit.facts.readers import EMBEDDED, data_digest
from kne_easyedit.facts.records import load_requests, without_chat_template
from kne_easyedit.facts.templates import SLOT, subject_key, template_of

logger = logging.getLogger(__name__)

CHOICE = 4
"""Version of how neighbours, and variants of a subject, are chosen from the same facts: under another one results are
others."""
ASKED = "asked_later"
"""Field of a request: prompts about other subjects, of other facts, that are asked after it. None of them trains."""


def neighbour_prompts(
    requests: Sequence[Mapping[str, Any]],
    hparams: EditSettings,
    model: nn.Module | None = None,
    tokenizer: Tokenizer = None,
) -> list[str]:
    """The neighbours of all requests, each once: first one of each request, then another, with kinds in turn.

    No prompt of ``requests`` is among them, and no subject that is held out for evaluation
    (`kne_easyedit.facts.neighbours.is_held_out`) or that their own neighbourhood prompts, or those `ASKED`, are about.

    Args:
        requests: What is edited together.
        hparams: ``neighbour_data``, ``neighbour_relation_size``, ``neighbour_subject_size`` and ``seed`` are read;
            where ``neighbour_data`` is None, ``localization_data`` with its size and offset, too.
        model: The unedited model; it names subjects of its own where the facts know none (`own_pool`). None: nothing
            does.
        tokenizer: Of the model.

    Returns:
        The prompts; a warning names requests that have none.

    Raises:
        ValueError: The data file cannot be used.
        FileNotFoundError: It does not exist.
    """
    found = neighbours_by_request(requests, hparams, model, tokenizer)
    for request, own in zip(requests, found):
        if not own:
            logger.warning(
                "neighbour_data: no neighbours of %s are known, it is trained without; name a data file with facts of "
                "its relation or its kind of subject%s",
                shorten(request["prompt"]),
                _without_template(request),
            )
    return list(dict.fromkeys(prompt for turn in zip_longest(*found) for prompt in turn if prompt is not None))


def _without_template(request: Mapping[str, Any]) -> str:
    """What to change in a request whose subject cannot be exchanged; empty if it can."""
    if request.get("subject") is None:
        return ", and give the request a subject"
    if template_of(request) is not None:
        return ""
    if SLOT in request["prompt"]:
        return f"; the prompt itself has a {SLOT}"
    return f"; the subject {shorten(request['subject'])} does not stand in the prompt as whole words"


def neighbours_by_request(
    requests: Sequence[Mapping[str, Any]],
    hparams: EditSettings,
    model: nn.Module | None = None,
    tokenizer: Tokenizer = None,
) -> list[list[str]]:
    """The neighbours of each request, kinds in turn; for arguments and errors see `neighbour_prompts`.

    Other questions about the subject are filled up, as other subjects are (`_of_relation`): of many subjects data know
    one fact.
    """
    requests = as_said(requests, hparams, tokenizer)  # a pool knows prompts as they are said
    pool = _pool(hparams)
    names = [subject_key(place[0]) if (place := pool.locate(request)) else None for request in requests]
    exclude = run_exclusions(requests) | {name for name in names if name is not None}
    asked = asked_of_others(requests)
    found = []
    for request, name in zip(requests, names):
        relation = _of_relation(pool, request, hparams, exclude, asked, model, tokenizer)
        subject = pool.subject_prompts(
            request,
            hparams.neighbour_subject_size,
            seed=hparams.seed,
            exclude=exclude,
            together=[other for other, its in zip(requests, names) if its == name],
            strangers=True,
        )
        found.append([one.prompt for pair in zip_longest(relation, subject) for one in pair if one is not None])
    return found


def asked_of_others(requests: Iterable[Mapping[str, Any]]) -> list[str]:
    """The prompts about other subjects that requests bring to be asked: their own neighbourhood, and those `ASKED`."""
    return [prompt for request in requests for prompt in (*own_neighbourhood(request), *request.get(ASKED, ()))]


def _of_relation(
    pool: FactPool,
    request: Mapping[str, Any],
    hparams: EditSettings,
    exclude: Iterable[str],
    asked: Iterable[str],
    model: nn.Module | None,
    tokenizer: Tokenizer,
) -> list[Neighbour]:
    """Subjects of the request's kind: of the data, else named by the model; if they are few, others of the data, too.

    Of a template that the data ask of two subjects, two prompts would say too little about what all others share.
    """
    size = hparams.neighbour_relation_size

    def of(source: FactPool, *, strangers: bool = False) -> list[Neighbour]:
        return source.relation_prompts(
            request, size, held_out=False, seed=hparams.seed, exclude=exclude, asked=asked, strangers=strangers
        )

    found = of(pool)
    if not found and size and model is not None:
        found = of(own_pool(model, tokenizer, request))
    if len(found) == size:
        return found
    return list({one.prompt: one for one in [*found, *of(pool, strangers=True)]}.values())[:size]


def as_said(
    requests: Sequence[Mapping[str, Any]], hparams: EditSettings, tokenizer: Tokenizer
) -> Sequence[Mapping[str, Any]]:
    """The requests with prompts as the user says them, out of the chat template under ``use_chat_template``."""
    if hparams.use_chat_template and tokenizer is not None:
        return [without_chat_template(request, tokenizer) for request in requests]
    return requests


def readable(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    hparams: EditSettings,
    tokens: int,
    source: str = "neighbour_data",
) -> list[str]:
    """The prompts as the model reads them: in the chat template under ``use_chat_template``, `short_enough`."""
    texts = [chat_prompt(tokenizer, prompt) if hparams.use_chat_template else prompt for prompt in prompts]
    return short_enough(model, tokenizer, texts, tokens, source)


def short_enough(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], tokens: int, source: str = "neighbour_data"
) -> list[str]:
    """The texts that, with ``tokens`` more, are no longer than the model takes (``config.max_position_embeddings``).

    A warning says if none is, with the setting ``source`` that they come from.
    """
    limit = longest_text(model.config)
    short = [text for text in texts if len(tokenizer(text)["input_ids"]) + tokens <= limit]
    if texts and not short:
        wanted = f" with neighbour_tokens: {tokens}" if tokens > 1 else ""
        logger.warning(
            "%s: none of %s prompts is spared:%s each is longer than the %s tokens that the model takes "
            "(max_position_embeddings); %s",
            source,
            len(texts),
            wanted,
            limit,
            "lower neighbour_tokens" if wanted else "take shorter ones",
        )
    elif len(short) < len(texts):
        logger.info("%s of %s prompts are too long for the model and left out", len(texts) - len(short), len(texts))
    return short


def uses_neighbours(hparams: EditSettings) -> bool:
    """Whether an edit under these settings has to do with neighbours."""
    return bool(hparams.neighbour_weight) or hparams.input_projection


def neighbours_wanted(hparams: EditSettings) -> int:
    """Neighbours of each fact, of both kinds, at most."""
    return hparams.neighbour_relation_size + hparams.neighbour_subject_size


def neighbours_in_step(hparams: EditSettings) -> int:
    """Neighbours of each fact in one training step, at most; 0 where none train."""
    size = neighbours_wanted(hparams)
    return min(hparams.neighbours_per_step or size, size) if hparams.neighbour_weight else 0


def neighbour_source(hparams: EditSettings) -> tuple[str, int | None, int]:
    """Where neighbours come from: a data file (``embedded``: the packaged relations), how many records, from which on.

    The records of ``localization_data`` outside ``localization_size`` are not taken: in some sets they are asked.
    """
    if hparams.neighbour_data is not None:
        return hparams.neighbour_data, None, 0
    if hparams.localization_data in (None, EMBEDDED):
        return EMBEDDED, None, 0
    return str(hparams.localization_data), hparams.localization_size, hparams.localization_offset


def neighbour_digest(hparams: EditSettings) -> str | None:
    """SHA-256 of what neighbours are made of; None if there is no such file."""
    path, *_ = neighbour_source(hparams)
    return packaged_digest() if path == EMBEDDED else data_digest(path)


def known_facts(hparams: EditSettings) -> list[FactPool]:
    """What is known of subjects: the packaged facts, and those that neighbours come from."""
    return [packaged_pool(), *([_pool(hparams)] if uses_neighbours(hparams) else [])]


def _pool(hparams: EditSettings) -> FactPool:
    path, size, offset = neighbour_source(hparams)
    return packaged_pool() if path == EMBEDDED else _pool_of(path, data_digest(path), size, offset)


@lru_cache(maxsize=4)
def _pool_of(path: str, content: str | None, size: int | None, offset: int) -> FactPool:
    """``content``, the file's digest, makes a changed file another entry of the cache."""
    return FactPool.of_requests(load_requests(path, size, offset))
