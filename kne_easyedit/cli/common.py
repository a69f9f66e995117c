"""What the commands share: shipped settings, overrides, types of arguments."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from kne_easyedit._util.settings import resolve_paths
from kne_easyedit.hparams import KNEHyperParams

SHIPPED = "smollm2-135m"
UNTUNED = "mistral-7b"
"""A shipped file of a model that nothing was tuned on: the pattern for models that no file is shipped for."""
BEGINS_AGAIN = "the same command begins again; half-written files are never left"
"""What is said after Ctrl-C by commands that do not resume (``interrupted``)."""


def shipped() -> Path:
    """The folder of the shipped hyperparameter files: of the checkout, or of the installed package."""
    checkout = Path(__file__).resolve().parents[2] / "hparams"
    return checkout if (checkout / "KNE").is_dir() else Path(str(files("kne_easyedit.shipped_hparams")))


def shipped_for(model: str) -> Path | None:
    """The shipped file of KNE's settings that names this very model; None if there is none."""
    for path in sorted((shipped() / "KNE").glob("*.yaml")):
        if read_settings(path).get("model_name") == model:
            return path
    return None


def pattern_of_settings() -> str:
    """The text of the settings file that serves as the pattern for other models."""
    return (shipped() / "KNE" / f"{UNTUNED}.yaml").read_text(encoding="utf-8")


def method_of(path: Path, methods: Collection[str] = ()) -> str | None:
    """The method of a hyperparameter file.

    Args:
        path: The file.
        methods: Names that its folder may have, beside the labels that are known.

    Returns:
        The name of its folder if that is a method's, else its ``alg_name``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: With the file's name, if it is no YAML file of settings.
    """
    from kne_easyedit.bridge import LABELS

    config = read_settings(path)
    folder = path.resolve().parent.name
    return folder if folder in LABELS or folder in methods else config.get("alg_name")


def read_settings(path: Path) -> dict:
    """The settings of a hyperparameter file. Raises as `method_of`."""
    if not path.is_file():
        what = "is a folder, expected a YAML file in it" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"hparams: {path} {what}; shipped ones are under {shipped()}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"hparams: {path} is not a YAML file: {_first_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"hparams: {path} holds a {type(config).__name__}, expected settings (a mapping of names to values)"
        )
    return config


def positive(text: str) -> int:
    """The type of an option that takes a number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def not_negative(text: str) -> int:
    """The type of an option that takes a number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return value


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model and which of its modules, under which settings."""
    parser.add_argument(
        "--hparams",
        type=Path,
        default=shipped() / "KNE" / f"{SHIPPED}.yaml",
        metavar="FILE",
        help="KNE's YAML (default: the shipped one for SmolLM2)",
    )
    add_overrides(parser, "overrides any other setting, e.g. p=0.02 layers=[4,5,6] device=cpu")


def add_settings_of_model(parser: argparse.ArgumentParser) -> None:
    """As `add_settings`, but without a file the settings are the model's own (`load_settings`)."""
    parser.add_argument(
        "--hparams",
        type=Path,
        metavar="FILE",
        help="KNE's YAML (default: the shipped one of the model, else as `kne hparams` writes it)",
    )
    add_overrides(parser, "overrides any other setting, e.g. p=0.02 device=cpu localization_data=null")


def add_overrides(parser: argparse.ArgumentParser, help_of_set: str) -> None:
    """``--model``, ``--modules`` and ``--set``, alike in every command that has settings."""
    parser.add_argument("--model", help="path or hub name; overrides model_name")
    parser.add_argument(
        "--modules",
        nargs="+",
        action="extend",
        metavar="TEMPLATE",
        help="overrides KNE's target_modules, e.g. 'model.layers.{}.mlp.up_proj'",
    )
    add_set(parser, help_of_set)


def add_set(parser: argparse.ArgumentParser, help_of_set: str) -> None:
    """``--set``, which may stand there several times."""
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=help_of_set)


def add_general(parser: argparse.ArgumentParser) -> None:
    """``--perplexity``, ``--ability`` and ``--ability-limit``: what is asked of a model beside its facts."""
    parser.add_argument("--perplexity", type=Path, metavar="FILE", help="the perplexity of a text before and after")
    parser.add_argument(
        "--ability",
        type=lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
        default=(),
        metavar="TASKS",
        help="comma-separated tasks of lm-evaluation-harness, by name or YAML file, before and after "
        "(pip install 'kne_easyedit[ability]')",
    )
    parser.add_argument("--ability-limit", type=positive, metavar="N", help="documents a task at most (default: all)")


def overrides_of(settings: Sequence[str]) -> dict[str, object]:
    """The settings given by ``--set NAME=VALUE``: name -> value as YAML reads it. Raises ValueError for other texts."""
    overrides = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {setting!r}: expected NAME=VALUE, e.g. p=0.02")
        try:
            overrides[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(
                f"--set {setting!r}: {value!r} is no value that YAML can read: {_first_line(error)}"
            ) from error
    return overrides


def with_overrides(
    hparams: KNEHyperParams, overrides: Mapping[str, object], model: str | None, modules: Sequence[str] | None
) -> KNEHyperParams:
    """KNE's settings, changed by ``--set`` (`overrides_of`), ``--model`` and ``--modules``.

    Raises:
        ValueError: Names the options.
    """
    given = {
        **overrides,
        **({"model_name": model} if model else {}),
        **({"target_modules": list(modules)} if modules else {}),
    }
    if not given:
        return hparams
    try:
        return KNEHyperParams.from_dict({**hparams.to_dict(), **given})
    except ValueError as error:
        raise ValueError(f"{' and '.join(_options(overrides, model, modules))}: {error}") from error


def of_the_paper() -> dict[str, object]:
    """The settings of the benchmark's KNE that differ from the shipped ones: the paper's, which spare no neighbours."""
    return dict(read_settings(shipped() / "benchmark" / "method" / "kne.yaml")["settings"])


def load_settings(arguments: argparse.Namespace, first: Mapping[str, object] | None = None) -> KNEHyperParams:
    """The hyperparameters that the arguments of `add_settings` name, with absolute paths.

    Without a file they are those of the model: of the shipped file that names it, else as `kne hparams` writes them.

    Args:
        arguments: Of `add_settings`.
        first: Settings in place of the file's; ``--set`` overrides them.

    Raises:
        FileNotFoundError, ValueError: As `read_settings`, `from_hparams` and `settings_file.settings_for`.
    """
    path: Path | None = arguments.hparams
    overrides = {**(first or {}), **overrides_of(arguments.set)}
    if path is None:
        model = str(arguments.model or overrides.get("model_name") or SHIPPED)
        path = shipped_for(model)
    if path is None:
        from kne_easyedit.doctor.settings_file import hparams_for

        hparams = hparams_for(model, pattern_of_settings())
    else:
        if path.exists():
            read_settings(path)
        hparams = KNEHyperParams.from_hparams(path)
    hparams = with_overrides(hparams, overrides, arguments.model, arguments.modules)
    resolve_paths(hparams)
    return hparams


def require_folder(path: Path, option: str = "--out") -> None:
    """Raises ValueError, naming the option, if a folder of results cannot be where it is asked for."""
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise ValueError(f"{option}: {part} is a file, expected a folder for the results")
            if not os.access(part, os.W_OK | os.X_OK):
                raise ValueError(f"{option}: nothing can be written into {part}; name another folder")
            return


def require_file(path: Path, option: str = "--out") -> None:
    """Raises ValueError, naming the option, if a file of results cannot be where it is asked for."""
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder, expected the name of a file")
    require_folder(path.parent, option)


def require_new(folder: Path) -> None:
    """Raises ValueError, naming the option, if a folder cannot be made, or holds something."""
    require_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--out: {folder} holds something; name a new folder, or remove it first")


def _options(overrides: Mapping, model: str | None, modules: Sequence[str] | None) -> list[str]:
    return ["--set"] * bool(overrides) + ["--model"] * bool(model) + ["--modules"] * bool(modules)


def _first_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split())[:200]
