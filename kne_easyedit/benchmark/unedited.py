"""Metrics and answers of the unedited model, which every method is compared with: measured once and kept."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from kne_easyedit import bridge
from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import atomic_write, parse_json
from kne_easyedit.benchmark.answers import free_answers
from kne_easyedit.benchmark.asking import askable, probabilities
from kne_easyedit.benchmark.general import NOTHING, Examination, General, is_general
from kne_easyedit.benchmark.job import Run
from kne_easyedit.benchmark.neighbourhood import Before, Questioner
from kne_easyedit.benchmark.probes import Asked
from kne_easyedit.bridge import patches
from kne_easyedit.bridge.evaluation_patches import PADDING
from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.facts.encoding import SEPARATOR, Tokenizer, encode

logger = logging.getLogger(__name__)


class Probabilities(TypedDict):
    """Of a whole answer after the prompt."""

    new: float
    old: float | None
    """None for a record without an old answer, and for one that cannot follow the prompt."""


class Unedited(TypedDict):
    """One record, evaluated before its edit.

    A file in the folder ``before`` holds it with ``asked`` as a mapping (`Asked.key` -> answers); files of earlier
    versions hold the first two fields.
    """

    metrics: dict[str, Any]
    """EasyEdit's."""
    answer: str
    """The beginning of the free greedy answer."""
    whole: str
    """The free greedy answer to its natural stop (`answers.FreeAnswer`)."""
    probabilities: Probabilities
    asked: Before
    """The answers to what else is asked of the record."""
    general: General
    """What else the model can do: the same for all records."""


class UneditedEvaluations:
    """Evaluates records before their edits: once for all methods that see the tokens alike, and kept for other runs.

    What a file of an earlier run lacks is measured and added to it.

    Args:
        job: The run.
        base: What such an evaluation depends on, the record apart (`job.base_fingerprint`).
        records: Number of a record -> its digest.
        asked: Number of a record -> what is asked of it beside EasyEdit's probes.
        examination: What is measured of the model beside its facts.
        quiet: A context in which nothing is printed.
    """

    def __init__(
        self,
        job: Run,
        base: list,
        records: Mapping[int, str],
        asked: Mapping[int, Asked],
        examination: Examination,
        quiet: Callable[[], contextlib.AbstractContextManager],
    ):
        self.job, self.base, self.records, self.asked, self.quiet = job, base, records, asked, quiet
        self.questioner = Questioner(job.tokenizer, job.separator)
        self.folder = job.before_folder or job.folder / "before"
        self.general = self._general(examination)

    def of(self, editor: bridge.MethodEditor, request: dict) -> Unedited:
        """The evaluation of one record, from its file if there is one."""
        path = self.folder / f"{digest([self.base, _view(editor), self.records[request['index']]])[:32]}.json"
        known = _known(path)
        found: dict[str, Any] = dict(known)
        model, tokenizer, separator = self.job.model, self.job.tokenizer, self.job.separator
        if "metrics" not in found:
            with self.quiet():
                found["metrics"] = plain(editor.evaluate(request, generation=self.job.fluency, seed=self.job.seed))
        if "whole" not in found:
            answer = free_answers(model, tokenizer, request, separator)
            found = {**found, "answer": found.get("answer", answer.beginning), "whole": answer.whole}
            found["probabilities"] = answer_probabilities(model, tokenizer, request, separator)
        asked = self.asked[request["index"]]
        if asked.key not in found.get("asked", {}):
            answers = self.questioner.before(model, request, asked)
            found["asked"] = {**found.get("asked", {}), asked.key: answers}
        if found != known:
            text = json.dumps(found, ensure_ascii=False)
            atomic_write(path, text)
            found = json.loads(text)
        return cast(Unedited, {**found, "asked": found["asked"][asked.key], "general": self.general})

    def _general(self, examination: Examination) -> General:
        """What else the unedited model can do, from its file if there is one; nothing if the run does not ask."""
        if not examination:
            return NOTHING
        path = self.folder / f"general-{digest([self.base, examination.identity()])[:32]}.json"
        if path.is_file() and is_general(found := parse_json(path.read_bytes())):
            return cast(General, found)
        with self.quiet():
            measured = examination.of(self.job.model, self.job.tokenizer)
        atomic_write(path, json.dumps(measured))
        return measured


def answer_probabilities(
    model: Any, tokenizer: Tokenizer, request: Mapping, separator: str = SEPARATOR
) -> Probabilities:
    """The probabilities of the new and the old answer of a request, each as a whole, after its prompt.

    Args:
        model: A model of transformers.
        tokenizer: Of the model.
        request: With ``prompt``, ``target_new`` and ``ground_truth``.
        separator: Joins prompt and answer.
    """
    new = encode(tokenizer, request["prompt"], request["target_new"], separator)
    old = askable(model, tokenizer, request["prompt"], request["ground_truth"], separator)
    of_new, *of_old = probabilities(model, [new, *([old] if old else [])], at_once=1)
    return {"new": of_new, "old": of_old[0] if of_old else None}


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
    side = "left" if PADDING in patches.applied() else editor.tokenizer.padding_side
    view = [side, hparams.max_length, traits_of(hparams.alg_name).own_evaluation]
    if getattr(hparams, "evaluation_type", None):  # added only then: files of earlier runs keep their names
        view += [hparams.evaluation_type, bool(getattr(hparams, "api_key", None))]
    return view


def _known(path: Path) -> dict[str, Any]:
    """What an earlier run has measured; nothing if there is no complete file: then it is measured again."""
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
        if isinstance(found, dict) and isinstance(found.get("metrics"), dict) and isinstance(found.get("answer"), str):
            return found
        reason = "holds no figures"
    except ValueError as error:
        reason = str(error)
    logger.warning("%s: %s; the figures before the edit are computed again", path, reason)
    return {}
