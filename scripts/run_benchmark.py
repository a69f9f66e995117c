"""The KnowEdit comparison under Hydra: methods x data sets x models x seeds x shards, one job each.

    python scripts/run_benchmark.py -m benchmark/method@method=kne,ft,rome benchmark/data@data=counterfact,zsre,recent
    python scripts/run_benchmark.py -m +study=share benchmark/data@data=counterfact data.records=40

Interrupted, the same command resumes where it stopped. The configuration is hparams/benchmark.yaml.
"""

import os
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kne_easyedit._util.machine import keep_large_blocks
from kne_easyedit.benchmark import run
from kne_easyedit.benchmark.config import job_of
from kne_easyedit.benchmark.console import print_report
from kne_easyedit.benchmark.hydra_workers import begin_job
from kne_easyedit.studies.plan import job_settings, plan_of

HPARAMS = Path(__file__).resolve().parents[1] / "hparams"


def study_points(*, _root_: DictConfig) -> str:
    """The labels of a study's points as Hydra sweeps over them; what cannot be filled is printed."""
    plan = plan_of(_settings(_root_), HPARAMS)
    for reason in plan.left_out:
        print(f"left out: {reason}", flush=True)
    return ",".join(f"'{point.place.label}'" for point in plan.points)


def _settings(config: DictConfig) -> dict[str, Any]:
    """The configuration without Hydra's own."""
    own = OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"])
    return cast(dict[str, Any], OmegaConf.to_container(own, resolve=True))  # the configuration is a mapping


OmegaConf.register_new_resolver("study_points", study_points, replace=True)


@hydra.main(version_base="1.3", config_path="../hparams", config_name="benchmark")
def main(config: DictConfig) -> None:
    """Runs one job."""
    keep_large_blocks()
    begin_job()
    # Relative paths mean the folder of the command, whatever hydra.job.chdir and the launcher do.
    os.chdir(HydraConfig.get().runtime.cwd)
    job = job_of(job_settings(_settings(config), HPARAMS), HPARAMS)
    print_report(run(job), job.folder)


if __name__ == "__main__":
    main()
