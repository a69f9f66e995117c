"""Figures and answers of the unedited model: what every method is compared with."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from kne_easyedit import bridge
from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import atomic_write, parse_json
from kne_easyedit.benchmark.answers import free_answer
from kne_easyedit.benchmark.job import Run
from kne_easyedit.bridge.methods import traits_of

logger = logging.getLogger(__name__)


class UneditedEvaluations:
    """Measures a record before its edit: once for all methods that see the tokens alike, and kept for other runs.

    ``base``: what such figures depend on beside the record (`job.base_fingerprint`); ``records``: number -> digest.
    """

    def __init__(
        self, job: Run, base: list, records: Mapping[int, str], quiet: Callable[[], contextlib.AbstractContextManager]
    ):
        self.job, self.base, self.records, self.quiet = job, base, records, quiet
        self.folder = job.before_folder or job.folder / "before"

    def of(self, editor: bridge.MethodEditor, request: dict) -> dict:
        """``metrics`` and ``answer`` of the unedited model."""
        path = self.folder / f"{digest([self.base, _view(editor), self.records[request['index']]])[:32]}.json"
        if (known := _known(path)) is not None:
            return known
        with self.quiet():
            metrics = plain(editor.evaluate(request, generation=self.job.fluency, seed=self.job.seed))
        found = {
            "metrics": metrics,
            "answer": free_answer(self.job.model, self.job.tokenizer, request, self.job.separator),
        }
        atomic_write(path, json.dumps(found, ensure_ascii=False))
        return json.loads(json.dumps(found))


def plain(metrics: dict) -> dict:
    """Figures without numpy's types, as JSON gives them back."""
    return json.loads(json.dumps(metrics, default=float))


def without_outputs(metrics: dict) -> dict:
    """What the lines keep of an evaluation before the edit: predicted tokens serve the comparison only."""
    locality = {name: values for name, values in metrics.get("locality", {}).items() if not name.endswith("_output")}
    return {**metrics, "locality": locality}


def with_old_answer(editor: bridge.MethodEditor, request: dict, was: dict) -> dict:
    """KN attributes the old answer, which some records lack: there it is what the unedited model says, up to the first stop."""
    if not traits_of(editor.hparams.alg_name).needs_ground_truth or request["ground_truth"] is not None:
        return request
    return {**request, "ground_truth": re.split(r"[.,;\n]", was["answer"].strip())[0].strip() or was["answer"].strip()}


def _view(editor: bridge.MethodEditor) -> list:
    """How the evaluator sees a record under this method's settings."""
    hparams = editor.hparams
    view = [editor.tokenizer.padding_side, hparams.max_length, traits_of(hparams.alg_name).own_evaluation]
    if getattr(hparams, "evaluation_type", None):  # added only then: files of earlier runs keep their names
        view += [hparams.evaluation_type, bool(getattr(hparams, "api_key", None))]
    return view


def _known(path: Path) -> dict | None:
    """What an earlier run has measured; None if there is nothing, or nothing whole: then it is measured again."""
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_bytes())
        if isinstance(found, dict) and isinstance(found.get("metrics"), dict) and isinstance(found.get("answer"), str):
            return found
        reason = "holds no figures"
    except ValueError as error:
        reason = str(error)
    logger.warning("%s: %s; the figures before the edit are computed again", path, reason)
    return None
