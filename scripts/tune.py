"""Tunes methods on train records: one rule and one budget for all of them, hparams/tuning.yaml.

    KNOWEDIT=... EASYEDIT_HOME=... python scripts/tune.py ft adalora rome
    KNOWEDIT=... EASYEDIT_HOME=... python scripts/tune.py --report-only

Every setting is a job of scripts/run_benchmark.py on each data set. Interrupted, the same command resumes where it stopped.
A table of all settings is printed and written to OUT/METHOD.md, the chosen one to hparams/benchmark/method/METHOD_tuned.yaml.
"""  # noqa: E501  (commands)

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tqdm import tqdm

from kne_easyedit._util.errors import RunStopped
from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.machine import keep_large_blocks
from kne_easyedit._util.markdown import table_of_rows
from kne_easyedit.benchmark import run
from kne_easyedit.benchmark.config import job_folder, job_of
from kne_easyedit.metrics import METRICS, PERCENT, Metric

HPARAMS = Path(__file__).resolve().parents[1] / "hparams"
_BY_KEY = {metric.key: metric for metric in METRICS}
FAILED = "failed.json"
"""In the folder of the results: jobs that were stopped, and why; under their settings nothing is measured."""


class SettingFailed(ValueError):
    """A setting cannot be chosen: a job was stopped, or no record was edited."""


@dataclass(frozen=True)
class Candidate:
    """One setting of a method, and what was measured of it: the means of its data sets."""

    settings: Mapping[str, Any]
    figures: Mapping[str, float]
    of: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Data set -> figures."""
    records: int = 0
    """Records that were edited, of all data sets."""

    @property
    def name(self) -> str:
        """The settings as a text; those of the method's file have none."""
        return named(self.settings) or "as its file has it"


def named(settings: Mapping[str, Any]) -> str:
    """Settings as a text that may be a part of a label."""
    return " ".join(f"{name}={_short(value)}" for name, value in settings.items())


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


# The rule


def read_plan(path: Path) -> dict[str, Any]:
    """The content of the tuning file.

    Raises:
        ValueError: A method has another number of settings than the budget, does not begin with those of its own file,
            or has one twice; or the rule has an unknown metric.
    """
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    for method, grid in plan["methods"].items():
        if len(grid) != plan["budget"]:
            raise ValueError(f"{path.name}: methods.{method} has {len(grid)} settings, the budget is {plan['budget']}")
        if grid[0]:
            raise ValueError(f"{path.name}: methods.{method} must begin with {{}}, the settings of its own file")
        if len({named(settings) for settings in grid}) < len(grid):
            raise ValueError(f"{path.name}: methods.{method} has one of its settings twice")
    for part in ("reach", "mean"):
        for key in plan["choice"][part]:
            if key not in _BY_KEY:
                raise ValueError(f"{path.name}: choice.{part}: {key!r} is no metric; there are {', '.join(_BY_KEY)}")
    return plan


def counted(candidates: Sequence[Candidate], rule: Mapping[str, Any]) -> list[Metric]:
    """The metrics of the rule's mean that were measured of every candidate."""
    return [
        metric
        for metric in map(_BY_KEY.__getitem__, rule["mean"])
        if all(metric.key in its.figures for its in candidates)
    ]


def score(candidate: Candidate, metrics: Sequence[Metric]) -> float:
    """The mean of some metrics, in percent; one that is better if it is lower counts as 100 less it."""
    values = [(metric, candidate.figures[metric.key]) for metric in metrics]
    return fmean(100 - value if metric.better == "down" else value for metric, value in values)


def choose(candidates: Sequence[Candidate], rule: Mapping[str, Any]) -> Candidate:
    """The candidate that the rule chooses.

    Args:
        candidates: All settings of one method.
        rule: ``reach`` (one metric and the value that is to be reached) and ``mean`` (the metrics of the mean).

    Returns:
        Of those that reach the value, or come nearest to it if none does, the first of the highest mean. Settings under
        which a record failed that others edit have figures of the rest alone: they are not chosen.
    """
    ((key, enough),) = rule["reach"].items()
    most = max(its.records for its in candidates)
    candidates = [its for its in candidates if its.records == most]
    best = max(its.figures[key] for its in candidates)
    able = [its for its in candidates if its.figures[key] >= min(enough, best)]
    metrics = counted(candidates, rule)
    return max(able, key=lambda its: score(its, metrics))  # the first of those that are equal


# The jobs


def configuration(method: str, model: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What scripts/run_benchmark.py would be given for a method, with Hydra's overrides."""
    with initialize_config_dir(config_dir=str(HPARAMS), version_base="1.3"):
        given = [f"benchmark/method@method={method}", f"benchmark/model@model={model}", *overrides]
        found = compose("benchmark", overrides=given)
    return cast(dict[str, Any], OmegaConf.to_container(found, resolve=True))


def job(base: Mapping[str, Any], plan: Mapping[str, Any], data: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of one setting's job on one data set."""
    found = cast(dict[str, Any], deepcopy(base))
    where = OmegaConf.create({"knowedit": base["knowedit"], "its": plan["data"][data]})
    found["data"] |= {"name": f"{data}-train", **cast(dict, OmegaConf.to_container(where, resolve=True))["its"]}
    found["evaluation"] |= plan["evaluation"]
    method = found["method"]
    method["settings"] = {**method["settings"], **settings}
    method["label"] = label_of(base, settings)
    return found


def label_of(base: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The label of one setting's job."""
    return f"{base['method']['label']} {named(settings)}".strip()


def figures_of(folder: Path, label: str) -> tuple[dict[str, float], int]:
    """The metrics in percent of a finished job, with the seconds an edit; and of how many records.

    Raises:
        FileNotFoundError: It has not been run.
        SettingFailed: It has no results.
    """
    file = folder / "summary.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: the job was not run")
    summary = json.loads(file.read_text(encoding="utf-8"))["methods"][label]
    wanted = [metric.key for metric in METRICS if metric.unit == PERCENT or metric.key == "seconds_per_edit"]
    found = {key: summary[key] for key in wanted if summary.get(key) is not None}
    if not found:
        raise SettingFailed(f"{label}: no record was edited ({file})")
    return found, summary["records"]


def candidate(
    base: Mapping[str, Any], plan: Mapping[str, Any], settings: Mapping[str, Any], failed: Mapping[str, str]
) -> Candidate:
    """What was measured of one setting; a metric that a data set lacks is left out.

    Raises:
        FileNotFoundError: A job of it has not been run.
        SettingFailed: A job of it is in ``failed`` (`failures`), or has edited nothing.
    """
    jobs = {data: job(base, plan, data, settings) for data in plan["data"]}
    for its in jobs.values():
        if reason := failed.get(place_of(its)):
            raise SettingFailed(f"{its['method']['label']} on {its['data']['name']}: {reason}")
    measured = {data: figures_of(job_folder(its), its["method"]["label"]) for data, its in jobs.items()}
    of = {data: figures for data, (figures, _) in measured.items()}
    first, *others = of.values()
    shared = [key for key in first if all(key in other for other in others)]
    return Candidate(
        settings,
        {key: fmean(its[key] for its in of.values()) for key in shared},
        of,
        sum(n for _, n in measured.values()),
    )


def candidates_of(
    base: Mapping[str, Any], plan: Mapping[str, Any], grid: Sequence[Mapping[str, Any]], failed: Mapping[str, str]
) -> list[Candidate]:
    """The settings of a grid that were measured; why others cannot be chosen is printed. Raises FileNotFoundError."""
    found = []
    for settings in grid:
        try:
            found.append(candidate(base, plan, settings, failed))
        except SettingFailed as error:  # noqa: PERF203  (each setting by itself)
            print(f"not chosen: {error}")
    return found


def place_of(settings: Mapping[str, Any]) -> str:
    """The folder of a job within that of the results."""
    return job_folder(settings).relative_to(settings["out"]).as_posix()


def failures(out: Path) -> dict[str, str]:
    """`place_of` a job that was stopped -> why; an earlier run's, too."""
    file = out / FAILED
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# What is written


def table(candidates: Sequence[Candidate], chosen: Candidate, rule: Mapping[str, Any]) -> str:
    """All settings of a method as a Markdown table, for each data set and for the mean; the chosen one is bold."""
    metrics = [metric for metric in METRICS if any(metric.key in its.figures for its in candidates)]
    scored = counted(candidates, rule)
    rows = [["settings", "data", *(metric.short for metric in metrics), "mean"]]
    most = max(its.records for its in candidates)
    for its in candidates:
        name = f"**{its.name}**" if its is chosen else its.name
        if its.records < most:
            name += f" ({most - its.records} of {most} records failed)"
        for data, figures in (*its.of.items(), ("mean", its.figures)):
            shown = [f"{figures[m.key]:.1f}" if m.key in figures else "-" for m in metrics]
            rows.append([name, data, *shown, f"{score(its, scored):.1f}" if data == "mean" else "-"])
            name = ""
    return table_of_rows(rows)


def tuned_file(base: Mapping[str, Any], chosen: Candidate, budget: int) -> str:
    """The text of the chosen settings' file for scripts/run_benchmark.py."""
    method = base["method"]
    content = {
        "label": f"{method['label']}-tuned",
        "hparams": method["hparams"],
        "settings": {**method["settings"], **chosen.settings},
    }
    head = f"# Of {budget} settings the one that the rule in hparams/tuning.yaml chooses; written by scripts/tune.py.\n"
    return head + yaml.safe_dump(content, sort_keys=False, default_flow_style=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the jobs that are missing, and writes tables and chosen settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="names in hparams/tuning.yaml (default: all)")
    parser.add_argument("--plan", type=Path, default=HPARAMS / "tuning.yaml", help="another tuning file")
    parser.add_argument("--model", default="smollm2-135m", help="as in hparams/benchmark/model (default %(default)s)")
    parser.add_argument("--out", default="outputs/tuning", help="folder of the results (default %(default)s)")
    parser.add_argument(
        "--to", type=Path, default=HPARAMS / "benchmark" / "method", help="folder of the chosen settings' files"
    )
    parser.add_argument("--report-only", action="store_true", help="run nothing: of the methods that are finished")
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="overrides of hparams/benchmark.yaml, as Hydra's",
    )
    given = parser.parse_args(arguments)
    plan = read_plan(given.plan)
    if unknown := [name for name in given.methods if name not in plan["methods"]]:
        parser.error(f"{unknown[0]!r} is not in {given.plan.name}; there are {', '.join(plan['methods'])}")
    methods = given.methods or list(plan["methods"])
    bases = {name: configuration(name, given.model, [f"out={given.out}", *given.set]) for name in methods}
    out = Path(given.out)
    if not given.report_only:
        keep_large_blocks()
        run_all(
            [
                job(bases[name], plan, data, settings)
                for name in methods
                for settings in plan["methods"][name]
                for data in plan["data"]
            ],
            out,
        )
    failed = failures(out)
    for name in methods:
        try:
            candidates = candidates_of(bases[name], plan, plan["methods"][name], failed)
        except FileNotFoundError as error:
            if not given.report_only:
                raise
            print(f"{name}: not finished ({error})\n")
            continue
        if not candidates:
            print(f"{name}: none of its settings can be chosen; put others into {given.plan}\n")
            continue
        chosen = choose(candidates, plan["choice"])
        text = f"## {name}\n\n{table(candidates, chosen, plan['choice'])}\n"
        atomic_write(out / f"{name}.md", text)
        atomic_write(given.to / f"{name}_tuned.yaml", tuned_file(bases[name], chosen, plan["budget"]))
        print(f"{text}\nchosen: {chosen.name}\n")


def run_all(jobs: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Runs jobs one after the other. One that is stopped ends no other: `FAILED` has it, until it succeeds.

    It is stopped if no record could be edited, or if the method has left the model changed.

    Args:
        jobs: Their configurations.
        out: The folder of the results.
    """
    with tqdm(jobs, desc="tune", unit="job") as bar:
        for settings in bar:
            label = settings["method"]["label"]
            bar.set_postfix_str(f"{label} on {settings['data']['name']}")
            reason = None
            try:
                run(job_of(settings, HPARAMS))
            except RunStopped as error:
                bar.write(f"{label}: {error}")
                reason = str(error)
            known = failures(out)
            others = {place: why for place, why in known.items() if place != place_of(settings)}
            now = others if reason is None else {**others, place_of(settings): reason}
            if now != known:
                atomic_write(out / FAILED, json.dumps(now, indent=1) + "\n")


if __name__ == "__main__":
    main()
