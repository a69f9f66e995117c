"""A preflight check: what a planned run needs, what is missing, and how long it will take, before hours are spent on it.

`examine` asks one question after the other and goes on after a failure, so that all faults of a plan show at once.
Everything but the trial reads small files only: the model's modules and its memory come from its configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import logging
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy
import torch
from torch import nn

from kne_easyedit import bridge
from kne_easyedit.batching import demand_length, encode_request
from kne_easyedit.bridge import patches
from kne_easyedit.bridge.editing import IN_CONTEXT
from kne_easyedit.cache import model_digest, scores_folder
from kne_easyedit.ensemble import NeuronEnsemble
from kne_easyedit.hparams import KNEHyperParams, resolve_device
from kne_easyedit.layout import count_parameters, out_features, resolve_target
from kne_easyedit.localization import Localization
from kne_easyedit.machine import free_memory
from kne_easyedit.models import SMOLLM2, load_model
from kne_easyedit.records import load_records
from kne_easyedit.sweep import HEAD_ROWS

OK, WARNING, FAILURE = "ok", "warning", "failure"
TRIAL = 2
"""Records (and facts to localise) that a trial takes."""
ONCE = 3
"""A first edit so many times as long as the next one has made what later ones reuse (MEMIT's second moments, say)."""
TOKENS = 64
"""Length of a text, prompt and answer, where the data are not known."""
SEED = 42


@dataclass(frozen=True)
class Finding:
    """One answer. Only a ``failure`` stands in the way of the run."""

    name: str
    status: Literal["ok", "warning", "failure"]
    text: str
    way_out: str = ""


def examine(plan: Mapping[str, object], data: str, records: int | None = None, offset: int = 0, trial: bool = True) -> Iterator[Finding]:
    """Yields what is to be said about a run of ``plan`` (label of a method -> its hyperparameters) on ``data``.

    The trial, which alone loads the model, is left out if anything that it needs has failed.
    """
    failed: list[str] = []
    for finding in _examine(plan, data, records, offset, trial, failed):
        if finding.status == FAILURE:
            failed.append(finding.name)
        yield finding


def _examine(plan: Mapping, data: str, records: int | None, offset: int, trial: bool, failed: Sequence[str]) -> Iterator[Finding]:
    yield from versions()
    yield from easyedit()
    folder = device = model = tokenizer = None
    if plan:
        device = yield from devices(plan)
        folder = yield from model_files(plan)
        model = yield from architecture(folder) if folder else _left_out("modules, tokenizer, memory", "there is no model")
    if model is not None:
        yield from modules(plan, model)
        tokenizer = yield from tokenizers(plan, folder, model)
    requests = yield from data_records(data, records, offset, tokenizer, model)
    blocked = list(failed)  # by all but the records: the good ones among them can be tried
    if requests is None:
        blocked.append("data")
    failures = len(failed)
    for hparams in plan.values():
        if isinstance(hparams, KNEHyperParams):
            yield from localization_data(hparams, tokenizer, model)
            yield from cache(hparams, model, len(requests or ()))
    if model is not None and device is not None:
        tokens = max((request["tokens"] for request in requests or ()), default=TOKENS)
        for label, hparams in plan.items():
            yield from memory(label, hparams, model, device, tokens)
