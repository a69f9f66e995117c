"""Settings objects of any method, ours or EasyEdit's: copied, shown, and their paths resolved."""

from __future__ import annotations

import copy
import re
from typing import Protocol, TypeVar

from kne_easyedit._util.files import expand_path


class Hyperparameters(Protocol):
    """What every method's hyperparameter object has, KNE's and EasyEdit's. Further settings are the method's own."""

    alg_name: str
    model_name: str
    device: int | str


Settings = TypeVar("Settings", bound=Hyperparameters)

EVALUATORS = ("evaluation_type", "api_key")
"""Settings of EasyEdit's evaluators (since 2025), which its scripts set on the hyperparameter object of any method:
``LLM-judge`` or ``generate-text`` in the place of teacher-forced figures, and the judge's key. A YAML may hold them, too.
No fields: some versions ask whether the attribute is there, not what it is, so it is there only if it was given."""
SECRET = ("api_key",)
"""Never shown: not in messages, manifests, summaries or fingerprints."""


def replace_settings(hparams: Settings, **changes: object) -> Settings:
    """A copy of a hyperparameter object of any method with other values. What was set on the object stays.

    (``dataclasses.replace`` builds a new one from the fields alone, and drops the rest.) None for one of `EVALUATORS`
    takes it off. Raises ValueError for a name that the object does not have, and as KNE's ``validate``.
    """
    new = copy.copy(hparams)
    for name, value in changes.items():
        if name in EVALUATORS and value is None:
            vars(new).pop(name, None)
        elif name in EVALUATORS or hasattr(new, name):
            setattr(new, name, value)
        else:
            raise ValueError(f"{type(hparams).__name__}: has no setting {name!r}; it has {', '.join(vars(hparams))}")
    if hasattr(new, "validate"):  # KNE's; EasyEdit's classes check nothing
        new.validate()
    return new


def public_settings(hparams) -> dict:
    """The settings of an object of any method by name, for files and fingerprints: of a secret only that it is given."""
    return {
        name: "given" if name in SECRET and value else value
        for name, value in vars(hparams).items()
        if not (name in EVALUATORS and value is None)
    }


_NAMES_A_PATH = re.compile(r"(\w+_)?(dir|data|path|file)|ensemble|archive|P_loc")
_NO_PATHS = ("embedded", "contriver_dir", "tokenizer_dir")
"""The packaged facts; settings of EasyEdit's that are called like folders, and may name a model of the hub."""


def path_settings(hparams: object) -> dict[str, str]:
    """The settings of hyperparameters, of any method, that name a file or folder, as they stand: told by their names.

    ``model_name`` is none of them: EasyEdit chooses by the words in it, so it stays as it was given.
    """
    return {
        name: value
        for name, value in vars(hparams).items()
        if isinstance(value, str)
        and value
        and _NAMES_A_PATH.fullmatch(name)
        and not {name, value} & set(_NO_PATHS)
        and "://" not in value
    }


def resolve_paths(hparams: object) -> None:
    """Makes the paths in hyperparameters, of any method, absolute: they mean the working directory of now, wherever they are read."""
    for name, value in path_settings(hparams).items():
        setattr(hparams, name, str(expand_path(value)))
