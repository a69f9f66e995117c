"""Builds a run from the configuration of scripts/run_benchmark.py: one method on one shard of one data set."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from kne_easyedit import bridge
from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import expand_path
from kne_easyedit._util.settings import EVALUATORS, replace_settings, typed_value
from kne_easyedit._util.shards import shard_of
from kne_easyedit.benchmark.checks import require_name
from kne_easyedit.benchmark.job import Run
from kne_easyedit.bridge.methods import NAME as KNE
from kne_easyedit.bridge.second_moments import needs_second_moments
from kne_easyedit.editing.neighbours import uses_neighbours
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.facts.readers import same_data
from kne_easyedit.facts.records import EMBEDDED, load_records, load_requests
from kne_easyedit.models.loading import load_model

_ADDED = ("neighbours", "contradiction", "perplexity", "ability", "ability_limit")
"""Settings of the evaluation that earlier versions did not have."""
_NEW = ("evaluation.perplexity", "evaluation.ability", "evaluation.ability_limit")
"""Settings that a configuration need not have."""


def job_folder(settings: Mapping) -> Path:
    """The folder of a job's results, one for each combination of settings.

    Model, data set, label, seed and shard are parts of its path; all other settings are in a digest behind the label.

    Args:
        settings: The configuration.

    Raises:
        ValueError: Names the setting, for a name that would lead out of ``out``.
    """
    i, n = shard_of(settings["shard"])
    model, data, method = settings["model"]["file"], settings["data"]["name"], settings["method"]["label"]
    for field, name in (("model.file", model), ("data.name", data), ("method.label", method)):
        require_name(field, name)
    name = f"{method}-{digest(distinguishing(settings))[:8]}"
    return Path(settings["out"]) / model / data / name / f"seed-{settings['seed']}" / f"shard-{i}-of-{n}"


def distinguishing(settings: Mapping) -> dict:
    """The settings that distinguish jobs, without the seed, the shard, and the folders of results and downloads."""
    found = {name: value for name, value in settings.items() if name not in ("out", "knowedit", "seed", "shard")}
    # Switched off they are left out, so that the folders of earlier versions, which did not have them, are found.
    evaluation = {name: its for name, its in settings["evaluation"].items() if its or name not in _ADDED}
    return {**found, "evaluation": evaluation}


def other_folders(folder: Path) -> list[Path]:
    """Folders of jobs of the same model and data set, from which lines of the same settings are taken over.

    So a run over more records resumes one over fewer, and so does one in other shards.
    """
    return [file.parent for file in sorted(folder.parents[2].glob("*/*/*/results.jsonl")) if file.parent != folder]


def job_of(settings: Mapping, hparams_folder: Path, loaded: tuple[nn.Module, Tokenizer] | None = None) -> Run:
    """The run that a configuration describes, with its model loaded.

    Args:
        settings: The configuration; relative paths in it mean the working directory.
        hparams_folder: The folder of the hyperparameter files, one folder a method.
        loaded: The model and the tokenizer of an earlier job of the same model; None: they are loaded.

    Raises:
        ValueError: Names the setting, before the model is loaded.
        FileNotFoundError: If there is no hyperparameter file for the model, or no data file.
    """
    _check(settings)
    i, n = shard_of(settings["shard"])
    if n > 1 and settings["evaluation"]["mode"] != "single":
        raise ValueError(
            f"shard: {settings['shard']} with evaluation.mode {settings['evaluation']['mode']}: there a result "
            f"depends on the other records, and no report takes the parts together; run it whole (shard=0/1)"
        )
    folder = job_folder(settings)
    method, data, evaluation = settings["method"], settings["data"], settings["evaluation"]
    hparams = hparams_of(settings, hparams_folder)
    _require_apart(hparams, data)
    requests, complaints = load_records(data["file"], data["records"], data["offset"], on_bad=settings["on_bad_record"])
    text_source = bridge.TextSource.from_settings(settings["statistics"])
    where, apart = data["localization"], []
    # Only KNE and second moments need the file; the other methods do without.
    if needs_second_moments(hparams) or where["file"] == EMBEDDED or expand_path(where["file"]).is_file():
        apart = load_requests(where["file"], where["size"], where["offset"])
    if needs_second_moments(hparams):
        # Text for second moments is sampled after facts that are not edited: subjects frequent in it resist edits.
        text_source = replace(text_source, prompts=[request["prompt"] for request in apart])
    model, tokenizer = loaded or load_model(hparams)
    return Run(
        model,
        tokenizer,
        requests[i::n],
        {method["label"]: hparams},
        str(data["file"]),
        folder,
        seed=settings["seed"],
        skip_bad=settings["on_bad_record"] == "skip",
        complaints=complaints,
        before_folder=Path(settings["out"]) / "before",
        text_source=text_source,
        apart=apart,
        others=other_folders(folder),
        jobs=n,
        **evaluation,
    )


def _require_apart(hparams: Any, data: Mapping) -> None:
    """Raises ValueError if facts are edited that the method was localised on, or that its text for moments follows."""
    where = data["localization"]
    file, offset, size = where["file"], where["offset"], where["size"]
    if hparams.alg_name == KNE:
        if hparams.ensemble is not None or hparams.localization_data is None:
            return
        file, offset, size = hparams.localization_data, hparams.localization_offset, hparams.localization_size
    elif not needs_second_moments(hparams):
        return
    start, stop = data["offset"], sys.maxsize if data["records"] is None else data["offset"] + data["records"]
    first, last = max(start, offset), min(stop, offset + size) - 1
    if first <= last and same_data(file, data["file"]):
        raise ValueError(
            f"data.localization: records {first} to {last} of {file} are both localised on and edited, which flatters "
            f"the method; choose others (data.offset, data.records, data.localization.offset, data.localization.size)"
        )


def hparams_of(settings: Mapping, hparams_folder: Path) -> Any:
    """The hyperparameters of a configuration's method: those of its file, with all that the configuration overrides.

    Args:
        settings: The configuration.
        hparams_folder: As for `job_of`.

    Raises:
        ValueError: Names the setting.
        FileNotFoundError: If there is no hyperparameter file for the model.
    """
    _check(settings)
    bridge.register()
    method, data = settings["method"], settings["data"]
    path = hparams_folder / method["hparams"] / f"{settings['model']['file']}.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"method.hparams: {path} does not exist; {method['hparams']} has no file for {settings['model']['file']}"
        )
    hparams = bridge.load_method(method["hparams"], path)
    overrides = {**settings["model"]["settings"], **method["settings"]}
    known = vars(hparams)
    for name in overrides:
        if name not in known and name not in EVALUATORS:
            raise ValueError(f"method.settings: {method['hparams']} has no setting {name!r}; it has {', '.join(known)}")
        if name in known and hparams.alg_name != KNE:  # KNE's checks itself
            try:
                overrides[name] = typed_value(hparams, name, overrides[name])
            except TypeError as error:
                shown = f"{overrides[name]!r} {error}, as {known[name]!r} is"
                raise ValueError(f"method.settings.{name}: {shown}") from error
    if hparams.alg_name == KNE:
        localization = data["localization"]
        found = {
            "localization_data": localization["file"],
            "localization_size": localization["size"],
            "localization_offset": localization["offset"],
        }
        overrides = {**found, **overrides}
    hparams = replace_settings(hparams, **overrides)
    if hparams.alg_name == KNE and uses_neighbours(hparams) and hparams.neighbour_data is None:
        hparams = replace_settings(hparams, neighbour_data=_neighbour_data(data))
    return hparams


def _neighbour_data(data: Mapping) -> str | None:
    """The whole file that is localised on; None if its records are edited: then those localised on alone may serve."""
    file = data["localization"]["file"]
    return None if file == EMBEDDED or same_data(file, data["file"]) else file


def _check(settings: Mapping) -> None:
    """Raises ValueError, naming the setting, for a value of the wrong type; Hydra's overrides are not typed."""
    kinds = {
        "seed": int,
        "shard": str,
        "on_bad_record": str,
        "out": str,
        "data.name": str,
        "data.file": str,
        "data.offset": int,
        "data.records": int | None,
        "data.localization.file": str,
        "data.localization.offset": int,
        "data.localization.size": int,
        "method.label": str,
        "method.hparams": str,
        "method.settings": dict,
        "model.file": str,
        "model.settings": dict,
        "evaluation.mode": str,
        "evaluation.batch_size": int,
        "evaluation.retention_every": int,
        "evaluation.chat_template": bool,
        "evaluation.fluency": bool,
        "evaluation.neighbours": int,
        "evaluation.contradiction": bool,
        "evaluation.perplexity": str | None,
        "evaluation.ability": list,
        "evaluation.ability_limit": int | None,
        "statistics.file": str | None,
        "statistics.samples": int,
        "statistics.length": int,
    }
    for name, kind in kinds.items():
        if name in _NEW and name.partition(".")[2] not in settings["evaluation"]:
            continue
        value: object = settings
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise ValueError(f"{name}: missing in the configuration")
            value = value[part]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(
                f"{name}: {value!r} is a {type(value).__name__}, expected {getattr(kind, '__name__', kind)}"
            )
    if settings["data"]["records"] is not None and settings["data"]["records"] < 1:
        raise ValueError(f"data.records: {settings['data']['records']} must be at least 1, or null for all")
    if settings["data"]["localization"]["size"] < 1:
        raise ValueError(f"data.localization.size: {settings['data']['localization']['size']} must be at least 1")
