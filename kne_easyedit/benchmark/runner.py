"""Edit records with several methods through EasyEdit, alone, in batches or in a row, and keep everything that was measured.

One loaded model serves all methods. Edits are undone by what EasyEdit's methods give for it, and the weights are then
compared with what they were: a run whose model has drifted stops. One line of ``results.jsonl`` is one record and
method; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from kne_easyedit import bridge
from kne_easyedit._util.errors import RunStopped
from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.machine import PeakMemory, environment, hardware
from kne_easyedit._util.settings import public_settings, replace_settings, resolve_paths
from kne_easyedit._util.workers import run_parallel
from kne_easyedit._version import __version__
from kne_easyedit.benchmark.answers import free_answer
from kne_easyedit.benchmark.bad_records import describe_error, is_record_error, report_bad_record, usable_records
from kne_easyedit.benchmark.figures import draw_run, suffix
from kne_easyedit.benchmark.job import Run, base_fingerprint, fingerprint, record_digest, settings_digest
from kne_easyedit.benchmark.store import Lines, exclusive_lock
from kne_easyedit.benchmark.summary import retention, summarize
from kne_easyedit.benchmark.unedited import UneditedEvaluations, plain, with_old_answer, without_outputs
from kne_easyedit.bridge import patches
from kne_easyedit.bridge.methods import NAME as KNE
from kne_easyedit.bridge.output import easyedit_output
from kne_easyedit.bridge.second_moments import needs_second_moments, prepare
from kne_easyedit.facts.encoding import SEPARATOR
from kne_easyedit.facts.readers import data_digest
from kne_easyedit.facts.records import with_chat_template
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.localization.localizer import find_ensemble
from kne_easyedit.metrics import begins_with
from kne_easyedit.models.fingerprint import model_digest

OUTPUT = "easyedit"
"""The folder in a job's own that EasyEdit works in."""


def run(job: Run, *, again: bool = False) -> dict:
    """Runs every record through every method; returns (and writes) the summary.

    Writes into ``job.folder``: ``results.jsonl``, ``summary.json``, for sequential runs ``retention.jsonl``, and for
    KNE ``ensemble.json`` and ``ensemble.png``. Lines that are there already with the same settings are not computed
    again, unless ``again``; lines of other settings are moved to files of their own, never mixed in and never lost.
    Raises ValueError for settings that cannot work, RunStopped if a method has left the model changed.
    """
    job.validate()
    with exclusive_lock(job.folder):
        return _Runner(job, again).run()


class _Runner:
    def __init__(self, job: Run, again: bool):
        self.job = job
        bridge.register()
        self.text_source = job.moments_text
        self.weights = model_digest(job.model)
        self.model_name = str(next(iter(job.hparams.values())).model_name)
        self.variant = bridge.fluency_variant()
        if job.separator != SEPARATOR and "evaluation-separator" not in patches.applied():
            raise ValueError(
                f"separator: {job.separator!r} reaches EasyEdit's evaluators by the patch evaluation-separator, which {patches.OFF} switches off"
            )
        self.requests = usable_records(
            job, [with_chat_template(r, job.tokenizer) for r in job.requests] if job.chat_template else job.requests
        )
        self.records = {request["index"]: record_digest(request) for request in self.requests}
        self.base = base_fingerprint(job, self.weights, self.variant)
        self.device = next(job.model.parameters()).device
        self.measured: set[str] = set()
        self.ensembles: dict[str, NeuronEnsemble] = {}
        # Copies: what a run decides for its methods is not the caller's business.
        self.hparams = {
            method: replace_settings(hparams, use_chat_template=job.chat_template)
            if hparams.alg_name == KNE
            else deepcopy(hparams)
            for method, hparams in job.hparams.items()
        }
        for hparams in self.hparams.values():
            resolve_paths(hparams)  # before EasyEdit works in a folder of the job's
        self.localization = {
            method: self._localize(method, hparams)
            for method, hparams in self.hparams.items()
            if hparams.alg_name == KNE
        }
        self.fingerprints = {
            method: fingerprint(job, method, self.base, self.ensembles.get(method)) for method in job.hparams
        }

        self.settings = {
            method: settings_digest(job, method, self.weights, self.variant, self.ensembles.get(method))
            for method in job.hparams
        }

        def own(line: dict) -> bool:
            method, index = line.get("method"), line.get("index")
            if again or not isinstance(method, str) or not isinstance(index, int):
                return False
            return self.fingerprints.get(method) == line.get("fingerprint") and self.records.get(index) == line.get(
                "record"
            )

        self.results = Lines(job.folder / "results.jsonl", own, others=job.others)
        self.retained = Lines(job.folder / "retention.jsonl", own, key=("method", "index", "after"), others=job.others)
        self.done = {(line["index"], line["method"]) for line in self.results.lines}
        self.shown = {request["index"] for request in self.requests[: job.show]}

    def run(self) -> dict:
        job = self.job
        with easyedit_output(job.folder / OUTPUT) as self.quiet:
            self.before = UneditedEvaluations(job, self.base, self.records, self.quiet)
            editors = {}
            for method, hparams in self.hparams.items():
                with self.quiet():
                    editors[method] = bridge.MethodEditor(
                        hparams, job.model, deepcopy(job.tokenizer), text_source=self.text_source
                    )
                    editors[method].on_step = (
                        self._show_step if job.workers == 1 else None
                    )  # the bar is of this process
                    editors[method].require_batch(job.batch_size if job.mode == "batch" else 1)
                    if job.mode == "sequential":
                        editors[method].require_sequence()
            self.moments = {
                method: self._moments(editor)
                for method, editor in editors.items()
                if needs_second_moments(editor.hparams)
            }
            self._write_manifest(editors)
            with tqdm(total=len(self.requests) * len(editors), desc="edit", unit="edit") as self.bar:
                if job.mode == "sequential":
                    for method, editor in editors.items():
                        self._edit_in_a_row(method, editor)
                else:
                    chunks = [
                        self.requests[start : start + job.batch_size]
                        for start in range(0, len(self.requests), job.batch_size)
                    ]
                    for event in run_parallel(
                        partial(self._edit_by_all, editors), chunks, min(job.workers, len(chunks))
                    ):
                        self._take(*event)
        summary = self._summary()
        atomic_write(job.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        draw_run(summary, self.ensembles, job.folder)
        return summary

    def _edit_by_all(self, editors: dict[str, bridge.MethodEditor], chunk: Sequence[dict]) -> Iterator[tuple]:
        """Edits the chunk by one method after the other, and undoes it each time. What comes of it goes to `_take`, in another process maybe."""
        for method, editor in editors.items():
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

    def _take(self, event: str, method: str, content) -> None:
        """Keeps and shows what `_edit_by_all` tells."""
        if event == "begin":
            self._show(method, content)
        elif event == "answer":
            index, prompt, answer = content
            if index in self.shown:
                self.bar.write(f"  {method}: {prompt} -> {' '.join(answer.split())[:70] or '(ends at once)'}")
        elif event == "line":
            self._keep(content)
        elif event == "complaint":
            self.job.complaints.append(content)
        elif event == "end":
            self.bar.update(len(content))

    def _lines_of(self, method: str, editor: bridge.MethodEditor, chunk: Sequence[dict]) -> Iterator[tuple]:
        """Edits the chunk and measures it; returns its lines, none if it is bad and bad ones are skipped. The edit stays."""
        try:
            before = [self.before.of(editor, request) for request in chunk]
            seconds, peak = self._apply(
                method, editor, [with_old_answer(editor, r, was) for r, was in zip(chunk, before)]
            )
            seconds /= len(chunk)
            lines = []
            for request, was in zip(chunk, before):
                answer = free_answer(editor.model, self.job.tokenizer, request, self.job.separator)
                yield (
                    "answer",
                    method,
                    (request["index"], request["prompt"], answer),
                )  # before the evaluation, which takes longer
                lines.append(self._line(method, editor, request, was, answer, seconds, peak))
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
        wanted = {(stop, request["index"]) for stop in stops for request in self.requests[:stop]}
        if wanted <= again and all((request["index"], method) in self.done for request in self.requests):
            self.bar.update(total)
            return
        before = [self._before_or_none(method, editor, request) for request in self.requests]
        edited: list[tuple[dict, dict]] = []
        editor.keeps_earlier_edits = True
        try:
            for request, was in zip(self.requests, before):
                self._show(method, request)
                if was is not None and self._edit_next(method, editor, request, was):
                    edited.append((request, was))
                    if len(edited) % self.job.retention_every == 0:
                        self._ask_again(method, editor, edited, again)
                self.bar.update()
            self._ask_again(method, editor, edited, again)
        finally:
            with self.quiet():
                editor.undo()
        self._require_unchanged(method, self.requests)

    def _before_or_none(self, method: str, editor: bridge.MethodEditor, request: dict) -> dict | None:
        try:
            return self.before.of(editor, request)
        except Exception as error:
            if not is_record_error(error):
                raise
            report_bad_record(self.job, [request], describe_error(method, error), error)
            return None

    def _edit_next(self, method: str, editor: bridge.MethodEditor, request: dict, was: dict) -> bool:
        """Edits one more record of a sequence and measures it; False if it is bad and bad ones are skipped.

        Raises RunStopped if the record has failed and the model is not proved to be as the edits before left it.
        """
        weights = model_digest(self.job.model) if self.job.skip_bad else None
        try:
            seconds, peak = self._apply(method, editor, [with_old_answer(editor, request, was)])
        except Exception as error:
            if not is_record_error(error):
                raise
            report_bad_record(self.job, [request], describe_error(method, error), error)
            if model_digest(self.job.model) != weights:
                raise RunStopped(
                    f"{method}: record {request['index']} has failed ({error}) and left the model other than the edits before it had; "
                    f"the sequence ends here, take the record out"
                ) from error
            return False
        if (request["index"], method) not in self.done:
            answer = free_answer(editor.model, self.job.tokenizer, request, self.job.separator)
            self._take("answer", method, (request["index"], request["prompt"], answer))
            self._keep(self._line(method, editor, request, was, answer, seconds, peak))
        return True

    def _ask_again(
        self, method: str, editor: bridge.MethodEditor, edited: Sequence[tuple[dict, dict]], again: set[tuple]
    ) -> None:
        """Evaluates all facts that were edited so far; ``again`` holds what was asked already, as (edits, index)."""
        for request, was in edited:
            if (len(edited), request["index"]) not in again:
                self.retained.append(self._retained(method, editor, request, was, len(edited)))
                again.add((len(edited), request["index"]))

    def _apply(self, method: str, editor: bridge.MethodEditor, chunk: Sequence[dict]) -> tuple[float, int | None]:
        """Edits; returns the seconds that it took, and for a method's first edit its peak memory (bytes).

        What a method draws at random follows the seed alone.
        """
        torch.manual_seed(self.job.seed)
        first = method not in self.measured
        self.measured.add(method)
        with self.quiet(), PeakMemory(self.device) if first else contextlib.nullcontext() as peak:
            start = time.perf_counter()
            editor.apply(chunk)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
        return seconds, peak.bytes if first else None

    def _line(
        self,
        method: str,
        editor: bridge.MethodEditor,
        request: dict,
        was: dict,
        answer: str,
        seconds: float,
        peak: int | None,
    ) -> dict:
        with self.quiet():
            post = plain(editor.evaluate(request, generation=self.job.fluency, seed=self.job.seed))
        return {
            **self._head(method, request),
            "data": Path(self.job.data).stem,
            "seed": self.job.seed,
            "mode": self.job.mode,
            "batch_size": self.job.batch_size,
            "chat_template": self.job.chat_template,
            "prompt": request["prompt"],
            "subject": request["subject"],
            "target_new": request["target_new"],
            "seconds": seconds,
            "peak_bytes": peak,
            "losses": [round(loss, 4) for loss in editor.losses],
            "before": was["answer"],
            "after": answer,
            "exact_match": float(begins_with(answer, request["target_new"])),
            "metrics": {"pre": without_outputs(was["metrics"]), "post": bridge.compare(was["metrics"], post)},
        }

    def _retained(self, method: str, editor: bridge.MethodEditor, request: dict, was: dict, count: int) -> dict:
        with self.quiet():
            post = plain(editor.evaluate(request, generation=False, seed=self.job.seed))
        return {
            **self._head(method, request),
            "after": count,
            "metrics": {"post": bridge.compare(was["metrics"], post)},
        }

    def _head(self, method: str, request: dict) -> dict:
        return {
            "fingerprint": self.fingerprints[method],
            "settings": self.settings[method],
            "method": method,
            "index": request["index"],
            "record": self.records[request["index"]],
        }

    def _keep(self, line: dict) -> None:
        self.results.append(line)
        self.done.add((line["index"], line["method"]))

    def _show(self, method: str, request: dict) -> None:
        self.doing = f"{method}: {(request['subject'] or request['prompt'])[:24]}"
        self.bar.set_postfix_str(self.doing)

    def _show_step(self, step: int, loss: float) -> None:
        self.bar.set_postfix_str(f"{self.doing}, step {step}, loss {loss:.2f}", refresh=False)
        self.bar.update(0)  # which shows it as often as a bar is shown

    def _require_unchanged(self, method: str, chunk: Sequence[dict]) -> None:
        if model_digest(self.job.model) != self.weights:
            numbers = ", ".join(str(request["index"]) for request in chunk[:10])
            raise RunStopped(
                f"{method}: the model is not what it was after record {numbers} was undone; the run ends here"
            )

    def _localize(self, method: str, hparams) -> dict:
        """Finds KNE's ensemble before the first edit, so that no edit pays for it, and describes it."""
        if hparams.ensemble is None and hparams.localization_data is None:
            return {"facts": None, "note": "every edit localises on its own request"}
        start = time.perf_counter()
        ensemble = self.ensembles[method] = find_ensemble(
            self.job.model, self.job.tokenizer, [], hparams, self.job.workers
        )
        elapsed = time.perf_counter() - start
        ensemble.save(self.job.folder / f"ensemble{suffix(method)}.json")
        return {
            "facts": ensemble.facts,
            "seconds": elapsed,
            "seconds_per_fact": ensemble.seconds / ensemble.facts if ensemble.seconds is not None else None,
            "neurons": ensemble.size,
            "parameter_share": ensemble.parameter_share(self.job.model),
            "neurons_per_layer": {
                t: {str(layer): n for layer, n in found.items()} for t, found in ensemble.counts().items()
            },
        }

    def _moments(self, editor: bridge.MethodEditor) -> dict:
        """Makes second moments before the first edit, so that no edit pays for them, and describes them."""
        folder = self.job.folder.resolve() / OUTPUT
        return prepare(self.job.model, editor.tokenizer, editor.hparams, folder, self.text_source)

    def _write_manifest(self, editors: dict[str, bridge.MethodEditor]) -> None:
        """What was run where, before anything is edited: a run that dies leaves it, too."""
        atomic_write(
            self.job.folder / "manifest.json",
            json.dumps(self._manifest(editors), indent=1, ensure_ascii=False, default=str) + "\n",
        )

    def _manifest(self, editors: dict[str, bridge.MethodEditor]) -> dict:
        job = self.job
        return {
            "kne_easyedit": __version__,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": {"name": self.model_name, "sha256": self.weights},
            "data": {"name": job.data, "sha256": data_digest(job.data), "records": list(self.records.items())},
            "easyedit": {**bridge.describe(), "patches": patches.applied()},
            "methods": {
                m: {k: v for k, v in public_settings(e.hparams).items() if k != "model_name"}
                for m, e in editors.items()
            },
            "padding": {method: editor.tokenizer.padding_side for method, editor in editors.items()},
            "seed": job.seed,
            "mode": job.mode,
            "batch_size": job.batch_size,
            "retention_every": job.retention_every,
            "chat_template": job.chat_template,
            "fluency_variant": self.variant,
            "second_moments": self.moments,
            "fingerprints": self.fingerprints,
            "settings": self.settings,
            "localization": self.localization,
            "environment": environment(job.model),
            "machine": hardware(),
            "workers": job.workers,
        }

    def _summary(self) -> dict:
        job = self.job

        def of(lines: Lines, method: str) -> list[dict]:
            own = [line for line in lines.lines if line["method"] == method]
            return sorted(own, key=lambda line: line["index"])  # a sum's last bit must not tell in what order they came

        methods = {method: summarize(of(self.results, method)) for method in job.hparams}
        if job.mode == "sequential":
            methods = {
                method: {**figures, "retention": retention(of(self.retained, method))}
                for method, figures in methods.items()
            }
        return {
            "model": {"name": self.model_name, "sha256": self.weights},
            "data": job.data,
            "records": len({index for index, _ in self.done}),
            "skipped": job.complaints,
            "mode": job.mode,
            "batch_size": job.batch_size,
            "chat_template": job.chat_template,
            "easyedit": {**bridge.describe(), "patches": patches.applied()},
            "fluency_variant": self.variant,
            "second_moments": self.moments,
            "environment": environment(job.model),
            "seed": job.seed,
            "fingerprints": self.fingerprints,
            "localization": self.localization,
            "methods": methods,
        }
