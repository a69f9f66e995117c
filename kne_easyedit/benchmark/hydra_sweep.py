"""Checks a sweep of Hydra's before its first job: what its report would refuse is refused before any edit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from kne_easyedit.benchmark.axes import is_axis
from kne_easyedit.benchmark.config import distinguishing
from kne_easyedit.benchmark.labels import data_name


class RequireLabels(Callback):
    """A callback of Hydra's: ends a sweep, in the process that starts it, if its jobs cannot be in one report.

    Only there all jobs are known, with any launcher. Sweepers other than Hydra's own are not checked: they choose their
    jobs as they go.
    """

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        """Called by Hydra with its configuration. Raises SystemExit, with the reason, to end the sweep."""
        jobs = jobs_of_sweep(config)
        if clash := first_clash(jobs):
            raise SystemExit(f"kne: {clash}")  # an exception Hydra would turn into a warning


_JOBS: dict[tuple[str, ...], list[dict]] = {}
"""What `jobs_of_sweep` has composed: it takes a second for a few jobs."""


def jobs_of_sweep(config: Any) -> list[dict]:
    """The settings of all jobs of a sweep, before it starts; none for sweepers other than Hydra's own.

    Args:
        config: Hydra's configuration of the sweep.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    if config.hydra.sweeper._target_ != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
        return []
    loader = GlobalHydra.instance().config_loader()
    # Interpolations (${...}) in them are resolved by each job.
    given: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    key = (str(config.hydra.job.config_name), *map(str, given))
    if key not in _JOBS:
        found = OverridesParser.create(config_loader=loader).parse_overrides(given)
        batches = BasicSweeper.split_arguments(found, max_batch_size=None)
        _JOBS[key] = [
            plain_settings(loader.load_sweep_config(config, list(overrides)))
            for batch in batches
            for overrides in batch
        ]
    return _JOBS[key]


def plain_settings(config: Any) -> dict:
    """The settings of a configuration, without Hydra's own."""
    from omegaconf import OmegaConf

    keys = [str(key) for key in config if key != "hydra"]
    settings: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True)
    return settings


def first_clash(jobs: Iterable[Mapping]) -> str | None:
    """Why jobs cannot be in one report: two of one model, data set and label differ in settings. None if they can."""
    known: dict[tuple, dict] = {}
    for job in jobs:
        key = (job["model"]["file"], data_name(Path(str(job["data"]["file"])).stem), job["method"]["label"])
        settings = dict(_flat(_of_results(job)))
        first = known.setdefault(key, settings)
        if first != settings:
            names = sorted(name for name in first.keys() | settings.keys() if first.get(name) != settings.get(name))
            if all(is_axis(name, job) for name in names):  # a report tells them apart by themselves
                continue
            shown = "; ".join(f"{name}: {first.get(name)} and {settings.get(name)}" for name in names)
            example = f"'method.label=\"{key[2]}-${{{names[0]}}}\"'"
            return (
                f"method.label: two jobs of this sweep would both be called {key[2]!r} in the report on {key[1]}, "
                f"and differ in {shown}; "
                f"give each a label of its own, for example {example}, or run them with different 'out'"
            )
    return None


def _of_results(job: Mapping) -> dict:
    """The settings that a result line depends on; in mode single the other records do not count."""
    settings = json.loads(json.dumps(distinguishing(job), default=str))
    del settings["on_bad_record"], settings["data"]["name"]
    if settings["evaluation"]["mode"] == "single":
        del settings["data"]["records"], settings["data"]["offset"]
    return settings


def _flat(settings: Mapping, where: str = "") -> Iterator[tuple[str, Any]]:
    """Path of a setting -> value, for all settings below."""
    for name, value in settings.items():
        yield from _flat(value, f"{where}{name}.") if isinstance(value, Mapping) else [(f"{where}{name}", value)]
