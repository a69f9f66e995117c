"""Localise: model, data, number of facts and modules in; scores, ensemble, stability and a picture out.

It is `kne localize` under Hydra; the configuration is hparams/localize.yaml.

    python scripts/localize.py data=train_cf.json size=200 modules='["model.layers.{}.mlp.up_proj"]'
    python scripts/localize.py -m KNE@hparams=smollm2-135m hparams.p=0.01,0.02,0.04
    python scripts/localize.py -m shard=0/4,1/4,2/4,3/4 hydra/launcher=slurm      # on four machines; then once without

The results of a sweep's jobs are in OUT/DIGEST, of their settings. After an interruption the same command resumes where
it stopped.
"""

from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kne_easyedit._util.digest import digest
from kne_easyedit._util.machine import keep_large_blocks
from kne_easyedit._util.settings import resolve_paths
from kne_easyedit.benchmark.hydra_workers import begin_job
from kne_easyedit.cli.localize import localize_into
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization.output import decisive_settings


@hydra.main(version_base="1.3", config_path="../hparams", config_name="localize")
def main(config: DictConfig) -> None:
    """Localises under the composed configuration."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    keep_large_blocks()
    begin_job()
    hparams = KNEHyperParams.from_dict(
        {
            **settings["hparams"],
            "model_name": settings["model"],
            "localization_data": settings["data"],
            "localization_size": settings["size"],
            "target_modules": settings["modules"],
        }
    )
    resolve_paths(hparams)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN:  # by the settings: jobs of another sweep never get its folder
        folder /= digest(decisive_settings(hparams))[:8]
    localize_into(folder, hparams, settings["workers"], settings["shard"])


if __name__ == "__main__":
    main()
