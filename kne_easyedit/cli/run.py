"""``kne demo`` and ``kne run``: edit records with several methods through EasyEdit, and compare."""

from __future__ import annotations

from pathlib import Path

from kne_easyedit.cli.common import SHIPPED, method_of, positive, shipped
from kne_easyedit.hparams import changed

DEMO_RECORDS = 8
MODES = ("single", "sequential", "batch")


def add_commands(commands) -> None:
    demo = commands.add_parser("demo", help="localise on packaged facts, edit others with KNE and FT, show the table")
    demo.add_argument("--records", type=positive, default=DEMO_RECORDS, help="facts to edit (default %(default)s)")
    demo.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder of the results (default %(default)s)")
    demo.set_defaults(command=_demo)

    job = commands.add_parser("run", help="the same on a KnowEdit file and with hyperparameters of your own")
    job.add_argument("--data", required=True, help="KnowEdit file, or 'embedded'")
    job.add_argument("--records", type=positive, default=None, help="number of records (default: all)")
    job.add_argument("--offset", type=int, default=0, help="first record (default %(default)s)")
    job.add_argument(
        "--methods", default="KNE,FT", help="comma-separated: EasyEdit's names, KNE, and FT-M, FT-L, LoRA, AdaLoRA (default %(default)s)"
    )
    job.add_argument(
        "--mode",
        choices=MODES,
        default="single",
        help="single: each edit is undone before the next; sequential: edits stay, earlier facts are asked again; batch (default %(default)s)",
    )
    job.add_argument("--batch-size", type=positive, default=1, help="facts an edit in mode batch (default %(default)s)")
    job.add_argument("--retention-every", type=positive, default=10, help="mode sequential: ask earlier facts again every so many edits (default 10)")
    job.add_argument("--chat-template", action="store_true", help="every prompt in the model's chat template, at edit and evaluation")
    job.add_argument("--stats-text", type=Path, metavar="FILE", help="text for MEMIT's second moments, one text a line (default: sampled from the model)")
    job.add_argument("--stats-samples", type=positive, default=512, help="how many texts are sampled for them (default %(default)s)")
    job.add_argument(
        "--hparams",
        nargs="*",
        type=Path,
        default=[],
        metavar="FILE",
        help="YAML files, told apart by their folder's name (FT-L, AdaLoRA, ...) or alg_name (default: the shipped ones for SmolLM2)",
    )
    job.add_argument("--localization-data", help="overrides the setting of KNE's file")
    job.add_argument("--localization-size", type=positive, help="overrides the setting of KNE's file")
    job.add_argument(
        "--on-bad-record", choices=("fail", "skip"), default="fail", help="default %(default)s; skipped ones are listed at the end"
    )
    job.add_argument("--seed", type=int, default=42, help="default %(default)s")
    job.add_argument("--again", action="store_true", help="repeat a run that is finished")
    job.add_argument("--out", type=Path, default=Path("outputs/run"), help="folder of the results (default %(default)s)")
    job.set_defaults(command=_run)


def _demo(arguments) -> int:
    hparams = _load_all(["KNE", "FT"], [])
    requests, _ = _load_records("embedded", arguments.records, hparams["KNE"].localization_size)
    return _execute(hparams, requests, "embedded", arguments.out, again=True)


def _run(arguments) -> int:
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    if not methods:
        raise ValueError(f"methods: {arguments.methods!r} names none")
    hparams = _load_all(methods, arguments.hparams)
    overrides = {k: v for k in ("localization_data", "localization_size") if (v := getattr(arguments, k)) is not None}
    if overrides and "KNE" in hparams:
        hparams["KNE"] = changed(hparams["KNE"], **overrides)
    from kne_easyedit.bridge import statistics

    skip = arguments.on_bad_record == "skip"
    requests, complaints = _load_records(arguments.data, arguments.records, arguments.offset, arguments.on_bad_record)
    statistics.configure(file=arguments.stats_text, samples=arguments.stats_samples)
    return _execute(
        hparams, requests, arguments.data, arguments.out, again=arguments.again, seed=arguments.seed, skip_bad=skip, complaints=complaints,
        mode=arguments.mode, batch_size=arguments.batch_size, retention_every=arguments.retention_every, chat_template=arguments.chat_template,
    )  # fmt: skip


def _load_all(methods: list[str], paths: list[Path]) -> dict[str, object]:
    """Method -> hyperparameters, from the given files or the shipped ones."""
    from kne_easyedit import bridge

    given = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"hparams file {path} does not exist; shipped ones are under {shipped()}")
        given[method_of(path, methods)] = path
    unused = set(given) - set(methods)
    if unused:
        raise ValueError(f"hparams: {given[unused.pop()]} is of none of the methods {', '.join(methods)}")
    loaded = {}
    for method in methods:
        bridge.demand_method(method)
        path = given.get(method, shipped() / method / f"{SHIPPED}.yaml")
        if not path.is_file():
            raise FileNotFoundError(f"hparams: no file is shipped for {method}; give one with --hparams")
        loaded[method] = bridge.load_method(method, path)
    names = {str(h.model_name) for h in loaded.values()}
    if len(names) > 1:
        raise ValueError(f"model_name: the files name different models: {', '.join(sorted(names))}; one run has one model")
    return loaded


def _load_records(data: str, size: int | None, offset: int, on_bad: str = "fail"):
    from kne_easyedit.records import load_records

    return load_records(data, size, offset, on_bad=on_bad)


def _execute(hparams: dict[str, object], requests: list[dict], data: str, out: Path, **options) -> int:
    from kne_easyedit.benchmark import Run, run
    from kne_easyedit.models import load_model
    from kne_easyedit.report import print_report

    again = options.pop("again")
    any_hparams = next(iter(hparams.values()))
    print(f"model {any_hparams.model_name}, {len(requests)} records of {data}, methods {', '.join(hparams)}", flush=True)
    model, tokenizer = load_model(any_hparams)
    summary = run(Run(model, tokenizer, requests, hparams, data, out, **options), again=again)
    print_report(summary, out)
    return 0
