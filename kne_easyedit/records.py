"""KnowEdit records, checked, as EasyEdit requests. Files are read by path; one small set is packaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from kne_easyedit.batching import chat_prompt, check_request

EMBEDDED = "embedded"
"""Stands for the packaged facts wherever a data file is named."""
CATEGORIES = {
    "portability": ("Subject_Aliasing", "Reasoning", "Logical_Generalization"),
    "locality": ("Relation_Specificity", "Forgetfulness"),
}


class BadRecord(ValueError):
    """A record that cannot be used; the message says which, which field and why."""


def load_records(path: str | Path, size: int | None = None, offset: int = 0, *, on_bad: str = "fail") -> tuple[list[dict], list[str]]:
    """Reads a KnowEdit file (a JSON list), or the packaged facts (``embedded``), as requests with an ``index``.

    ``on_bad`` is ``fail`` (the first bad record raises BadRecord) or ``skip``. Returns the requests and the
    complaints about skipped records. ``size`` and ``offset`` count records of the file, bad ones included.
    Raises FileNotFoundError, or ValueError for a file that is no list of records.
    """
    if on_bad not in ("fail", "skip"):
        raise ValueError(f"on_bad_record: {on_bad!r} must be 'fail' or 'skip'")
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: not a KnowEdit file, wanted is a JSON list of records, found {type(records).__name__}")
    stop = len(records) if size is None else offset + size
    if not 0 <= offset < len(records):
        raise ValueError(f"offset: {offset} out of range; {path} has {len(records)} records")
    requests, complaints = [], []
    for index, record in list(enumerate(records))[offset:stop]:
        try:
            requests.append({**to_request(record), "index": index})
        except ValueError as error:
            complaint = f"{path}: record {index}: {error}"
            if on_bad == "fail":
                raise BadRecord(f"{complaint} (--on-bad-record skip leaves such records out)") from error
            complaints.append(complaint)
    return requests, complaints


def load_requests(path: str | Path, size: int | None = None, offset: int = 0) -> list[dict]:
    """The usable ones among ``size`` records of a file, from number ``offset`` on: what localisation needs."""
    return load_records(path, size, offset, on_bad="skip")[0]


def data_digest(path: str | Path) -> str | None:
    """SHA-256 of a data file; None for what is no file."""
    real = files("kne_easyedit").joinpath("data/facts.json") if str(path) == EMBEDDED else Path(os.path.expandvars(str(path))).expanduser()
    return hashlib.sha256(real.read_bytes()).hexdigest() if real.is_file() else None


def read_json(path: str | Path):
    """The content of a data file; ``~`` and environment variables in its path are expanded."""
    if str(path) == EMBEDDED:
        return json.loads(files("kne_easyedit").joinpath("data/facts.json").read_text(encoding="utf-8"))
    real = Path(os.path.expandvars(str(path))).expanduser()
    if not real.is_file():
        raise FileNotFoundError(f"data file {real} does not exist; KnowEdit is published as zjunlp/KnowEdit, {EMBEDDED!r} needs no file")
    try:
        return json.loads(real.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{real}: not a JSON file: {error}") from error


def to_request(record: Mapping) -> dict:
    """One KnowEdit record as an EasyEdit request: categories hold lists of prompts and of first answers.

    Raises ValueError naming the field. Probes with an empty answer are left out, as EasyEdit's own script does.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"is a {type(record).__name__}, not a mapping")
    request = {
        "prompt": record.get("prompt", record.get("text")),
        "target_new": record.get("target_new", record.get("labels")),
        "ground_truth": _first(record.get("ground_truth")),
        "subject": record.get("subject", record.get("concept")),
    }
    check_request(request)
    if request["subject"] is None:
        raise ValueError("subject: missing")
    if isinstance(record.get("rephrase_prompt"), str):
        request["rephrase_prompt"] = record["rephrase_prompt"]
    for section, categories in CATEGORIES.items():
        request[section] = {}
        found = record.get(section) or {}
        if not isinstance(found, Mapping):
            raise ValueError(f"{section}: is a {type(found).__name__}, not a mapping of categories")
        for category in categories:
            probes = _probes(found.get(category) or [], f"{section}.{category}")
            if probes["prompt"]:
                request[section][category] = probes
    return request


def with_chat_template(request: Mapping, tokenizer) -> dict:
    """The request with every prompt (its own, the rephrased one, all probes) in the tokenizer's chat template.

    Then every method edits and every evaluator asks in the same form, whatever it knows of templates.
    """
    wrapped = {**request, "prompt": chat_prompt(tokenizer, request["prompt"])}
    if "rephrase_prompt" in request:
        wrapped["rephrase_prompt"] = chat_prompt(tokenizer, request["rephrase_prompt"])
    for section in CATEGORIES:
        wrapped[section] = {
            name: {**probes, "prompt": [chat_prompt(tokenizer, prompt) for prompt in probes["prompt"]]}
            for name, probes in request.get(section, {}).items()
        }
    return wrapped


def _probes(items, field: str) -> dict[str, list[str]]:
    probes = {"prompt": [], "ground_truth": []}
    if not isinstance(items, list):
        raise ValueError(f"{field}: is a {type(items).__name__}, not a list")
    for i, item in enumerate(items):
        if not isinstance(item, Mapping) or not isinstance(item.get("prompt"), str) or not item["prompt"].strip():
            raise ValueError(f"{field}[{i}].prompt: {item!r} has no prompt")
        answer = _first(item.get("ground_truth"))
        if answer is None or not str(answer).strip():
            continue
        probes["prompt"].append(item["prompt"])
        probes["ground_truth"].append(str(answer))
    return probes


def _first(answer):
    """The first alias of an answer that may be nested in lists."""
    while isinstance(answer, list):
        answer = answer[0] if answer else None
    return answer
