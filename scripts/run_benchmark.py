"""The KnowEdit comparison under Hydra: methods x data sets x models x seeds x shards, one job each.

    python scripts/run_benchmark.py -m benchmark/method@method=kne,ft,rome benchmark/data@data=counterfact,zsre,recent

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

HPARAMS = Path(__file__).resolve().parents[1] / "hparams"


@hydra.main(version_base="1.3", config_path="../hparams", config_name="benchmark")
def main(config: DictConfig) -> None:
    """Runs one job."""
    keep_large_blocks()
    # Relative paths mean the folder of the command, whatever hydra.job.chdir and the launcher do.
    os.chdir(HydraConfig.get().runtime.cwd)
    settings = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))  # the configuration is a mapping
    job = job_of(settings, HPARAMS)
    print_report(run(job), job.folder)


if __name__ == "__main__":
    main()
