"""scripts/run_benchmark.py on a tiny model: a folder with all that it needs, its command, its configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS, make_llama, make_tokenizer, with_same_threads
from hydra import compose, initialize_config_dir
from runs import record

ROOT = Path(__file__).parents[1]
TINY = [
    "on_bad_record=fail",
    "++model.settings.model_name=tiny-model",
    "++method.settings.layers=[2]",
    "statistics.samples=4",
]


@pytest.fixture(scope="module", name="place")
def place_fixture(tmp_path_factory) -> Path:
    """A folder with a model, three records and facts to localise on."""
    folder = tmp_path_factory.mktemp("benchmark")
    make_llama().save_pretrained(folder / "tiny-model")
    make_tokenizer().save_pretrained(folder / "tiny-model")
    (folder / "records.json").write_text(json.dumps([record(), record("Spain", "Oslo"), record("Peru", "Marie")]))
    (folder / "facts.json").write_text(json.dumps([record("Italy", "Madrid"), record("Rome", "Lima")]))
    return folder


def command(place: Path, out: str, *overrides: str) -> list[str]:
    data = [
        "benchmark/data@data=embedded",
        "data.name=tiny",
        "data.file=records.json",
        "data.offset=0",
        "data.localization.file=facts.json",
    ]
    return [sys.executable, str(ROOT / "scripts/run_benchmark.py"), "-m", *data, *TINY, f"out={out}", *overrides]


def environment(place: Path, **changes: str) -> dict[str, str]:
    return {**with_same_threads(), "KNE_CACHE": str(place / "cache"), **changes}


def run(place: Path, out: str, *overrides: str, **changes: str) -> None:
    """``changes`` are of the environment."""
    done = subprocess.run(
        command(place, out, *overrides),
        cwd=place,
        env=environment(place, **changes),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "raised AttributeError" not in done.stderr, "Hydra calls methods of a callback that it does not have"


def composed(*overrides: str):
    with initialize_config_dir(config_dir=str(ROOT / "hparams"), version_base="1.3"):
        return compose("benchmark", overrides=list(overrides), return_hydra_config=True)
