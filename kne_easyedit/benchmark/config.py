"""From the configuration of scripts/run_benchmark.py to a run: one method on one part of one data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kne_easyedit import bridge
from kne_easyedit.benchmark.job import Run
from kne_easyedit.bridge import statistics
from kne_easyedit.bridge.registry import NAME as KNE
from kne_easyedit.digest import digest
from kne_easyedit.hparams import EVALUATORS, changed
from kne_easyedit.models import load_model
from kne_easyedit.records import load_records, load_requests


def job_folder(settings: Mapping) -> Path:
    """Where a job's files lie: told by what it is, so that the same job finds them again."""
    i, n = shard_of(settings["shard"])
    model, data, method = settings["model"]["file"], settings["data"]["name"], settings["method"]["label"]
    overrides = {**settings["model"]["settings"], **settings["method"]["settings"]}
    name = f"{method}-{digest(overrides)[:6]}" if overrides else method  # so that a sweep's jobs keep apart
    return Path(settings["out"]) / model / data / name / f"seed-{settings['seed']}" / f"shard-{i}-of-{n}"


def shard_of(text: str) -> tuple[int, int]:
    """``"i/n"`` as numbers. Raises ValueError for anything else."""
    i, slash, n = str(text).partition("/")
    if not slash or not i.isdigit() or not n.isdigit() or not int(i) < int(n):
        raise ValueError(f"shard: {text!r} is no part i/n with i from 0 to n - 1")
    return int(i), int(n)


def job_of(settings: Mapping, hparams_folder: Path) -> Run:
    """The run that the configuration describes, its model loaded. Raises ValueError, FileNotFoundError before that."""
    bridge.register()
    method, data, evaluation = settings["method"], settings["data"], settings["evaluation"]
    path = hparams_folder / method["hparams"] / f"{settings['model']['file']}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"method.hparams: {path} does not exist; {method['hparams']} has no file for {settings['model']['file']}")
    hparams = bridge.load_method(method["hparams"], path)
    overrides = {**settings["model"]["settings"], **method["settings"]}
    known = vars(hparams)
    for name in overrides:
        if name not in known and name not in EVALUATORS:
            raise ValueError(f"method.settings: {method['hparams']} has no setting {name!r}; it has {', '.join(known)}")
    if hparams.alg_name == KNE:
        localization = data["localization"]
        found = {"localization_data": localization["file"], "localization_size": localization["size"], "localization_offset": localization["offset"]}
        overrides = {**found, **overrides}
    hparams = changed(hparams, **overrides)
    i, n = shard_of(settings["shard"])
    requests, complaints = load_records(data["file"], data["records"], data["offset"], on_bad=settings["on_bad_record"])
    statistics.configure(**settings["statistics"])
    moment_prompts = None
    if statistics.needs_moments(hparams):
        # Text for second moments is sampled after facts that are not edited: dense in it, the edited subjects would resist.
        apart = data["localization"]
        moment_prompts = [request["prompt"] for request in load_requests(apart["file"], apart["size"], apart["offset"])]
    model, tokenizer = load_model(hparams)
    return Run(
        model, tokenizer, requests[i::n], {method["label"]: hparams}, str(data["file"]), job_folder(settings),
        seed=settings["seed"], skip_bad=settings["on_bad_record"] == "skip", complaints=complaints,
        before_folder=Path(settings["out"]) / "before", moment_prompts=moment_prompts, **evaluation,
    )  # fmt: skip
