"""``manifest.json`` and ``summary.json``: what was run where, and its results. Built and checked only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from kne_easyedit import bridge
from kne_easyedit._util.machine import hardware
from kne_easyedit._util.settings import public_settings
from kne_easyedit._version import __version__
from kne_easyedit.benchmark.checks import require, require_shape
from kne_easyedit.benchmark.preparation import PreparedRun
from kne_easyedit.benchmark.summary import general_summary, retention, summarize
from kne_easyedit.bridge import patches
from kne_easyedit.facts.readers import data_digest
from kne_easyedit.metrics import is_number
from kne_easyedit.models.devices import environment

_SHAPE = {
    "kne_easyedit": str,
    "started": str,
    "model": {"name": str, "sha256": str},
    "data": {"name": str},
    "mode": str,
    "chat_template": bool,
    "fluency_variant": str,
    "easyedit": {"kind": str, "version": str, "patches": list},
    "methods": dict,
    "fingerprints": dict,
    "localization": dict,
    "second_moments": dict,
    "machine": {"processor": str, "cpus": int, "threads": int, "gpus": list},
    "environment": {"python": str, "torch": str, "transformers": str, "peft": str, "dtype": str},
}


def manifest_of(
    prepared: PreparedRun, editors: Mapping[str, bridge.MethodEditor], second_moments: Mapping[str, dict]
) -> dict:
    """The manifest, complete before anything is edited: a run that dies leaves it, too.

    Args:
        prepared: The run.
        editors: Label -> the editor of the method.
        second_moments: Label -> what `bridge.second_moments.prepare` returns, for methods that need them.
    """
    job = prepared.job
    return {
        "kne_easyedit": __version__,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {"name": prepared.model_name, "sha256": prepared.weights},
        "data": {"name": job.data, "sha256": data_digest(job.data), "records": list(prepared.records.items())},
        "easyedit": {**bridge.describe(), "patches": patches.applied()},
        "methods": {
            method: {name: value for name, value in public_settings(editor.hparams).items() if name != "model_name"}
            for method, editor in editors.items()
        },
        "padding": {method: editor.tokenizer.padding_side for method, editor in editors.items()},
        "seed": job.seed,
        "mode": job.mode,
        "batch_size": job.batch_size,
        "retention_every": job.retention_every,
        "chat_template": job.chat_template,
        "neighbours": job.neighbours,
        "contradiction": job.contradiction,
        **({"general": prepared.examination.described()} if job.examination else {}),
        "fluency_variant": prepared.variant,
        "second_moments": second_moments,
        "fingerprints": prepared.fingerprints,
        "settings": prepared.settings,
        "localization": prepared.localization,
        "environment": environment(job.model),
        "machine": hardware(),
        "workers": job.workers,
    }


def summary_of(
    prepared: PreparedRun, second_moments: Mapping[str, dict], results: Sequence[Mapping], retained: Sequence[Mapping]
) -> dict[str, Any]:
    """The summary of a run.

    Args:
        prepared: The run.
        second_moments: As in `manifest_of`.
        results: The lines of ``results.jsonl``, in any order.
        retained: The lines of ``retention.jsonl``, in any order.
    """
    job = prepared.job
    methods: dict[str, dict] = {method: summarize(_of(results, method)) for method in job.hparams}
    if job.mode == "sequential":
        methods = {method: {**its, "retention": retention(_of(retained, method))} for method, its in methods.items()}
    for method, its in methods.items() if job.examination else ():
        its |= general_summary(_of(results, method), _of(retained, method))
    return {
        "model": {"name": prepared.model_name, "sha256": prepared.weights},
        "data": job.data,
        "records": len({line["index"] for line in results}),
        "skipped": job.complaints,
        "mode": job.mode,
        "batch_size": job.batch_size,
        "chat_template": job.chat_template,
        "easyedit": {**bridge.describe(), "patches": patches.applied()},
        "fluency_variant": prepared.variant,
        "second_moments": second_moments,
        "environment": environment(job.model),
        "seed": job.seed,
        "fingerprints": prepared.fingerprints,
        "localization": prepared.localization,
        "methods": methods,
    }


def check_manifest(manifest: Any) -> None:
    """Checks a manifest from anywhere.

    Raises:
        ValueError: Names the field, for a manifest that no report can quote.
    """
    require_shape(manifest, _SHAPE, "")
    for method, its in manifest["methods"].items():
        require(isinstance(its, dict), f"methods.{method}", its, "a mapping of settings")
    curves = manifest.get("curves", {})
    require(isinstance(curves, dict), "curves", curves, "a mapping")
    for curve, its in curves.items():
        require(isinstance(its, str), f"curves.{curve}", its, "a text")
    require(isinstance(manifest.get("settings", {}), dict), "settings", manifest.get("settings"), "a mapping")
    for method, its in manifest["second_moments"].items():
        require_shape(its, {"source": str}, f"second_moments.{method}.")
        _require_number(its, "seconds", f"second_moments.{method}")
    for method, its in manifest["localization"].items():
        require(isinstance(its, dict), f"localization.{method}", its, "a mapping")
        for name in ("facts", "seconds_per_fact"):
            _require_number(its, name, f"localization.{method}")


def _require_number(its: Mapping, name: str, where: str) -> None:
    require(its.get(name) is None or is_number(its[name]), f"{where}.{name}", its.get(name), "a number")


def _of(lines: Sequence[Mapping], method: str) -> list[Mapping]:
    """A method's lines in the order of the records: the last bit of a sum must not depend on the order of workers."""
    return sorted((line for line in lines if line["method"] == method), key=lambda line: line["index"])
