"""``kne demo`` and ``kne run``: edit records with several methods through EasyEdit, and compare."""

from __future__ import annotations

from pathlib import Path

from kne_easyedit.cli.common import (
    SHIPPED,
    add_overrides,
    method_of,
    overrides_of,
    positive,
    require_folder,
    shipped,
    with_overrides,
)

DEMO_RECORDS = 8
SHOWN = 3
"""Records of a run whose answers are printed as soon as they are edited."""
MODES = ("single", "sequential", "batch")


def add_commands(commands) -> None:
    demo = commands.add_parser("demo", help="localise on packaged facts, edit others with KNE and FT, show the table")
    demo.add_argument("--records", type=positive, default=DEMO_RECORDS, help="facts to edit (default %(default)s)")
    _add_workers(demo)
    demo.add_argument(
        "--out", type=Path, default=Path("outputs/demo"), help="folder of the results (default %(default)s)"
    )
    demo.set_defaults(command=_demo)

    job = commands.add_parser("run", help="the same on a KnowEdit file and with hyperparameters of your own")
    job.add_argument("--data", required=True, help="KnowEdit file, or 'embedded'")
    job.add_argument("--records", type=positive, default=None, help="number of records (default: all)")
    job.add_argument("--offset", type=int, default=0, help="first record (default %(default)s)")
    job.add_argument(
        "--methods",
        default="KNE,FT",
        help="comma-separated: EasyEdit's names, KNE, and FT-M, FT-L, LoRA, AdaLoRA (default %(default)s)",
    )
    job.add_argument(
        "--mode",
        choices=MODES,
        default="single",
        help="single: each edit is undone before the next; sequential: edits stay, earlier facts are asked again; batch (default %(default)s)",
    )
    job.add_argument("--batch-size", type=positive, default=1, help="facts an edit in mode batch (default %(default)s)")
    job.add_argument(
        "--retention-every",
        type=positive,
        default=10,
        help="mode sequential: ask earlier facts again every so many edits (default 10)",
    )
    job.add_argument(
        "--chat-template", action="store_true", help="every prompt in the model's chat template, at edit and evaluation"
    )
    job.add_argument(
        "--stats-text",
        type=Path,
        metavar="FILE",
        help="text for MEMIT's second moments, one text a line (default: sampled from the model)",
    )
    job.add_argument(
        "--stats-samples", type=positive, default=512, help="how many texts are sampled for them (default %(default)s)"
    )
    job.add_argument(
        "--hparams",
        nargs="*",
        type=Path,
        default=[],
        metavar="FILE",
        help="YAML files, told apart by their folder's name (FT-L, AdaLoRA, ...) or alg_name (default: the shipped ones for SmolLM2)",
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
    _add_workers(job)
    job.add_argument("--again", action="store_true", help="repeat a run that is finished")
    job.add_argument(
        "--out", type=Path, default=Path("outputs/run"), help="folder of the results (default %(default)s)"
    )
    job.set_defaults(command=_run)


def _add_workers(parser) -> None:
    parser.add_argument(
        "--workers",
        type=positive,
        help="processes that edit side by side (default: one a CPU core as far as memory goes; on a GPU and in a sequence 1)",
    )


def _demo(arguments) -> int:
    require_folder(arguments.out)
    hparams, _ = _load_all(["KNE", "FT"], [])
    requests, _ = _load_records("embedded", arguments.records, hparams["KNE"].localization_size)
    return _execute(
        hparams, requests, "embedded", arguments.out, again=True, workers=arguments.workers, show=arguments.records
    )


def _run(arguments) -> int:
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
    hparams, borrowed = _load_all(methods, arguments.hparams, model)
    _override(hparams, overrides, arguments)
    from kne_easyedit.bridge import TextSource

    skip = arguments.on_bad_record == "skip"
    requests, complaints = _load_records(arguments.data, arguments.records, arguments.offset, arguments.on_bad_record)
    text_source = TextSource(arguments.stats_text, arguments.stats_samples)
    return _execute(
        hparams,
        requests,
        arguments.data,
        arguments.out,
        borrowed=borrowed,
        again=arguments.again,
        seed=arguments.seed,
        skip_bad=skip,
        complaints=complaints,
        mode=arguments.mode,
        batch_size=arguments.batch_size,
        retention_every=arguments.retention_every,
        chat_template=arguments.chat_template,
        text_source=text_source,
        workers=arguments.workers,
        show=SHOWN,
    )


def _override(hparams: dict[str, object], overrides: dict[str, object], arguments) -> None:
    """Puts in what the options say. Raises ValueError, naming the option, for what no method of the run has."""
    kne, others = {}, {}
    for name, value in overrides.items():
        method, dot, setting = name.rpartition(".")
        if not dot or method == "KNE":
            kne[setting] = value
        elif method not in hparams:
            raise ValueError(f"--set {name}: {method!r} is none of the methods {', '.join(hparams)}")
        else:
            others.setdefault(method, {})[setting] = value
    kne |= {k: v for k in ("localization_data", "localization_size") if (v := getattr(arguments, k)) is not None}
    if "KNE" in hparams:
        hparams["KNE"] = with_overrides(hparams["KNE"], kne, None, arguments.modules)
        if "device" in kne:  # one model is on one device
            for its in hparams.values():
                its.device = hparams["KNE"].device
    elif kne.keys() - {"localization_data", "localization_size"} or arguments.modules:
        option = "--modules" if arguments.modules else f"--set {min(kne)}"
        raise ValueError(
            f"{option}: is a setting of KNE's, which is none of the methods {', '.join(hparams)}; of another one say e.g. FT.lr=1e-4"
        )
    for method, settings in others.items():
        known = vars(hparams[method])
        for name, value in settings.items():
            if name not in known:
                raise ValueError(f"--set {method}.{name}: {method} has no setting {name!r}; it has {', '.join(known)}")
            try:
                setattr(hparams[method], name, _like(known[name], value))
            except TypeError as error:
                raise ValueError(f"--set {method}.{name}: {value!r} {error}, as {known[name]!r} is") from error


def _like(now, value):
    """``value`` as the type that a setting of EasyEdit's has now; its classes check nothing. Raises TypeError for another one."""
    if now is None or value is None:
        return value
    if isinstance(now, float) and _is_number(value):
        return float(value)  # YAML reads 5e-4 as a text
    if type(value) is not type(now):
        raise TypeError(f"is a {type(value).__name__}, wanted is a {type(now).__name__}")
    return [_like(now[0], item) for item in value] if isinstance(now, list) and now else value


def _is_number(value) -> bool:
    try:
        return not isinstance(value, bool) and float(value) is not None
    except (TypeError, ValueError):
        return False


def _load_all(
    methods: list[str], paths: list[Path], model: str | None = None
) -> tuple[dict[str, object], dict[str, Path]]:
    """Method -> hyperparameters, from the given files or the shipped ones; and the shipped files that serve another model than their own.

    The model is ``model``, or the one that the given files name: then the shipped files of the other methods take it (and
    its device), too. Raises ValueError if given files name different models.
    """
    from kne_easyedit import bridge

    given = {}
    for path in paths:
        method = method_of(path, methods)
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
                f"model_name: the files name different models ({shown}); one run has one model: change a file, or give --model"
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


def _load_records(data: str, size: int | None, offset: int, on_bad: str = "fail"):
    from kne_easyedit.facts.records import load_records

    return load_records(data, size, offset, on_bad=on_bad)


def _execute(
    hparams: dict[str, object],
    requests: list[dict],
    data: str,
    out: Path,
    borrowed: dict[str, Path] | None = None,
    **options,
) -> int:
    from kne_easyedit._util.workers import workers_for
    from kne_easyedit.benchmark import Run, run
    from kne_easyedit.benchmark.console import print_report
    from kne_easyedit.models.loading import load_model

    again = options.pop("again")
    loads = hparams.get("KNE") or next(iter(hparams.values()))  # other methods' settings say nothing of half precision
    for step in _steps(hparams, len(requests), data, out):
        print(step, flush=True)
    model, tokenizer = load_model(loads)
    for method, file in (borrowed or {}).items():
        _require_modules(method, hparams[method], file, model)
    if options["workers"] is None:
        edits = -(-len(requests) // options.get("batch_size", 1))
        options["workers"] = 1 if options.get("mode") == "sequential" else workers_for(model, edits)
    summary = run(Run(model, tokenizer, requests, hparams, data, out, **options), again=again)
    print_report(summary, out)
    return 0


def _steps(hparams: dict[str, object], records: int, data: str, out: Path) -> list[str]:
    """What the run is going to do, and how long it may take: seconds are SmolLM2's on two CPU cores (docs/performance.md)."""
    facts = {
        m: h.localization_size
        for m, h in hparams.items()
        if h.alg_name == "KNE" and h.ensemble is None and h.localization_data is not None
    }
    steps = [
        f"load {next(iter(hparams.values())).model_name} (SmolLM2: converted at first use, about 20 s; a large model: minutes)"
    ]
    steps += [
        f"{method}: localise on {n} facts, those in the cache apart (SmolLM2 on 2 CPU cores: 1 to 4 s each)"
        for method, n in facts.items()
    ]
    steps.append(
        f"edit and evaluate {records} records of {data} by {', '.join(hparams)} (there about 10 to 60 s for a record and method)"
    )
    steps.append(f"write tables and pictures to {out}; interrupted, the same command goes on where it stopped")
    return [f"step {i} of {len(steps)}: {step}" for i, step in enumerate(steps, start=1)]


def _require_modules(method: str, hparams, file: Path, model) -> None:
    """Raises ValueError if a shipped file, made for another model, names layers or modules that this one lacks."""
    from kne_easyedit.doctor.findings import OK
    from kne_easyedit.doctor.modules import modules

    for finding in modules({method: hparams}, model):
        if finding.status != OK:
            raise ValueError(
                f"{method}: the shipped {file} does not fit this model: {finding.text}; give a file for it (--hparams), "
                f"change single settings (--set {method}.NAME=VALUE), or leave the method out"
            )
