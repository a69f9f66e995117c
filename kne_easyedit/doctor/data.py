"""Checks of the records, of the facts that KNE localises on, and of the score cache."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from kne_easyedit.attribution.score_cache import scores_folder
from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.doctor.findings import DATA, FAILURE, OK, WARNING, Finding, failure, size
from kne_easyedit.editing.neighbours import neighbour_source, neighbours_by_request, uses_neighbours
from kne_easyedit.facts.encoding import SEPARATOR, Tokenizer, encode_request, require_known, require_length
from kne_easyedit.facts.records import load_records, require_evaluable
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization.data import localization_requests
from kne_easyedit.models.targets import resolve_target


def data_records(
    data: str,
    records: int | None,
    offset: int,
    tokenizer: Tokenizer | None,
    model: nn.Module | None,
    plan: Mapping[str, Any],
) -> Generator[Finding, None, list[dict[str, Any]]]:
    """Checks the records, their probes and their subjects. Returns the usable requests."""
    by_subject = [label for label, hparams in plan.items() if traits_of(hparams.alg_name).needs_subject]
    separator = next((hparams.separator for hparams in plan.values() if isinstance(hparams, KNEHyperParams)), SEPARATOR)
    try:
        requests, complaints = load_records(data, records, offset, on_bad="skip")
    except (ValueError, OSError) as error:
        yield failure(DATA, error)
        return []
    total = len(requests) + len(complaints)
    bad = {
        int(number): why
        for text in complaints
        for number, why in re.findall(r": record (\d+): (.*)", text, re.DOTALL)[:1]
    }
    for request in requests if tokenizer is not None else ():
        try:
            require_evaluable(request, tokenizer, model, separator, by_subject)  # the probes, too
        except ValueError as error:  # noqa: PERF203  (every bad record is reported)
            bad[request["index"]] = str(error)
    if bad:
        text = f"{len(bad)} of {total} records of {data} cannot be used: {', '.join(map(str, sorted(bad)))}"
        reasons = [f"record {index}: {bad[index]}" for index in sorted(bad)]
        yield Finding(
            DATA, FAILURE, "\n".join([text, *reasons]), "mend them, or leave them out by `kne run --on-bad-record skip`"
        )
    elif records is not None and total < records:
        yield Finding(
            DATA, WARNING, f"{records} records wanted, {data} has {total} from number {offset} on, all of them sound"
        )
    else:
        yield Finding(DATA, OK, f"{total} records of {data}, all of them sound")
    return [request for request in requests if request["index"] not in bad]


def token_count(
    request: Mapping[str, Any], tokenizer: Tokenizer, model: Any, chat: bool = False, separator: str = SEPARATOR
) -> tuple[int, int]:
    """Tokens of the prompt, and of the answer. Raises ValueError for a fact that model or tokenizer cannot encode."""
    fact = encode_request(tokenizer, request, chat, separator)
    require_length(fact, model.config)
    require_known(fact, model)
    return fact.prompt_length, len(fact.answer)


def localization_facts(
    hparams: KNEHyperParams, tokenizer: Tokenizer | None, model: nn.Module | None
) -> Iterator[Finding]:
    """Checks the facts that KNE localises on, if they are not those that it edits."""
    name, data, wanted = "localization_data", hparams.localization_data, hparams.localization_size
    if data is None:
        return
    try:
        facts = localization_requests(hparams)
    except (ValueError, OSError) as error:
        yield failure(name, error)
        return
    for fact in facts if tokenizer is not None else ():
        try:
            token_count(fact, tokenizer, model, hparams.use_chat_template, hparams.separator)
        except ValueError as error:  # noqa: PERF203  (the record is named)
            yield failure(name, f"record {fact['index']} of {data}: {error}; take it out, or localise on others")
            return
    yield Finding(
        name,
        OK if len(facts) == wanted else WARNING,
        f"{len(facts)} usable facts of {data} (localization_size: {wanted})",
    )


def neighbours(hparams: KNEHyperParams, requests: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Checks that the records have neighbours to train on, if they are asked for."""
    if not uses_neighbours(hparams) or not requests:
        return
    name = "neighbour_data"
    try:
        counts = [len(found) for request in requests for found in neighbours_by_request([request], hparams)]
    except (ValueError, OSError) as error:
        yield failure(name, error)
        return
    source, without = neighbour_source(hparams)[0], counts.count(0)
    text = f"{sum(counts) / len(counts):.1f} a record on average, from {source}; {without} records have none"
    yield Finding(name, WARNING if without else OK, text)


def cache(hparams: KNEHyperParams, model: nn.Module | None, records: int) -> Iterator[Finding]:
    """Checks that the score cache has room for the scores of localisation. Makes no folder."""
    folder = scores_folder(hparams.cache_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    way_out = "free some space, or set cache_dir or KNE_CACHE to a folder that can be written"
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        yield Finding(
            "cache", FAILURE, f"cache_dir: {folder} cannot be written ({there}: {error.strerror or error})", way_out
        )
        return
    text, needed = f"{folder} can be written, {size(free)} free", 0
    filled = there == folder and any(folder.iterdir())
    try:
        targets = (
            [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]
            if model is not None
            else []
        )
        facts = records if hparams.localization_data is None else hparams.localization_size
        needed = facts * sum(4 * len(target.layers) * target.n_neurons + 4096 for target in targets)
        text += f", {size(needed)} needed at most ({facts} facts)" if targets else ""
    except ValueError:
        pass  # `modules` reports it
    if needed <= free:
        yield Finding("cache", OK, text)
    elif filled:  # which scores are missing is known only of a loaded model
        yield Finding("cache", WARNING, f"{text}; less if some scores are there already", way_out)
    else:
        yield Finding("cache", FAILURE, text, way_out)
