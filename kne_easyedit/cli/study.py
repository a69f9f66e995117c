"""``kne study``: the paper's studies as sweeps of the one benchmark engine, each from one command."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import yaml

from kne_easyedit._util.errors import RunStopped
from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.markdown import markdown_table
from kne_easyedit._util.messages import printable
from kne_easyedit._util.settings import EVALUATORS
from kne_easyedit.cli.common import (
    add_general,
    add_settings_of_model,
    load_settings,
    of_the_paper,
    overrides_of,
    positive,
    require_folder,
    shipped,
)
from kne_easyedit.facts.records import EMBEDDED
from kne_easyedit.studies.definitions import STUDIES
from kne_easyedit.studies.points import Plan

if TYPE_CHECKING:
    from kne_easyedit.localization.ensemble import NeuronEnsemble

RECORDS = 40
DRAWS = 20
"""Of facts, where only ensembles are compared."""
_ELSEWHERE = {"alg_name", "model_name", "localization_data", "localization_size", "localization_offset"}
_ELSEWHERE |= {"device", "model_parallel", "max_memory", "offload_folder", "cache_dir", "chunk_rows"}
"""Settings that stand elsewhere in a job's configuration, or change no result."""
TIMES = "times.jsonl"
"""In the study's folder: how long each job took, for estimates."""


def add_commands(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser(
        "study",
        help="a study of the paper as curves: where knowledge sits, how many facts, how many rows, how many edits",
    )
    parser.add_argument("study", choices=STUDIES, help="; ".join(f"{s.name}: {s.title}" for s in STUDIES.values()))
    parser.add_argument(
        "--data",
        default="embedded",
        help="a data set of hparams/benchmark/data (counterfact, zsre, recent: below $KNOWEDIT), 'embedded', or a data "
        "file (default %(default)s)",
    )
    parser.add_argument("--records", type=positive, default=RECORDS, help="records a point (default %(default)s)")
    parser.add_argument("--offset", type=int, help="first record (default: that of the data set, 0 of a file)")
    parser.add_argument("--localization-data", help="facts to localise on (default: the data set's, or the settings')")
    parser.add_argument("--localization-size", type=positive, help="how many of them, in studies that do not sweep it")
    parser.add_argument("--values", help="comma-separated values of the axis (default: the paper's)")
    parser.add_argument(
        "--series",
        help="comma-separated series, of "
        + "; ".join(f"{s.name}: {', '.join(s.series)}" for s in STUDIES.values() if len(s.series) > 1)
        + " (default: all of the study)",
    )
    parser.add_argument("--draws", type=positive, help="draws of facts (facts: 3) or of random rows (share: 1)")
    parser.add_argument(
        "--ensembles-only",
        action="store_true",
        help="facts: find the ensembles of many draws (default 20) and compare them; nothing is edited",
    )
    parser.add_argument("--sequences", help="batch: comma-separated numbers of edits one after the other")
    add_settings_of_model(parser)
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the paper's settings (hparams/benchmark/method/kne.yaml) over those of the file; labels begin with "
        "KNE-paper",
    )
    parser.add_argument("--label", help="what the labels begin with (default: KNE)")
    parser.add_argument("--neighbours", type=int, default=8, metavar="N", help="as in kne run (default %(default)s)")
    add_general(parser)
    parser.add_argument("--no-fluency", action="store_true", help="sample no text: about half the time")
    parser.add_argument("--seed", type=int, default=42, help="default %(default)s")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th record from the i-th on (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print jobs, folders and hours; run nothing")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/study"), help="folder of the results (default %(default)s)"
    )
    parser.set_defaults(command=_study)


def _study(arguments: argparse.Namespace) -> int:
    from kne_easyedit.studies.plan import plan_for

    require_folder(arguments.out)
    folder = arguments.out / "settings"
    with tempfile.TemporaryDirectory() as temporary:
        planned = Path(temporary)
        settings = _configuration(arguments, planned)
        values, sequences, series = (
            None if text is None else [part.strip() for part in text.split(",")]
            for text in (arguments.values, arguments.sequences, arguments.series)
        )
        if arguments.ensembles_only and arguments.study != "facts":
            raise ValueError(f"--ensembles-only: belongs to the study facts, not to {arguments.study}")
        draws = arguments.draws or (DRAWS if arguments.ensembles_only else None)
        plan = plan_for(settings, planned, arguments.study, values, draws, sequences, series)
        jobs = [point.configured(settings) for point in plan.points]
        if not arguments.ensembles_only:
            _print_plan(plan, jobs, arguments.out)
        if not arguments.dry_run:  # kept with the results; a command that is refused replaces none
            for file in planned.rglob("*.yaml"):
                atomic_write(folder / file.relative_to(planned), file.read_bytes())
    if arguments.ensembles_only:
        return _compare_ensembles(plan, jobs, folder, arguments)
    return 0 if arguments.dry_run else _run_all(jobs, folder, arguments.out)


def _compare_ensembles(
    plan: Plan, jobs: Sequence[Mapping[str, Any]], folder: Path, arguments: argparse.Namespace
) -> int:
    """The overlaps of the ensembles of all points, without any edit. Returns the exit code."""
    from kne_easyedit.studies.ensembles import find_ensembles, overlap_table, overlaps, publish_overlaps

    drawn: dict[str, int] = {}
    facts: set[int] = set()
    for point in plan.points:
        first, n = (point.settings[f"localization_{name}"] for name in ("offset", "size"))
        drawn[point.place.value] = drawn.get(point.place.value, 0) + 1
        facts |= {*range(first, first + n)}
    print(f"{len(jobs)} ensembles, {len(facts)} different facts; those in the score cache take no time")
    print("\n".join(f"  {value:>4} facts: {n} draws" for value, n in drawn.items()))
    for reason in plan.left_out:
        print(f"left out: {reason}")
    if arguments.dry_run:
        return 0

    numbers = count(1)

    def on_found(label: str, ensemble: NeuronEnsemble) -> None:
        print(f"{next(numbers)} of {len(jobs)}: {label}, {ensemble.size} rows", flush=True)
        ensemble.save(arguments.out / "ensembles" / f"{label}.json")

    found = overlaps(find_ensembles(jobs, folder, on_found))
    job = jobs[0]
    facts_of = Path(job["data"]["localization"]["file"]).name
    of = f"{plan.points[0].place.method} on {job['model']['file']}, facts of {facts_of}"
    page = publish_overlaps(found, of, arguments.out / "report")
    print(f"\n{overlap_table(found)}\n\nWritten to {arguments.out}: ensembles, {page.relative_to(arguments.out)}")
    return 0


def _configuration(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The configuration of the benchmark that the points change, and in ``folder`` the file of hyperparameters."""
    overrides = overrides_of(arguments.set)
    model_name = overrides.pop("model_name", None) if arguments.model is None else arguments.model
    hparams = load_settings(argparse.Namespace(**{**vars(arguments), "set": [], "modules": None, "model": model_name}))
    model = Path(str(hparams.model_name)).name
    file = folder / "KNE" / f"{model}.yaml"
    content = {name: value for name, value in hparams.to_dict().items() if name not in EVALUATORS}
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, yaml.safe_dump(content, sort_keys=False))
    # A file of one's own is in the folders' names by what it says: points of two files are no points of one study.
    own = {} if arguments.hparams is None else {name: its for name, its in content.items() if name not in _ELSEWHERE}
    paper = of_the_paper() if arguments.paper else {}
    modules = {"target_modules": arguments.modules} if arguments.modules else {}
    where = {name: overrides.pop(f"localization_{name}", None) for name in ("data", "size", "offset")}
    where = {
        "file": arguments.localization_data or where["data"],
        "size": arguments.localization_size or where["size"],
        "offset": where["offset"],
    }
    data_sets = [path.stem for path in (shipped() / "benchmark" / "data").glob("*.yaml")]
    composed = _composed(arguments.data if arguments.data in data_sets else EMBEDDED)
    settings = {name: composed[name] for name in ("on_bad_record", "evaluation", "statistics")}
    settings["evaluation"] |= {
        "fluency": not arguments.no_fluency,
        "neighbours": arguments.neighbours,
        "perplexity": None if arguments.perplexity is None else str(arguments.perplexity),
        "ability": list(arguments.ability),
        "ability_limit": arguments.ability_limit,
    }
    data = _data(arguments, composed["data"] if arguments.data in data_sets else _of_file(arguments.data, hparams))
    data["localization"] |= {name: value for name, value in where.items() if value is not None}
    if where["file"] is not None and where["offset"] is None:
        data["localization"]["offset"] = 0
    return {
        **settings,
        "seed": arguments.seed,
        "shard": arguments.shard,
        "out": str(arguments.out),
        "model": {"file": model, "settings": {}},
        "data": data,
        "method": {
            "label": arguments.label or ("KNE-paper" if arguments.paper else "KNE"),
            "hparams": "KNE",
            "settings": {**own, **paper, **modules, **overrides},
        },
    }


def _composed(data: str) -> dict[str, Any]:
    """The benchmark's configuration for one of its data sets, as Hydra composes it for scripts/run_benchmark.py."""
    try:
        from hydra import compose, initialize_config_dir
        from omegaconf import OmegaConf
    except ImportError as error:
        raise ImportError("kne study needs hydra-core: pip install 'kne_easyedit[easyedit]'") from error
    with initialize_config_dir(str(shipped()), version_base="1.3"):
        config = compose("benchmark", overrides=[f"benchmark/data@data={data}"])
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))  # the configuration is a mapping


def _of_file(file: str, hparams: Any) -> dict[str, Any]:
    """The part ``data`` of the configuration for a data file; what is localised on is the settings' own."""
    return {
        "name": Path(file).stem,
        "file": file,
        "offset": 0,
        "localization": {
            "file": hparams.localization_data or EMBEDDED,
            "offset": hparams.localization_offset,
            "size": hparams.localization_size,
        },
    }


def _data(arguments: argparse.Namespace, data: Mapping[str, Any]) -> dict[str, Any]:
    """The part ``data`` with the options' number of records and first record."""
    return {
        **data,
        "records": min(arguments.records, data.get("records") or arguments.records),
        "offset": data["offset"] if arguments.offset is None else arguments.offset,
    }


def _print_plan(plan: Plan, jobs: Sequence[Mapping[str, Any]], out: Path) -> None:
    """The jobs with their records and folders, what is left out, and how long it may take."""
    from kne_easyedit.benchmark.config import job_folder

    study = plan.study
    print(f"{study.title} (section {study.section} of the paper): {len(jobs)} points")
    width = max(len(job["method"]["label"]) for job in jobs)
    left = 0
    for job in jobs:
        wanted, done = _wanted(job), _done(job)
        left += max(0, wanted - done)
        print(
            f"  {job['method']['label']:<{width}}  {wanted:>4} records, {min(done, wanted):>4} done  {job_folder(job)}"
        )
    for reason in plan.left_out:
        print(f"left out: {reason}")
    print(_estimate(out, jobs, left), flush=True)


def _wanted(job: Mapping[str, Any]) -> int:
    """How many records of the job this shard edits, bad ones included."""
    from kne_easyedit.benchmark.config import shard_of
    from kne_easyedit.facts.readers import read_records

    i, n = shard_of(job["shard"])
    data = job["data"]
    return len(range(i, min(data["records"], len(read_records(data["file"])) - data["offset"]), n))


def _lines(job: Mapping[str, Any]) -> list[dict]:
    from kne_easyedit.benchmark.config import job_folder
    from kne_easyedit.benchmark.store import read_lines

    return [line for _, line in read_lines(job_folder(job) / "results.jsonl")]


def _done(job: Mapping[str, Any]) -> int:
    return len({line.get("index") for line in _lines(job)})


def _estimate(out: Path, jobs: Sequence[Mapping[str, Any]], left: int) -> str:
    """Hours for the edits that are left, as far as earlier lines tell."""
    from kne_easyedit.benchmark.store import read_lines

    times = [(its["records"], its["seconds"]) for _, its in read_lines(out / TIMES)]
    edits = sum(records for records, _ in times)
    if not left:
        return "all edits are made; what is there is read again"
    if edits:
        hours = sum(seconds for _, seconds in times) / edits * left / 3600
        return f"{left} edits are left: about {hours:.1f} h, by the {edits} that were made here, evaluation included"
    seconds = [line["seconds"] for job in jobs for line in _lines(job) if line.get("seconds")]
    if seconds:
        return (
            f"{left} edits are left: about {median(seconds) * left / 3600:.1f} h of editing, by {len(seconds)} earlier "
            f"lines; evaluation and localisation come on top, nobody has measured them here"
        )
    return f"{left} edits are left; how long they take is unknown until the first points are there"


def _run_all(jobs: Sequence[Mapping[str, Any]], folder: Path, out: Path) -> int:
    """Runs the jobs one after the other with one loaded model. Returns the exit code."""
    from kne_easyedit.benchmark import run
    from kne_easyedit.benchmark.config import job_of
    from kne_easyedit.metrics import run_columns

    loaded, code = None, 0
    found: dict[str, dict[str, Any]] = {}
    for number, settings in enumerate(jobs, start=1):
        label = settings["method"]["label"]
        print(f"\npoint {number} of {len(jobs)}: {label}", flush=True)
        start, done = time.perf_counter(), _done(settings)
        job = job_of(settings, folder, loaded)
        loaded = (job.model, job.tokenizer)
        try:
            summary = run(job)
        except RunStopped as error:
            print(f"{label}: {error}", flush=True)
            loaded, code = None, 1
            continue
        finally:
            _note(out / TIMES, label, _done(settings) - done, time.perf_counter() - start)
        found |= {name: {**its, **(its.get("retention") or [{}])[-1]} for name, its in summary["methods"].items()}
        for complaint in summary["skipped"]:
            print(f"skipped: {printable(complaint)}")
    if found:
        print(f"\n{markdown_table(found, [metric.key for metric in run_columns(*found.values())])}")
    print(f"\nWritten to {out}; curves and what was found: kne report --study {out}")
    return code


def _note(path: Path, label: str, records: int, seconds: float) -> None:
    """Adds a line for the estimates of later runs, if anything was edited."""
    if records > 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"label": label, "records": records, "seconds": round(seconds, 2)}) + "\n")
