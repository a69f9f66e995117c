"""What `kne demo` and `kne run` share: hyperparameters of several methods for one model, the run, its report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kne_easyedit import bridge
from kne_easyedit._util.workers import workers_for
from kne_easyedit.benchmark import Run, run
from kne_easyedit.benchmark.console import print_report
from kne_easyedit.bridge.together import require_together
from kne_easyedit.cli.common import SHIPPED, method_of, positive, shipped
from kne_easyedit.doctor.findings import FAILURE, OK
from kne_easyedit.doctor.modules import modules
from kne_easyedit.models.loading import load_model


def add_workers(parser: argparse.ArgumentParser) -> None:
    """``--workers``."""
    parser.add_argument(
        "--workers",
        type=positive,
        help="processes that edit side by side "
        "(default: one per CPU core as far as memory goes; on a GPU and in a sequence 1)",
    )


def load_all(
    methods: Sequence[str], paths: Sequence[Path], model: str | None = None
) -> tuple[dict[str, Any], dict[str, Path]]:
    """The hyperparameters of some methods, all for one model.

    Args:
        methods: Their labels.
        paths: Hyperparameter files, of any of the methods; the shipped ones serve the others.
        model: Overrides ``model_name`` of all files. None: the model that the given files name; the shipped files of
            the other methods then take it and its device, too.

    Returns:
        Label -> hyperparameters; and label -> file, of shipped files that serve another model than their own.

    Raises:
        ValueError: For files of no method or of one twice, that no method's class takes, or that name different models.
        FileNotFoundError: If a file does not exist.
    """
    given: dict[str, Path] = {}
    for path in paths:
        method = method_of(path, methods) or ""
        if method in given:
            raise ValueError(f"hparams: {path} is the second file of {method}; one run has one of each method")
        given[method] = path
    unused = set(given) - set(methods)
    if unused:
        raise ValueError(f"hparams: {given[unused.pop()]} is of none of the methods {', '.join(methods)}")
    files = {method: given.get(method, shipped() / method / f"{SHIPPED}.yaml") for method in methods}
    loaded = {}
    for method, path in files.items():
        bridge.require_method(method)
        if not path.is_file():
            raise FileNotFoundError(f"hparams: no file is shipped for {method}; give one with --hparams")
        try:
            loaded[method] = bridge.load_method(method, path)
        except TypeError as error:  # a setting that EasyEdit's class does not know, or one that is missing
            raise ValueError(f"hparams: {path}: {error}") from error
    if model is None:
        named = {str(loaded[method].model_name): path for method, path in given.items()}
        if len(named) > 1:
            shown = "; ".join(f"{path} has {name}" for name, path in named.items())
            raise ValueError(
                f"model_name: the files name different models ({shown}); "
                f"one run has one model: change a file, or give --model"
            )
        model = next(iter(named), None)
    borrowed = {}
    for method, hparams in loaded.items():
        if model is not None and str(hparams.model_name) != model:
            hparams.model_name = model
            if method not in given:
                borrowed[method] = files[method]
                if given:
                    hparams.device = loaded[next(iter(given))].device
    return loaded, borrowed


def execute(
    hparams: dict[str, Any],
    requests: Sequence[dict],
    data: str,
    out: Path,
    *,
    again: bool,
    borrowed: Mapping[str, Path] | None = None,
    neighbours_of: str | None = None,
    **settings: Any,
) -> int:
    """Loads the model, runs, and prints the report.

    Args:
        hparams: Label -> hyperparameters.
        requests: The records.
        data: The file that they are of.
        out: The folder of the results.
        again: Whether a finished run is repeated.
        borrowed: Label -> the shipped file of another model that serves it.
        neighbours_of: The prompt of the record whose neighbours are shown; None: the first that has some.
        settings: Further settings of the `Run`. ``workers`` None: as many as fit.

    Returns:
        The exit code.
    """
    require_together(hparams, settings.get("mode", "single"), settings.get("chat_template", False))
    loads = hparams.get("KNE") or next(iter(hparams.values()))  # other methods' settings say nothing of half precision
    for step in _steps(hparams, len(requests), data, out):
        print(step, flush=True)
    model, tokenizer = load_model(loads)
    for method, its in hparams.items():
        _require_modules(method, its, (borrowed or {}).get(method), model)
    if settings["workers"] is None:
        edits = -(-len(requests) // settings.get("batch_size", 1))
        settings["workers"] = 1 if settings.get("mode") == "sequential" else workers_for(model, edits)
    summary = run(Run(model, tokenizer, requests, hparams, data, out, **settings), again=again)
    print_report(summary, out, neighbours_of=neighbours_of)
    return 0


def _steps(hparams: Mapping[str, Any], records: int, data: str, out: Path) -> list[str]:
    """What the run will do, and how long it may take: seconds are SmolLM2's on two CPU cores (docs/performance.md)."""
    facts = {
        m: h.localization_size
        for m, h in hparams.items()
        if h.alg_name == "KNE" and h.ensemble is None and h.localization_data is not None
    }
    steps = [
        f"load {next(iter(hparams.values())).model_name} "
        f"(SmolLM2: converted at first use, about 20 s; a large model: minutes)"
    ]
    steps += [
        f"{method}: localise on {n} facts, those in the cache apart (SmolLM2 on 2 CPU cores: 1 to 4 s each)"
        for method, n in facts.items()
    ]
    steps.append(
        f"edit and evaluate {records} records of {data} by {', '.join(hparams)} "
        f"(there about 10 to 60 s for a record and method)"
    )
    steps.append(f"write tables and pictures to {out}; interrupted, the same command resumes")
    return [f"step {i} of {len(steps)}: {step}" for i, step in enumerate(steps, start=1)]


def _require_modules(method: str, hparams: Any, borrowed: Path | None, model: nn.Module) -> None:
    """Raises ValueError if settings name layers or modules that the model lacks: no record is at fault then.

    ``borrowed``: the shipped file of another model that they are of, if they are.
    """
    for finding in modules({method: hparams}, model):
        if finding.status == FAILURE or (borrowed and finding.status != OK):
            file = f"the shipped {borrowed} does not fit this model: " if borrowed else ""
            way_out = "give a file for it (--hparams), change" if borrowed else "correct its file (--hparams), or"
            raise ValueError(
                f"{method}: {file}{finding.text}; {way_out} single settings (--set {method}.NAME=VALUE), "
                f"or leave the method out"
            )
