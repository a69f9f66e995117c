"""Records of data files, checked, as EasyEdit requests. `readers` reads the files, `schemas` maps their fields."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kne_easyedit._util.messages import shorten
from kne_easyedit.facts.encoding import (
    SEPARATOR,
    Tokenizer,
    chat_prompt,
    check_request,
    encode,
    natural,
    natural_answer,
    plain_prompt,
    require_known,
    require_length,
    require_text,
)
from kne_easyedit.facts.readers import EMBEDDED, Unreadable, data_digest, read_records
from kne_easyedit.facts.schemas import schema_of

__all__ = [
    "EMBEDDED",
    "BadRecord",
    "data_digest",
    "load_records",
    "load_requests",
    "read_records",
    "require_evaluable",
    "to_request",
    "with_chat_template",
    "without_chat_template",
]

logger = logging.getLogger(__name__)

CATEGORIES = {
    "portability": ("Subject_Aliasing", "Reasoning", "Logical_Generalization"),
    "locality": ("Relation_Specificity", "Forgetfulness"),
}
"""KnowEdit's categories come first and in this order; others follow in the record's order."""


class BadRecord(ValueError):
    """A record that cannot be used; the message names the record and the field, and says why."""


def load_records(
    path: str | Path, size: int | None = None, offset: int = 0, *, on_bad: str = "fail"
) -> tuple[list[dict], list[str]]:
    """Reads a data file, of any format in `readers` and `schemas.SCHEMAS`, as requests.

    A warning names the fields of the records that are not used.

    Args:
        path: The file; ``embedded``: the packaged facts.
        size: How many records, bad ones included; None: all.
        offset: The first record.
        on_bad: ``fail``: the first bad record raises; ``skip``: it is left out.

    Returns:
        The requests, each with its ``index`` in the file, and the messages about skipped records.

    Raises:
        FileNotFoundError: There is no such file.
        BadRecord: A record cannot be used, and ``on_bad`` is ``fail``.
        ValueError: The file is no list of records, or ``offset`` or ``on_bad`` is out of range.
    """
    requests, complaints, unused = _load(path, size, offset, on_bad)
    if unused:
        logger.warning(
            "%s: left out, for nothing asks it: %s",
            path,
            ", ".join(f"{what} ({number} times)" for what, number in unused.items()),
        )
    return requests, complaints


def load_requests(path: str | Path, size: int | None = None, offset: int = 0) -> list[dict]:
    """The usable ones among ``size`` records of a file, from number ``offset`` on; a warning counts the others.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no list of records, or ``offset`` is out of range.
    """
    requests, complaints, _ = _load(path, size, offset, "skip")
    if complaints:
        logger.warning(
            "%s of the records wanted of %s cannot be used; the first: %s", len(complaints), path, complaints[0]
        )
    return requests


def _load(path: str | Path, size: int | None, offset: int, on_bad: str) -> tuple[list[dict], list[str], Counter]:
    if on_bad not in ("fail", "skip"):
        raise ValueError(f"on_bad_record: {on_bad!r} must be 'fail' or 'skip'")
    records = read_records(path)
    stop = len(records) if size is None else offset + size
    if not 0 <= offset < len(records):
        raise ValueError(f"offset: {offset} out of range; {path} has {len(records)} records")
    requests: list[dict] = []
    complaints: list[str] = []
    unused: Counter[str] = Counter()
    for index, record in list(enumerate(records))[offset:stop]:
        try:
            requests.append({**to_request(record, unused), "index": index})
        except ValueError as error:  # noqa: PERF203  (each record by itself)
            complaint = f"{path}: record {index}: {error}"
            if on_bad == "fail":
                raise BadRecord(f"{complaint} (--on-bad-record skip leaves such records out)") from error
            complaints.append(complaint)
    return requests, complaints, unused


def to_request(record: Mapping, unused: Counter | None = None) -> dict:
    """One record, of any of the `schemas`, as an EasyEdit request.

    Prompts end, and answers begin and end, without blanks (`encoding.natural`). Probes with an empty answer are left
    out, as in EasyEdit's own script.

    Args:
        record: The record as it was read.
        unused: Counts the probes that are left out, and the fields that are not used.

    Returns:
        The request. Each category has a list of prompts and a list of their first answers; ``subject`` and
        ``ground_truth`` may be None. ``neighbours``, names of other subjects, is there if the record has them.

    Raises:
        ValueError: The record cannot be used; the message names the field.
    """
    unused = Counter() if unused is None else unused
    if isinstance(record, Unreadable):
        raise ValueError(record)
    if not isinstance(record, Mapping):
        raise ValueError(f"is a {type(record).__name__}, not a mapping")
    schema = schema_of(record)
    plain = schema.plain(record)
    request = {
        "prompt": plain["prompt"],
        "target_new": _number_as_text(plain["target_new"]),
        "ground_truth": _answer(plain.get("ground_truth"), "ground_truth"),
        "subject": plain.get("subject"),
    }
    check_request(request)
    request["prompt"] = natural(request["prompt"])
    request["target_new"] = natural_answer(request["target_new"])
    if "rephrase_prompt" in plain:
        request["rephrase_prompt"] = natural(
            require_text(plain["rephrase_prompt"], "rephrase_prompt (leave it out if there is none)")
        )
    if plain.get("neighbours") is not None:
        request["neighbours"] = _names(plain["neighbours"], "neighbours")
    own: Counter = Counter()
    for section, known in CATEGORIES.items():
        request[section] = {}
        found = plain.get(section)
        if not isinstance(found, Mapping | None):
            raise ValueError(
                f"{section}: is a {type(found).__name__}, not a mapping of categories; leave it out if there are none"
            )
        found = found or {}
        for category in [*(name for name in known if name in found), *(name for name in found if name not in known)]:
            probes = _probes(found[category], f"{section}.{require_text(category, section)}", own)
            if probes["prompt"]:
                request[section][category] = probes
    unused.update(own + Counter(f"{shorten(name)} of {schema.name}" for name in record if name not in schema.fields))
    return request


def require_evaluable(
    request: Mapping, tokenizer: Tokenizer, model: Any, separator: str = SEPARATOR, by_subject: Sequence[str] = ()
) -> None:
    """Checks every prompt of a request with its answer: its own, the rephrased one, all probes.

    Args:
        request: The request (`to_request`).
        tokenizer: A tokenizer of transformers.
        model: A model of transformers; its longest text and its embeddings are the limits.
        separator: See `encode`.
        by_subject: The methods of a run that cannot edit a request without a subject.

    Raises:
        ValueError: Tokenizer or model cannot take a text, or the subject is missing; the message names the field.
    """
    if by_subject and request["subject"] is None:
        raise ValueError(
            f"subject: missing, {', '.join(by_subject)} cannot edit without one; add it, or leave out the method"
        )
    for field, prompt, answer in _questions(request):
        try:
            require_taken(prompt, answer, tokenizer, model, separator)
        except ValueError as error:  # noqa: PERF203  (the field is named)
            raise ValueError(f"{field}: {error}") from error


def require_taken(prompt: str, answer: str, tokenizer: Tokenizer, model: Any, separator: str = SEPARATOR) -> None:
    """Checks one prompt with its answer.

    Args:
        prompt: As the model is asked: in the chat template, if it is.
        answer: The answer.
        tokenizer: A tokenizer of transformers.
        model: A model of transformers; its longest text and its embeddings are the limits.
        separator: See `encode`.

    Raises:
        ValueError: Tokenizer or model cannot take it; the message says why.
    """
    fact = encode(tokenizer, prompt, answer, separator)
    require_length(fact, model.config)
    require_known(fact, model)


def _questions(request: Mapping) -> Iterator[tuple[str, str, str]]:
    """Field, prompt and answer of every question of a request."""
    yield "request", request["prompt"], request["target_new"]
    if "rephrase_prompt" in request:
        yield "rephrase_prompt", request["rephrase_prompt"], request["target_new"]
    for section in CATEGORIES:
        for category, probes in request.get(section, {}).items():
            for i, (prompt, answer) in enumerate(zip(probes["prompt"], probes["ground_truth"])):
                yield f"{section}.{category}[{i}].prompt", prompt, answer


def with_chat_template(request: Mapping, tokenizer: Tokenizer) -> dict:
    """The request with every prompt (its own, the rephrased one, all probes) in the tokenizer's chat template.

    So every method and every evaluator uses the same form, whether it knows of templates or not.
    """
    return _with_prompts(request, lambda prompt: chat_prompt(tokenizer, prompt))


def without_chat_template(request: Mapping, tokenizer: Tokenizer) -> dict:
    """The request with every prompt as the user says it: the inverse of `with_chat_template`."""
    return _with_prompts(request, lambda prompt: plain_prompt(tokenizer, prompt))


def _with_prompts(request: Mapping, change: Callable[[str], str]) -> dict:
    changed = {**request, "prompt": change(request["prompt"])}
    if "rephrase_prompt" in request:
        changed["rephrase_prompt"] = _with_probes(request["rephrase_prompt"], change, prompt=True)
    for section in CATEGORIES:
        changed[section] = _with_probes(request.get(section) or {}, change)
    return changed


def _with_probes(value: Any, change: Callable[[str], str], prompt: bool = False) -> Any:
    """A section of probes (`index.prompts_of`) with every prompt changed."""
    if isinstance(value, Mapping):
        return {name: _with_probes(its, change, prompt or name == "prompt") for name, its in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_probes(its, change, prompt) for its in value]
    return change(value) if prompt and isinstance(value, str) else value


def _probes(items: Any, field: str, unused: Counter) -> dict[str, list[str]]:
    probes: dict[str, list[str]] = {"prompt": [], "ground_truth": []}
    items = [] if items is None else items
    if not isinstance(items, list):
        raise ValueError(f"{field}: is a {type(items).__name__}, not a list")
    for i, item in enumerate(items):
        if not isinstance(item, Mapping) or not isinstance(item.get("prompt"), str) or not item["prompt"].strip():
            raise ValueError(f"{field}[{i}].prompt: {shorten(item)} has no prompt")
        prompt = require_text(item["prompt"], f"{field}[{i}].prompt")
        answer = _answer(item.get("ground_truth"), f"{field}[{i}].ground_truth")
        if answer is None:
            unused["probes without an answer"] += 1
            continue
        probes["prompt"].append(natural(prompt))
        probes["ground_truth"].append(answer)
    return probes


def _names(value: Any, field: str) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"{field}: is a {type(value).__name__}, not a list of the names of other subjects")
    return [natural_answer(require_text(name, f"{field}[{i}]")) for i, name in enumerate(value)]


def _answer(value: Any, field: str) -> str | None:
    """The first alias of an answer as a text without blanks at its ends; None if there is none."""
    first = _number_as_text(_first(value))
    return None if first is None else natural_answer(require_text(first, field))


def _number_as_text(value: Any) -> Any:
    """A number as a text (other tools may drop the quotes of a year); anything else unchanged."""
    is_number = type(value) is int or (isinstance(value, float) and math.isfinite(value))  # True is no answer
    return str(value) if is_number else value


def _first(answer: Any) -> Any:
    """The first alias that is not empty of an answer, which may be nested in lists."""
    waiting = [answer]
    while waiting:
        answer = waiting.pop()
        if isinstance(answer, list):
            waiting += reversed(answer)
        elif answer is not None and not (isinstance(answer, str) and not answer.strip()):
            return answer
    return None
