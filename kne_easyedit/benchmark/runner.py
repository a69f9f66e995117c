"""Edits records with several methods through EasyEdit, alone, in batches or in a row, and keeps all that was measured.

One loaded model serves all methods. Edits are undone by what EasyEdit's methods return for it, and the digest of the
weights is then compared with the one before: a run whose model has drifted stops. One line of ``results.jsonl`` is one
record and method; a run that was interrupted resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kne_easyedit import bridge
from kne_easyedit._util.errors import RunStopped
from kne_easyedit._util.files import atomic_write, exclusive_lock
from kne_easyedit._util.machine import PeakMemory
from kne_easyedit._util.messages import printable
from kne_easyedit._util.workers import run_parallel
from kne_easyedit.benchmark.answers import FreeAnswer, free_answers, one_line
from kne_easyedit.benchmark.asking import AT_ONCE
from kne_easyedit.benchmark.bad_records import NO_DISTRIBUTION, describe_error, is_record_error, report_bad_record
from kne_easyedit.benchmark.figures import draw_run
from kne_easyedit.benchmark.general import NOTHING, General
from kne_easyedit.benchmark.job import Run, asked_later
from kne_easyedit.benchmark.labels import suffix
from kne_easyedit.benchmark.manifest import manifest_of, summary_of
from kne_easyedit.benchmark.neighbourhood import Figures, Questioner
from kne_easyedit.benchmark.preparation import PreparedRun, prepare
from kne_easyedit.benchmark.result_line import ResultLine, result_line, retention_line
from kne_easyedit.benchmark.store import Lines
from kne_easyedit.benchmark.unedited import (
    Unedited,
    UneditedEvaluations,
    answer_probabilities,
    plain,
    with_old_answer,
)
from kne_easyedit.bridge import second_moments
from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.bridge.output import easyedit_output
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.fingerprint import model_digest

logger = logging.getLogger(__name__)

OUTPUT = "easyedit"
"""The folder in a job's own that EasyEdit works in."""
Event = tuple[str, str, Any]
"""What a worker reports of its chunk: kind, method, content."""


def run(job: Run, *, again: bool = False) -> dict[str, Any]:
    """Edits every record with every method, and evaluates the edits.

    Writes into ``job.folder``: ``results.jsonl``, ``manifest.json``, ``summary.json``, for sequential runs
    ``retention.jsonl`` and its figure, and for KNE ``ensemble.json`` and ``ensemble.png``. Lines of other settings are
    moved to files of their own, never mixed in and never lost.

    Args:
        job: The run.
        again: Whether lines that are there with the same settings are computed again.

    Returns:
        The summary, as ``summary.json`` has it.

    Raises:
        ValueError: For settings that cannot work.
        BadRecord: For a record that cannot be edited, unless ``job.skip_bad``.
        RunStopped: If a method has left the model changed, or, when all is written, if one has edited no record.
    """
    job.validate()
    with exclusive_lock(job.folder):
        prepared = prepare(job)
        for method, ensemble in prepared.ensembles.items():
            ensemble.save(job.folder / f"ensemble{suffix(method)}.json")
        with easyedit_output(job.folder / OUTPUT) as quiet:
            editors = _editors(prepared, quiet)
            moments = {
                method: second_moments.prepare(
                    job.model, editor.tokenizer, editor.hparams, job.folder.resolve() / OUTPUT, editor.text_source
                )
                for method, editor in editors.items()
                if second_moments.needs_second_moments(editor.hparams)
            }
            runner = _Runner(prepared, editors, quiet, again)  # lines of other settings go before their manifest does
            _write_json(job.folder / "manifest.json", manifest_of(prepared, editors, moments))
            runner.edit_all()
        summary = summary_of(prepared, moments, runner.results.lines, runner.retained.lines)
        _write_json(job.folder / "summary.json", summary)
        draw_run(summary, prepared.ensembles, job.folder)
        for method in job.hparams:
            if not summary["methods"][method]["records"]:
                raise RunStopped(f"{method}: no record could be edited; the first complaint: {job.complaints[0]}")
        return summary


def _editors(prepared: PreparedRun, quiet: Callable) -> dict[str, bridge.MethodEditor]:
    """Label -> editor. Raises ValueError for a method that cannot edit in the job's mode."""
    job = prepared.job
    editors = {}
    for method, hparams in prepared.hparams.items():
        with quiet():
            editor = editors[method] = bridge.MethodEditor(
                hparams, job.model, job.tokenizer, text_source=job.moments_text
            )
            editor.require_batch(job.batch_size if job.mode == "batch" else 1)
            if job.mode == "sequential":
                editor.require_sequence()
    return editors


def _write_json(path: Path, content: dict) -> None:
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


class _Runner:
    """The loop over records and methods. ``quiet``: a context in which nothing of EasyEdit's is printed."""

    def __init__(self, prepared: PreparedRun, editors: dict[str, bridge.MethodEditor], quiet: Callable, again: bool):
        self.prepared, self.editors, self.quiet = prepared, editors, quiet
        self.job, self.requests = job, requests = prepared.job, prepared.requests
        self.device = device_of(job.model)
        self.questioner = Questioner(job.tokenizer, job.separator)
        self.measured: set[str] = set()
        """Methods whose peak memory is known."""

        def keep(line: dict) -> bool:
            return not again and prepared.has(line)

        self.results = Lines(job.folder / "results.jsonl", keep, others=job.others)
        self.retained = Lines(job.folder / "retention.jsonl", keep, key=("method", "index", "after"), others=job.others)
        self.done = {(line["index"], line["method"]) for line in self.results.lines}
        self.shown = {request["index"] for request in requests[: job.show]}

    def edit_all(self) -> None:
        """Edits all records with all methods; what is measured is in `results` and `retained`."""
        its = self.prepared
        self.before = UneditedEvaluations(self.job, its.base, its.records, its.asked, its.examination, self.quiet)
        size = self.job.batch_size
        with tqdm(total=len(self.requests) * len(self.editors), desc="edit", unit="edit") as self.bar:
            if self.job.workers == 1:  # the bar belongs to this process
                for editor in self.editors.values():
                    editor.on_step = self._show_step
            if self.job.mode == "sequential":
                for method, editor in self.editors.items():
                    self._edit_in_a_row(method, editor)
            else:
                chunks = [self.requests[start : start + size] for start in range(0, len(self.requests), size)]
                for event in run_parallel(self._edit_by_all, chunks, min(self.job.workers, len(chunks))):
                    self._take(*event)

    def _edit_by_all(self, chunk: Sequence[dict]) -> Iterator[Event]:
        """Edits the chunk with one method after the other, and undoes each edit; it may run in another process."""
        for method, editor in self.editors.items():
            yield "begin", method, chunk[0]
            if any((request["index"], method) not in self.done for request in chunk):
                known = len(self.job.complaints)
                lines = yield from self._lines_of(method, editor, chunk)
                with self.quiet():
                    editor.undo()
                self._require_unchanged(method, chunk)
                yield from (("line", method, line) for line in lines if (line["index"], method) not in self.done)
                new = self.job.complaints[known:]
                del self.job.complaints[known:]
                yield from (("complaint", method, complaint) for complaint in new)
            yield "end", method, chunk

    def _take(self, event: str, method: str, content: Any) -> None:
        """Keeps and shows what `_edit_by_all` reports."""
        if event == "begin":
            self._show(method, content)
        elif event == "answer":
            index, prompt, answer = content
            if index in self.shown:
                self.bar.write(f"  {method}: {printable(prompt)} -> {one_line(answer)}")
        elif event == "line":
            self._keep(content)
        elif event == "complaint":
            self.job.complaints.append(content)
        elif event == "end":
            self.bar.update(len(content))

    def _lines_of(
        self, method: str, editor: bridge.MethodEditor, chunk: Sequence[dict]
    ) -> Generator[Event, None, list[ResultLine]]:
        """Edits the chunk and evaluates it; returns its lines, none for a bad chunk that is skipped. The edit stays."""
        try:
            before = [self.before.of(editor, request) for request in chunk]
            seconds, peak = self._apply(
                method, editor, [with_old_answer(editor, request, was) for request, was in zip(chunk, before)]
            )
            lines = []
            general = self._general(editor)
            for request, was in zip(chunk, before):
                answer = free_answers(editor.model, self.job.tokenizer, request, self.job.separator)
                # Reported before the evaluation, which takes longer.
                yield "answer", method, (request["index"], request["prompt"], answer.beginning)
                lines.append(self._line(method, editor, request, was, answer, general, seconds / len(chunk), peak))
            return lines
        except Exception as error:
            editor.undo()
            self._require_unchanged(method, chunk)
            if not is_record_error(error):
                raise
            report_bad_record(self.job, chunk, describe_error(method, error), error)
            return []
        except BaseException:
            editor.undo()
            raise

    def _edit_in_a_row(self, method: str, editor: bridge.MethodEditor) -> None:
        """All records one after the other, without undoing; facts edited earlier are evaluated again on the way.

        A run that was interrupted makes the edits again (their outcome is the same) but not the evaluations.
        """
        again = {(line["after"], line["index"]) for line in self.retained.lines if line["method"] == method}
        total = len(self.requests)
        stops = sorted({*range(self.job.retention_every, total, self.job.retention_every), total})
        needed = {(stop, request["index"]) for stop in stops for request in self.requests[:stop]}
        if needed <= again and all((request["index"], method) in self.done for request in self.requests):
            self.bar.update(total)
            return
        before = [self._before_or_none(method, editor, request) for request in self.requests]
        edited: list[tuple[dict, Unedited]] = []
        editor.keeps_earlier_edits = True
        try:
            for request, was in zip(self.requests, before):
                self._show(method, request)
                if was is not None and self._edit_next(method, editor, request, was):
                    edited.append((request, was))
                    if len(edited) % self.job.retention_every == 0:
                        self._evaluate_again(method, editor, edited, again)
                self.bar.update()
            self._evaluate_again(method, editor, edited, again)
        finally:
            with self.quiet():
                editor.undo()
        self._require_unchanged(method, self.requests)

    def _before_or_none(self, method: str, editor: bridge.MethodEditor, request: dict) -> Unedited | None:
        """The evaluation before the edit; None for a bad record, if bad ones are skipped."""
        try:
            return self.before.of(editor, request)
        except Exception as error:
            if not is_record_error(error):
                raise
            report_bad_record(self.job, [request], describe_error(method, error), error)
            return None

    def _edit_next(self, method: str, editor: bridge.MethodEditor, request: dict, was: Unedited) -> bool:
        """Edits one more record of a sequence and measures it; False if it is bad and bad ones are skipped.

        Raises RunStopped if the record has failed and the model is not proved to be as the edits before left it.
        """
        weights = model_digest(self.job.model) if self.job.skip_bad else None
        try:
            fields = asked_later(self.job, editor.hparams)
            seconds, peak = self._apply(method, editor, [with_old_answer(editor, request, was) | fields])
        except Exception as error:
            if not is_record_error(error):
                raise
            report_bad_record(self.job, [request], describe_error(method, error), error)
            if model_digest(self.job.model) != weights:
                raise RunStopped(
                    f"{method}: record {request['index']} has failed ({error}) and left the model other than the edits "
                    f"before it had; the sequence ends here, take the record out"
                ) from error
            return False
        if (request["index"], method) not in self.done:
            answer = free_answers(editor.model, self.job.tokenizer, request, self.job.separator)
            self._take("answer", method, (request["index"], request["prompt"], answer.beginning))
            self._keep(self._line(method, editor, request, was, answer, NOTHING, seconds, peak))
        return True

    def _evaluate_again(
        self, method: str, editor: bridge.MethodEditor, edited: Sequence[tuple[dict, Unedited]], again: set[tuple]
    ) -> None:
        """Evaluates all facts edited so far; ``again`` holds what was evaluated already, as (edits, index)."""
        left = any((len(edited), request["index"]) not in again for request, _ in edited)
        general = self._general(editor) if left else NOTHING
        for request, was in edited:
            if (len(edited), request["index"]) not in again:
                post = self._post(editor, request, was, fluency=False)
                figures = self._figures(editor, request, was, post, neighbours_only=True)
                head = self.prepared.head(method, request)
                self.retained.append(retention_line(head, len(edited), figures, general, post))
                again.add((len(edited), request["index"]))

    def _apply(self, method: str, editor: bridge.MethodEditor, chunk: Sequence[dict]) -> tuple[float, int | None]:
        """Edits; returns the seconds that it took, and for a method's first edit its peak memory (bytes).

        What a method draws at random follows the seed alone.
        """
        torch.manual_seed(self.job.seed)
        meter = None if method in self.measured else PeakMemory(self.device)
        self.measured.add(method)
        with self.quiet(), meter or contextlib.nullcontext():
            start = time.perf_counter()
            editor.apply(chunk)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
        return seconds, meter.bytes if meter else None

    def _line(
        self,
        method: str,
        editor: bridge.MethodEditor,
        request: dict,
        was: Unedited,
        answer: FreeAnswer,
        general: General,
        seconds: float,
        peak: int | None,
    ) -> ResultLine:
        post = self._post(editor, request, was, fluency=self.job.fluency)
        return result_line(
            self.prepared.head(method, request),
            self.job,
            request,
            was,
            answer,
            answer_probabilities(editor.model, self.job.tokenizer, request, self.job.separator),
            self._figures(editor, request, was, post),
            general,
            post,
            seconds=seconds,
            peak_bytes=peak,
            losses=editor.losses,
        )

    def _general(self, editor: bridge.MethodEditor) -> General:
        """What the model as it is can do beside its facts; nothing if the run does not ask."""
        if not self.prepared.examination:
            return NOTHING
        with self.quiet():
            return self.prepared.examination.of(editor.model, self.job.tokenizer)

    def _post(self, editor: bridge.MethodEditor, request: dict, was: Unedited, *, fluency: bool) -> dict:
        """EasyEdit's metrics of the model as it is, compared with those before the edit.

        From a model that an edit has broken, whose probabilities are not finite, no text can be sampled: it has no
        fluency, and all else counts. Such an edit has failed; it is no bad record.
        """

        def evaluated(generation: bool) -> dict:
            with self.quiet():
                return plain(editor.evaluate(request, generation=generation, seed=self.job.seed))

        try:
            post = evaluated(fluency)
        except RuntimeError as error:
            if not fluency or NO_DISTRIBUTION not in str(error):
                raise
            logger.warning(
                "%s: record %s has no fluency: the edited model's probabilities are not finite",
                editor.hparams.alg_name,
                request["index"],
            )
            post = evaluated(False)
        return bridge.compare(was["metrics"], post)

    def _figures(
        self, editor: bridge.MethodEditor, request: dict, was: Unedited, post: dict, *, neighbours_only: bool = False
    ) -> Figures:
        """The figures of the neighbours under the model as it is; ``post``: EasyEdit's metrics of it."""
        asked = self.prepared.asked[request["index"]]
        if neighbours_only:
            asked = replace(asked, aliases=(), denials=())
        at_once = 1 if traits_of(editor.hparams.alg_name).one_text else AT_ONCE
        return self.questioner.after(editor.model, request, asked, was["asked"], post, at_once=at_once)

    def _keep(self, line: ResultLine) -> None:
        self.results.append(line)
        self.done.add((line["index"], line["method"]))

    def _show(self, method: str, request: dict) -> None:
        self.doing = f"{method}: {printable(request['subject'] or request['prompt'])[:24]}"
        self.bar.set_postfix_str(self.doing)

    def _show_step(self, step: int, loss: float) -> None:
        self.bar.set_postfix_str(f"{self.doing}, step {step}, loss {loss:.2f}", refresh=False)
        self.bar.update(0)  # which shows it as often as a bar is shown

    def _require_unchanged(self, method: str, chunk: Sequence[dict]) -> None:
        if model_digest(self.job.model) != self.prepared.weights:
            numbers = ", ".join(str(request["index"]) for request in chunk[:10])
            raise RunStopped(
                f"{method}: the model is not what it was after record {numbers} was undone; the run ends here"
            )
