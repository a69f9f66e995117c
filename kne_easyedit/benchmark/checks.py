"""Checks of values from files and configurations: each raises ValueError that names the field and the value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from kne_easyedit.metrics import is_number

LONGEST = 100
"""Characters of a label or a name at most: it is a row's head, a legend's entry, the name of a folder."""


def require_name(field: str, name: object) -> str:
    """The name, if it can be one part of a path on any system and a cell of a table.

    Args:
        field: What the message calls it.
        name: A label, or the name of a model or data set.

    Raises:
        ValueError: Names the field and the reason.
    """
    reason = None
    if not isinstance(name, str) or not name:
        reason = "is no text"
    elif len(name) > LONGEST or len(name.encode("utf-8", "replace")) > 2 * LONGEST:
        reason = f"has more than {LONGEST} characters"
    elif not name.isprintable() or set(name) & set('/\\<>:"|?*'):
        reason = (
            'holds a character that no file name may have everywhere: / \\ < > : " | ? *, or one that is not printed'
        )
    elif name.startswith(".") or name != name.strip() or name.endswith("."):
        reason = "begins or ends with a dot or a blank"
    elif PurePath(name).name != name:
        reason = "is more than the name of one file"
    if reason or not isinstance(name, str):
        raise ValueError(f"{field}: {str(name)[:LONGEST]!r} {reason}; folders and files are called by it")
    return name


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raises ValueError, naming the field and the value, unless ``ok``."""
    if not ok:
        shown = repr(value) if is_number(value) or isinstance(value, str) else f"a {type(value).__name__}"
        raise ValueError(f"{name}: {shown[:80]} is not {expected}")


def require_shape(value: Any, shape: Mapping, where: str) -> None:
    """Raises ValueError, naming the field, unless ``value`` is a mapping with the keys and types of ``shape``.

    ``shape`` maps a key to a type, or to the shape of a mapping; ``where`` is the path of ``value``, with a final dot.
    """
    require(isinstance(value, dict), where.rstrip(".") or "manifest", value, "a mapping")
    for name, kind in shape.items():
        require(name in value, f"{where}{name}", None, "there")
        if isinstance(kind, dict):
            require_shape(value[name], kind, f"{where}{name}.")
        else:
            require(isinstance(value[name], kind), f"{where}{name}", value[name], f"a {kind.__name__}")


def is_int(value: object) -> bool:
    """Whether it is a whole number that 64 bits can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
