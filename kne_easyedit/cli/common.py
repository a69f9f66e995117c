"""What the commands share: shipped settings, overrides, types of arguments."""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import yaml

from kne_easyedit.hparams import KNEHyperParams

SHIPPED = "smollm2-135m"


def shipped() -> Path:
    """The folder of the shipped hyperparameter files: of the checkout, or of the installed package."""
    checkout = Path(__file__).resolve().parents[2] / "hparams"
    return checkout if (checkout / "KNE").is_dir() else Path(str(files("kne_easyedit.shipped_hparams")))


def method_of(path: Path, methods=()) -> str | None:
    """Which method a hyperparameter file is of: its folder's name if that is one of ``methods`` (or a label), else its alg_name."""
    from kne_easyedit.bridge import METHODS

    folder = path.resolve().parent.name
    if folder in METHODS or folder in methods:
        return folder
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return config.get("alg_name") if isinstance(config, dict) else None


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model and which of its modules, under which settings."""
    parser.add_argument(
        "--hparams", type=Path, default=shipped() / "KNE" / f"{SHIPPED}.yaml", metavar="FILE", help="KNE's YAML (default: the shipped one for SmolLM2)"
    )
    parser.add_argument("--model", help="path or hub name; overrides model_name")
    parser.add_argument("--modules", nargs="+", metavar="TEMPLATE", help="overrides target_modules, e.g. 'model.layers.{}.mlp.up_proj'")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="overrides any other setting, e.g. p=0.02 layers=[4,5,6] device=cpu"
    )


def load_settings(arguments) -> KNEHyperParams:
    """The hyperparameters that `add_settings`' arguments name. Raises as `KNEHyperParams.from_hparams`."""
    overrides = {}
    for setting in arguments.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting!r}: wanted is NAME=VALUE, e.g. p=0.02")
        overrides[name] = yaml.safe_load(value)
    if arguments.model:
        overrides["model_name"] = arguments.model
    if arguments.modules:
        overrides["target_modules"] = arguments.modules
    return KNEHyperParams.from_dict({**KNEHyperParams.from_hparams(arguments.hparams).to_dict(), **overrides})
