"""Metrics and answers of the unedited model, which every method is compared with: measured once and kept."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from kne_easyedit import bridge
from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import atomic_write, parse_json
from kne_easyedit.benchmark.answers import free_answer
from kne_easyedit.benchmark.job import Run
from kne_easyedit.bridge.methods import traits_of

logger = logging.getLogger(__name__)


class Unedited(TypedDict):
    """What a file in the folder ``before`` holds: one record, evaluated before its edit."""

    metrics: dict[str, Any]
    """EasyEdit's."""
    answer: str
    """The free greedy answer."""


class UneditedEvaluations:
    """Evaluates records before their edits: once for all methods that see the tokens alike, and kept for other runs.

    Args:
        job: The run.
        base: What such an evaluation depends on, the record apart (`job.base_fingerprint`).
        records: Number of a record -> its digest.
        quiet: A context in which nothing is printed.
    """

    def __init__(
        self,
        job: Run,
        base: list,
        records: Mapping[int, str],
        quiet: Callable[[], contextlib.AbstractContextManager],
    ):
        self.job, self.base, self.records, self.quiet = job, base, records, quiet
        self.folder = job.before_folder or job.folder / "before"

    def of(self, editor: bridge.MethodEditor, request: dict) -> Unedited:
        """The evaluation of one record, from its file if there is one."""
        path = self.folder / f"{digest([self.base, _view(editor), self.records[request['index']]])[:32]}.json"
        if (known := _known(path)) is not None:
            return known
        with self.quiet():
            metrics = plain(editor.evaluate(request, generation=self.job.fluency, seed=self.job.seed))
        answer = free_answer(self.job.model, self.job.tokenizer, request, self.job.separator)
        text = json.dumps({"metrics": metrics, "answer": answer}, ensure_ascii=False)
        atomic_write(path, text)
        return json.loads(text)


def plain(metrics: dict) -> dict:
    """Metrics without numpy's types, as JSON returns them."""
    return json.loads(json.dumps(metrics, default=float))


def with_old_answer(editor: bridge.MethodEditor, request: dict, unedited: Unedited) -> dict:
    """For methods that need an old answer: where a record lacks it, the unedited model's up to the first stop."""
    if not traits_of(editor.hparams.alg_name).needs_ground_truth or request["ground_truth"] is not None:
        return request
    answer = unedited["answer"].strip()
    return {**request, "ground_truth": re.split(r"[.,;\n]", answer)[0].strip() or answer}


def _view(editor: bridge.MethodEditor) -> list:
    """How EasyEdit's evaluator sees a record under this method's settings."""
    hparams = editor.hparams
    view = [editor.tokenizer.padding_side, hparams.max_length, traits_of(hparams.alg_name).own_evaluation]
    if getattr(hparams, "evaluation_type", None):  # added only then: files of earlier runs keep their names
        view += [hparams.evaluation_type, bool(getattr(hparams, "api_key", None))]
    return view


def _known(path: Path) -> Unedited | None:
    """What an earlier run has measured; None if there is no complete file: then it is measured again."""
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_bytes())
        if isinstance(found, dict) and isinstance(found.get("metrics"), dict) and isinstance(found.get("answer"), str):
            return Unedited(metrics=found["metrics"], answer=found["answer"])
        reason = "holds no figures"
    except ValueError as error:
        reason = str(error)
    logger.warning("%s: %s; the figures before the edit are computed again", path, reason)
    return None
