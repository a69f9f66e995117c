"""Hydra's sweeps, looked at before their first job: what their report will refuse costs no edit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from kne_easyedit.benchmark.collect import data_name
from kne_easyedit.benchmark.config import distinguishing


class RequireLabels:
    """A callback of Hydra's: ends a sweep, in the process that starts it, if its jobs cannot stand in one report.

    There, whatever launcher is chosen, all jobs are known; a job knows itself only. Of sweepers other than Hydra's own,
    which find their jobs as they go, nothing is said.
    """

    def on_multirun_start(self, config, **_) -> None:
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from omegaconf import OmegaConf

        if config.hydra.sweeper._target_ != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
            return
        loader = GlobalHydra.instance().config_loader()
        given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # ${...} in them is each job's own
        found = OverridesParser.create(config_loader=loader).parse_overrides(given)
        jobs = []
        for overrides in (job for batch in BasicSweeper.split_arguments(found, max_batch_size=None) for job in batch):
            job = loader.load_sweep_config(config, list(overrides))
            keys = [key for key in job if key != "hydra"]
            jobs.append(OmegaConf.to_container(OmegaConf.masked_copy(job, keys), resolve=True))
        if clash := first_clash(jobs):
            raise SystemExit(f"kne: {clash}")  # an exception Hydra would turn into a warning


def first_clash(jobs: Iterable[Mapping]) -> str | None:
    """What is wrong with some jobs as one report: two of one model, data set and label whose settings differ; None if nothing is."""
    known: dict[tuple, dict] = {}
    for job in jobs:
        key = (job["model"]["file"], data_name(Path(str(job["data"]["file"])).stem), job["method"]["label"])
        settings = dict(_flat(_of_results(job)))
        first = known.setdefault(key, settings)
        if first != settings:
            names = sorted(name for name in first.keys() | settings.keys() if first.get(name) != settings.get(name))
            shown = "; ".join(f"{name}: {first.get(name)} and {settings.get(name)}" for name in names)
            example = f"'method.label=\"{key[2]}-${{{names[0]}}}\"'"
            return (
                f"method.label: two jobs of this sweep would both be called {key[2]!r} in the report on {key[1]}, and differ in {shown}; "
                f"give each a label of its own, for example {example}, or run them with different 'out'"
            )
    return None


def _of_results(job: Mapping) -> dict:
    """The settings that a line of results depends on; which records are edited does not count where each is edited alone."""
    settings = json.loads(json.dumps(distinguishing(job), default=str))
    del settings["on_bad_record"], settings["data"]["name"]
    if settings["evaluation"]["mode"] == "single":
        del settings["data"]["records"], settings["data"]["offset"]
    return settings


def _flat(settings: Mapping, where: str = ""):
    for name, value in settings.items():
        yield from _flat(value, f"{where}{name}.") if isinstance(value, Mapping) else [(f"{where}{name}", value)]
