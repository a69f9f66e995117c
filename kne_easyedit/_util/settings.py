"""Hyperparameter objects of any method, KNE's or EasyEdit's: copied, shown, and their paths resolved."""

from __future__ import annotations

import copy
import re
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, TypeVar

from kne_easyedit._util.files import expand_path


class Hyperparameters(Protocol):
    """The settings that every method's hyperparameter object has, KNE's and EasyEdit's."""

    alg_name: str
    model_name: str
    device: int | str


Settings = TypeVar("Settings", bound=Hyperparameters)

EVALUATORS = ("evaluation_type", "api_key")
"""Settings of EasyEdit's evaluators (since 2025), which its scripts set on the hyperparameter object of any method:
``LLM-judge`` or ``generate-text`` in place of teacher-forced figures, and the judge's key. A YAML may hold them, too.
They are no fields: some versions check only that the attribute exists, so it exists only if it was given."""
EVALUATION_TYPES = ("LLM-judge", "generate-text")
"""Values of ``evaluation_type``; EasyEdit takes any other for teacher-forced figures, without a word."""
SECRET = ("api_key",)
"""Settings that are never shown: in no message, manifest, summary or fingerprint."""


def replace_settings(hparams: Settings, **changes: object) -> Settings:
    """A copy of a hyperparameter object of any method with other values.

    Attributes that are no fields are kept (``dataclasses.replace`` would drop them).

    Args:
        hparams: The object; it is not changed.
        changes: New values. None for one of `EVALUATORS` removes it.

    Raises:
        ValueError: The object has no such setting, or KNE's ``validate`` refuses the value.
    """
    new = copy.copy(hparams)
    for name, value in changes.items():
        if name in EVALUATORS and value is None:
            vars(new).pop(name, None)
        elif name in EVALUATORS or hasattr(new, name):
            setattr(new, name, value)
        else:
            raise ValueError(f"{type(hparams).__name__}: has no setting {name!r}; it has {', '.join(vars(hparams))}")
    if hasattr(new, "validate"):  # KNE's; EasyEdit's classes have no checks
        new.validate()
    return new


def typed_value(hparams: object, name: str, value: Any) -> Any:
    """A value for a setting of EasyEdit's, whose classes check nothing, in the setting's type.

    Args:
        hparams: The object.
        name: One of its settings. Its type is that of its present value; None tells none.
        value: As YAML or an option gives it: 5e-4 is a text there.

    Returns:
        The value; a number as a float where the setting is one, in lists, too.

    Raises:
        TypeError: It is of another type; the message goes on from the value.
    """
    now = vars(hparams)[name]
    declared = {its.name: its.type for its in fields(hparams)} if is_dataclass(hparams) else {}
    if declared.get(name) in (float, "float") and isinstance(now, int):
        now = float(now)  # a file may say 1
    return _like(now, value)


def _like(now: Any, value: Any) -> Any:
    if now is None or value is None:
        return value
    if isinstance(now, float) and is_number_or_its_text(value):
        return float(value)
    if type(value) is not type(now):
        raise TypeError(f"is a {type(value).__name__}, expected a {type(now).__name__}")
    return [_like(now[0], item) for item in value] if isinstance(now, list) and now else value


def is_number_or_its_text(value: Any) -> bool:
    """Whether it is a number, or the text of one, as YAML reads 5e-4."""
    try:
        return not isinstance(value, bool) and float(value) is not None
    except (TypeError, ValueError):
        return False


def public_settings(hparams: object) -> dict[str, Any]:
    """The settings of an object of any method, for files and fingerprints; a secret's value is ``given``."""
    return {
        name: "given" if name in SECRET and value else value
        for name, value in vars(hparams).items()
        if not (name in EVALUATORS and value is None)
    }


_NAMES_A_PATH = re.compile(r"(\w+_)?(dir|data|path|file|folder)|ensemble|archive|P_loc")
_NO_PATHS = ("embedded", "magnitude", "contriver_dir", "tokenizer_dir")
"""The packaged facts; what ``ensemble`` may be in place of a file; and settings of EasyEdit that sound like folders,
but may name a model of the hub."""


def names_a_path(name: str) -> bool:
    """Whether a setting's name says that it is a file or a folder."""
    return _NAMES_A_PATH.fullmatch(name) is not None


def path_settings(hparams: object) -> dict[str, str]:
    """The settings of hyperparameters, of any method, that name a file or folder, recognised by their names.

    ``model_name`` is none of them: EasyEdit chooses by the words in it, so it must not be changed.
    """
    return {
        name: value
        for name, value in vars(hparams).items()
        if isinstance(value, str)
        and value
        and names_a_path(name)
        and not {name, value} & set(_NO_PATHS)
        and "://" not in value
    }


def resolve_paths(hparams: object) -> None:
    """Makes the paths in hyperparameters, of any method, absolute, relative to the current working directory."""
    for name, value in path_settings(hparams).items():
        setattr(hparams, name, str(expand_path(value)))
