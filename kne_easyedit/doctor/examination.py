"""A preflight check: what a planned run needs, what it lacks, and how long it will take.

`examine` runs one check after the other and goes on after a failure, so that all faults of a plan show at once.
Only the trial loads the model; modules and memory come from its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kne_easyedit.doctor.data import cache, data_records, localization_facts, neighbours
from kne_easyedit.doctor.findings import DATA, FAILURE, Finding, left_out
from kne_easyedit.doctor.memory import memory
from kne_easyedit.doctor.model import architecture, devices, model_folder, tokenizers
from kne_easyedit.doctor.modules import modules
from kne_easyedit.doctor.surroundings import easyedit, packages
from kne_easyedit.doctor.together import together
from kne_easyedit.doctor.trial import try_out
from kne_easyedit.hparams import KNEHyperParams


def examine(
    plan: Mapping[str, Any], data: str, records: int | None = None, offset: int = 0, trial: bool = True
) -> Iterator[Finding]:
    """Checks a planned run.

    Args:
        plan: Label of a method -> its hyperparameters.
        data: A data file, or ``embedded``.
        records: Number of records; None: all.
        offset: The first record.
        trial: Whether to edit a few records. It is left out if a check has failed that it depends on; bad records do
            not stop it as long as there are good ones.

    Yields:
        What is found, in the order of the checks.
    """
    failed: list[str] = []
    for finding in _examine(plan, data, records, offset, trial, failed):
        if finding.status == FAILURE:
            failed.append(finding.name)
        yield finding


def _examine(
    plan: Mapping[str, Any], data: str, records: int | None, offset: int, trial: bool, failed: Sequence[str]
) -> Iterator[Finding]:
    yield from together(plan)
    yield from packages()
    yield from easyedit()
    device = folder = model = tokenizer = None
    if plan:
        device = yield from devices(plan)
        folder = yield from model_folder(plan)
    if folder is not None:
        model = yield from architecture(folder)
    if folder is None or model is None:
        yield left_out("modules, tokenizer, memory", "there is no model")
    else:
        yield from modules(plan, model)
        tokenizer = yield from tokenizers(plan, folder, model)
    requests = yield from data_records(data, records, offset, tokenizer, model, plan)
    for hparams in plan.values():
        if isinstance(hparams, KNEHyperParams) and hparams.ensemble is None:
            yield from localization_facts(hparams, tokenizer, model)
            yield from cache(hparams, model, len(requests))
        if isinstance(hparams, KNEHyperParams):
            yield from neighbours(hparams, requests)
    if model is not None and device is not None:
        yield from memory(plan, model, device, tokenizer, requests)
    missing = [name for name in failed if name != DATA] + [DATA] * (not requests) + ["hyperparameters"] * (not plan)
    if not trial:
        yield left_out("trial", "neither the edits nor the hours of the run were tried")
    elif missing or folder is None:
        yield left_out("trial", f"it needs what has failed: {', '.join(dict.fromkeys(missing))}")
    else:
        yield from try_out(plan, folder, requests)
