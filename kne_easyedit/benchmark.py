"""Edit records one by one with several methods through EasyEdit, and keep everything that was measured.

One loaded model serves all methods. Every edit is undone by EasyEdit's own restore, and the weights are then
compared with what they were: a run whose model has drifted stops. One line of ``results.jsonl`` is one record
and method; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy
import torch
from torch import nn
from tqdm import tqdm

from kne_easyedit import bridge
from kne_easyedit.cache import model_digest
from kne_easyedit.ensemble import NeuronEnsemble
from kne_easyedit.localization import find_ensemble
from kne_easyedit.machine import environment
from kne_easyedit.paths import atomic_write

logger = logging.getLogger(__name__)

KNE = "KNE"
METRICS = {
    "edit_success": "share of the new answer's tokens that the edited model predicts",
    "portability": "the same for what follows from the edit: aliases, reasoning, inverse relations",
    "locality": "share of predicted tokens that the edit left as they were, on unrelated facts",
    "fluency": "entropy of the 2- and 3-grams of free text (EasyEdit's ngram_entropy x 100); near the unedited model's is good",
    "seconds_per_edit": "time to compute and write one edit, localisation and evaluation apart",
}


@dataclass
class Run:
    """What one run is made of. ``hparams`` maps method names to their hyperparameter objects."""

    model: nn.Module
    tokenizer: object
    requests: Sequence[dict]
    hparams: dict[str, object]
    data: str
    folder: Path
    seed: int = 42
    skip_bad: bool = False
    complaints: list[str] = field(default_factory=list)
    """Records left out so far, and why."""


def run(job: Run, *, again: bool = False) -> dict:
    """Runs every record through every method; returns (and writes) the summary.

    Writes into ``job.folder``: ``results.jsonl``, ``summary.json``, and for KNE ``ensemble.json`` and
    ``ensemble.png``. A finished run with the same settings is not repeated unless ``again``; lines of other
    settings are moved aside to ``results.previous.jsonl`` (which holds one earlier run) and never mixed in.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    weights = model_digest(job.model)
    variant = _prepare_easyedit()
    fingerprint = _fingerprint(job, weights, variant)
    results = job.folder / "results.jsonl"
    done = _previous(results, fingerprint, len(job.requests) * len(job.hparams), again)
    localization, ensemble = _localize(job) if KNE in job.hparams else (None, None)
    plain = _Answers(job)
    with _easyedit_output(job.folder / "easyedit") as quiet:
        editors = {}
        for method, hparams in job.hparams.items():
            with quiet():
                editors[method] = bridge.editor_for(hparams, job.model, deepcopy(job.tokenizer))
        with results.open("a", encoding="utf-8") as stream, tqdm(total=len(job.requests) * len(editors), desc="edit", unit="edit") as bar:
            for request in job.requests:
                for method, editor in editors.items():
                    bar.set_postfix_str(f"{method}: {request['subject'][:24]}")
                    if (request["index"], method) not in done:
                        line = _edit_one(job, method, editor, request, plain, quiet, weights)
                        if line is not None:
                            line = {"fingerprint": fingerprint, **line}
                            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                            stream.flush()
                            os.fsync(stream.fileno())
                            done[request["index"], method] = line
                    bar.update()
    summary = {
        "model": {"name": str(next(iter(job.hparams.values())).model_name), "sha256": weights},
        "data": job.data,
        "records": len({index for index, _ in done}),
        "skipped": job.complaints,
        "easyedit": bridge.describe(),
        "fluency_variant": variant,
        "environment": environment(job.model),
        "seed": job.seed,
        "fingerprint": fingerprint,
        "localization": localization,
        "methods": {method: summarize([line for (_, m), line in done.items() if m == method]) for method in job.hparams},
    }
    atomic_write(job.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if ensemble is not None:
        from kne_easyedit.plots import draw_ensemble

        share = localization["parameter_share"]
        draw_ensemble(
            ensemble,
            job.folder / "ensemble.png",
            f"{ensemble.size} neurons, {share:.2%} of all parameters, found on {ensemble.facts} facts",
        )
    return summary


def summarize(lines: Sequence[dict]) -> dict[str, float | None]:
    """The figures of one method: means over records, in percent (fluency: entropy x 100).

    As in EasyEdit's run_knowedit_llama2.py: a record's portability (locality) is the mean over its categories
    of the mean over a category's prompts; what a record lacks is left out. None where no record has it.
    """
    posts = [line["metrics"]["post"] for line in lines]
    figures = {
        "edit_success": _mean(fmean(post["rewrite_acc"]) for post in posts),
        "portability": _mean(_section(post, "portability") for post in posts),
        "locality": _mean(_section(post, "locality") for post in posts),
        "fluency": _mean(post.get("fluency", {}).get("ngram_entropy") for post in posts),
    }
    figures = {name: None if value is None else 100 * value for name, value in figures.items()}
    return {**figures, "seconds_per_edit": _mean(line["seconds"] for line in lines), "records": len(lines)}


def _localize(job: Run) -> tuple[dict, NeuronEnsemble | None]:
    """Finds KNE's ensemble before the first edit, so that no edit pays for it, and describes it."""
    hparams = job.hparams[KNE]
    if hparams.ensemble is None and hparams.localization_data is None:
        return {"facts": None, "note": "every edit localises on its own request"}, None
    start = time.perf_counter()
    ensemble = find_ensemble(job.model, job.tokenizer, [], hparams)
    elapsed = time.perf_counter() - start
    ensemble.save(job.folder / "ensemble.json")
    return {
        "facts": ensemble.facts,
        "seconds": elapsed,
        "seconds_per_fact": ensemble.seconds / ensemble.facts if ensemble.seconds is not None else None,
        "neurons": ensemble.size,
        "parameter_share": ensemble.parameter_share(job.model),
        "neurons_per_layer": {t: {str(layer): n for layer, n in found.items()} for t, found in ensemble.counts().items()},
    }, ensemble


class _Answers:
    """Greedy continuations of prompts, those of the unedited model kept."""

    def __init__(self, job: Run):
        self.model, self.tokenizer, self.known = job.model, job.tokenizer, {}

    def before(self, prompt: str) -> str:
        if prompt not in self.known:
            self.known[prompt] = self.now(prompt)
        return self.known[prompt]

    @torch.no_grad()
    def now(self, prompt: str, length: int = 12) -> str:
        tokens = self.tokenizer(prompt, return_tensors="pt").to(next(self.model.parameters()).device)
        out = self.model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        return self.tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def _edit_one(job: Run, method: str, editor, request: dict, answers: _Answers, quiet, weights: str) -> dict | None:
    """One record through one method; None if it is bad and bad ones are skipped."""
    seen: dict[str, object] = {}
    before = answers.before(request["prompt"])
    apply = editor.apply_algo

    def observed(*args, **kwargs):
        start = time.perf_counter()
        result = apply(*args, **kwargs)
        seen.update(seconds=time.perf_counter() - start, after=answers.now(request["prompt"]))
        return result

    _seed(job.seed)  # EasyEdit samples the text whose fluency it measures
    editor.apply_algo = observed
    try:
        with quiet():
            metrics, _, _ = editor.edit(
                prompts=[request["prompt"]],
                target_new=[request["target_new"]],
                ground_truth=[request["ground_truth"]],
                subject=[request["subject"]],
                rephrase_prompts=[request["rephrase_prompt"]] if "rephrase_prompt" in request else None,
                portability_inputs=_inputs(request["portability"]),
                locality_inputs=_inputs(request["locality"]),
                test_generation=True,
                verbose=False,
                **({"keep_original_weight": True} if bridge.is_legacy() else {}),
            )
    except (ValueError, AssertionError, FloatingPointError) as error:
        if not job.skip_bad:
            raise
        job.complaints.append(f"{job.data}: record {request['index']}: {method}: {error}")
        metrics = None
    finally:
        editor.apply_algo = apply
    if model_digest(job.model) != weights:
        raise RuntimeError(f"{method}: the model is not what it was after record {request['index']} was undone; the run ends here")
    if metrics is None:
        return None
    return {
        "method": method,
        "index": request["index"],
        "prompt": request["prompt"],
        "subject": request["subject"],
        "target_new": request["target_new"],
        "seconds": seen["seconds"],
        "before": before,
        "after": seen["after"],
        "metrics": json.loads(json.dumps(metrics[0], default=float)),
    }


def _inputs(section: dict) -> dict | None:
    """A record's categories as EasyEdit's ``edit`` takes them: lists over records, here of one."""
    return {name: {key: [values] for key, values in probes.items()} for name, probes in section.items()} or None


def _previous(results: Path, fingerprint: str, wanted: int, again: bool) -> dict[tuple[int, str], dict]:
    """The finished lines of the same run. Other lines (of other settings, or torn by a kill) are moved aside."""
    if not results.exists():
        return {}
    lines = []
    for text in results.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a last line that a kill has torn
            lines.append(json.loads(text))
    own = [line for line in lines if line.get("fingerprint") == fingerprint]
    if len(own) == len(lines) and (len(own) < wanted or not again):
        if own:
            logger.warning("%s: %s of %s edits are there already", results, len(own), wanted)
        atomic_write(results, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in own))
        return {(line["index"], line["method"]): line for line in own}
    aside = results.with_name("results.previous.jsonl")
    os.replace(results, aside)
    logger.warning("%s: from an earlier run, moved to %s", results, aside.name)
    return {}


def _fingerprint(job: Run, weights: str, variant: str) -> str:
    """Everything that results depend on, as a digest."""
    versions = {k: v for k, v in environment(job.model).items() if k not in ("platform", "cpus")}
    settings = {method: {k: str(v) for k, v in vars(hparams).items()} for method, hparams in job.hparams.items()}
    requests = [{k: v for k, v in request.items()} for request in job.requests]
    parts = [weights, variant, versions, bridge.describe(), settings, requests, job.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _prepare_easyedit() -> str:
    bridge.register()
    return bridge.fluency_variant()


@contextlib.contextmanager
def _easyedit_output(folder: Path) -> Iterator:
    """Yields a context in which EasyEdit's prints, bars and logs go to ``folder`` instead of screen and working directory."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.log").open("a", encoding="utf-8") as log:

        @contextlib.contextmanager
        def quiet() -> Iterator[None]:
            here = Path.cwd()
            os.chdir(folder)  # EasyEdit writes ./logs
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    yield
            finally:
                os.chdir(here)

        root = logging.getLogger("easyeditor")
        known = {logger: list(logger.handlers) for logger in _loggers(root)}
        try:
            yield quiet
        finally:
            for own in _loggers(root):  # handlers of this run's editors would write to a closed file
                for handler in own.handlers[:]:
                    if handler not in known.get(own, []):
                        own.removeHandler(handler)
                        if isinstance(handler, logging.FileHandler):
                            handler.close()


def _loggers(root: logging.Logger) -> list[logging.Logger]:
    named = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith(f"{root.name}.")]
    return [root, *named]


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _section(post: dict, section: str) -> float | None:
    found = post.get(section) or {}
    return _mean(_mean(values) for name, values in found.items() if name.endswith("_acc"))


def _mean(values) -> float | None:
    values = [value for value in values if value is not None]
    return fmean(values) if values else None
