"""``kne run``: edit records with several methods through EasyEdit, and compare."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from kne_easyedit._util.settings import typed_value
from kne_easyedit.benchmark import MODES, Run
from kne_easyedit.bridge import TextSource
from kne_easyedit.cli.common import add_general, add_overrides, overrides_of, positive, require_folder, with_overrides
from kne_easyedit.cli.comparison import add_workers, execute, load_all
from kne_easyedit.facts.records import load_records

SHOWN = 3
"""Records of a run whose answers are printed as soon as they are edited."""

_OF_THE_RUN = {
    "model_name": "say --model NAME",
    "device": "say --set device=...",
    "alg_name": "--methods names the methods, --hparams their files",
}
"""Settings that no method has for itself, and how they are given."""


def add_commands(commands: Any) -> None:
    """Adds the command to the parser's subcommands. Options for optional settings of a `Run` bear their names."""
    job = commands.add_parser(
        "run", help="edit the records of a data file with several methods, evaluate, write tables"
    )
    job.add_argument("--data", required=True, help="data file, or 'embedded'")
    job.add_argument("--records", type=positive, default=None, help="number of records (default: all)")
    job.add_argument("--offset", type=int, default=0, help="first record (default %(default)s)")
    job.add_argument(
        "--methods",
        default="KNE,FT",
        help="comma-separated: EasyEdit's names, KNE, and FT-L, LoRA, AdaLoRA (default %(default)s)",
    )
    job.add_argument(
        "--mode",
        choices=MODES,
        default="single",
        help="single: each edit is undone before the next; "
        "sequential: edits stay, facts edited earlier are evaluated again; "
        "batch (default %(default)s)",
    )
    job.add_argument(
        "--batch-size", type=positive, default=1, help="facts per edit in mode batch (default %(default)s)"
    )
    job.add_argument(
        "--retention-every",
        type=positive,
        default=10,
        help="mode sequential: edits after which earlier facts are evaluated again (default %(default)s)",
    )
    job.add_argument(
        "--neighbours",
        type=int,
        default=8,
        metavar="N",
        help="prompts about other subjects asked of each record, to see what else an edit changes; "
        "0: none (default %(default)s)",
    )
    job.add_argument(
        "--contradiction", action="store_true", help="also ask the edited model whether the new fact is not true"
    )
    add_general(job)
    job.add_argument(
        "--chat-template", action="store_true", help="every prompt in the model's chat template, at edit and evaluation"
    )
    job.add_argument(
        "--stats-text",
        type=Path,
        metavar="FILE",
        help="text for MEMIT's second moments, one text per line (default: sampled from the model)",
    )
    job.add_argument(
        "--stats-samples", type=positive, default=512, help="how many texts are sampled for them (default %(default)s)"
    )
    job.add_argument(
        "--hparams",
        nargs="*",
        action="extend",
        type=Path,
        default=[],
        metavar="FILE",
        help="YAML files, told apart by their folder's name (FT-L, AdaLoRA, ...) or alg_name "
        "(default: the shipped ones for SmolLM2)",
    )
    add_overrides(
        job, "overrides any other setting of KNE's, e.g. p=0.02, or of another method: FT.lr=1e-4, AdaLoRA.rank=4"
    )
    job.add_argument("--localization-data", help="overrides the setting of KNE's file")
    job.add_argument("--localization-size", type=positive, help="overrides the setting of KNE's file")
    job.add_argument(
        "--on-bad-record",
        choices=("fail", "skip"),
        default="fail",
        help="default %(default)s; skipped ones are listed at the end",
    )
    job.add_argument("--seed", type=int, default=42, help="default %(default)s")
    add_workers(job)
    job.add_argument("--again", action="store_true", help="repeat a run that is finished")
    job.add_argument(
        "--out", type=Path, default=Path("outputs/run"), help="folder of the results (default %(default)s)"
    )
    job.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    if not methods:
        raise ValueError(f"methods: {arguments.methods!r} names none")
    if twice := {name for name in methods if methods.count(name) > 1}:
        raise ValueError(f"methods: {min(twice)} is named twice; one run has each method once")
    require_folder(arguments.out)
    overrides = overrides_of(arguments.set)
    model = overrides.pop("model_name", None) if arguments.model is None else arguments.model
    if model is not None and (not isinstance(model, str) or not model.strip()):
        raise ValueError(f"--model: {model!r} names no model")
    hparams, borrowed = load_all(methods, arguments.hparams, model)
    _override(hparams, overrides, arguments)
    requests, complaints = load_records(
        arguments.data, arguments.records, arguments.offset, on_bad=arguments.on_bad_record
    )
    optional = {field.name for field in fields(Run) if field.default is not MISSING}
    return execute(
        hparams,
        requests,
        arguments.data,
        arguments.out,
        borrowed=borrowed,
        again=arguments.again,
        skip_bad=arguments.on_bad_record == "skip",
        complaints=complaints,
        text_source=TextSource(arguments.stats_text, arguments.stats_samples),
        show=SHOWN,
        **{name: value for name, value in vars(arguments).items() if name in optional},
    )


def _override(hparams: dict[str, Any], overrides: dict[str, object], arguments: argparse.Namespace) -> None:
    """Changes settings as the options say. Raises ValueError, naming the option, for a setting that no method has."""
    kne: dict[str, object] = {}
    others: dict[str, dict[str, object]] = {}
    for name, value in overrides.items():
        method, dot, setting = name.rpartition(".")
        if dot and setting in _OF_THE_RUN:
            raise ValueError(f"--set {name}: one run has one model on one device; {_OF_THE_RUN[setting]}")
        if not dot or method == "KNE":
            kne[setting] = value
        elif method not in hparams:
            raise ValueError(f"--set {name}: {method!r} is none of the methods {', '.join(hparams)}")
        else:
            others.setdefault(method, {})[setting] = value
    kne |= {k: v for k in ("localization_data", "localization_size") if (v := getattr(arguments, k)) is not None}
    if "KNE" in hparams:
        hparams["KNE"] = with_overrides(hparams["KNE"], kne, None, arguments.modules)
    elif (own := kne.keys() - {"device", "localization_data", "localization_size"}) or arguments.modules:
        option = "--modules" if arguments.modules else f"--set {min(own)}"
        raise ValueError(
            f"{option}: is a setting of KNE's, which is none of the methods {', '.join(hparams)}; "
            f"of another one say e.g. FT.lr=1e-4"
        )
    if "device" in kne:  # one model is on one device
        for its in hparams.values():
            its.device = hparams["KNE"].device if "KNE" in hparams else kne["device"]
    for method, settings in others.items():
        known = vars(hparams[method])
        for name, value in settings.items():
            if name not in known:
                raise ValueError(f"--set {method}.{name}: {method} has no setting {name!r}; it has {', '.join(known)}")
            try:
                setattr(hparams[method], name, typed_value(hparams[method], name, value))
            except TypeError as error:
                raise ValueError(f"--set {method}.{name}: {value!r} {error}, as {known[name]!r} is") from error
