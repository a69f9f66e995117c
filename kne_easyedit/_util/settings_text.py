"""The text of a settings file: comments from the fields' docstrings, values put into it. Nothing else changes."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import yaml

COLUMN = 27
"""Where comments begin, if the setting is not longer."""
_SETTING = re.compile(r"""(?:"[^"]*"|[^"#])*""")
"""A line up to its comment; texts in quotes may hold the sign of a comment."""


def field_help(cls: type) -> dict[str, str]:
    """Field -> the first sentence of its docstring, as plain text (null for None) without a full stop.

    Args:
        cls: A dataclass with a docstring below each field.
    """
    body = [node for tree in ast.parse(inspect.getsource(cls)).body for node in getattr(tree, "body", [])]
    found = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            first = re.split(r"\.(?=\s+[A-Z]|\s*$)", " ".join(str(text.value.value).split()))[0]
            found[ast.unparse(field.target)] = re.sub(r"\bNone\b", "null", first.replace("`", ""))
    return found


def commented(text: str, helps: Mapping[str, str]) -> str:
    """The text of a settings file with the comment of each setting replaced, and all else as it is.

    Args:
        text: The file.
        helps: Setting -> its comment (`field_help`).
    """
    lines = []
    for line in text.splitlines():
        name = line.split(":", 1)[0]
        if name in helps:
            setting = _SETTING.findall(line)[0].rstrip()
            line = f"{setting.ljust(COLUMN - 2)}  # {helps[name]}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """The text of a settings file with other values; their comments are dropped, all else stays.

    Args:
        text: The file; every setting stands in one line.
        values: Setting -> its new value. Each must stand in the text.
    """
    lines = text.splitlines()
    for name, value in values.items():
        (number,) = [i for i, line in enumerate(lines) if line.split(":", 1)[0] == name]
        lines[number] = f"{name}: {_inline(value)}"
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    """A value as YAML in one line. Texts that need quotes get double ones, as in the shipped files."""
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    text = yaml.safe_dump(value, allow_unicode=True, width=10**9).removesuffix("...\n").strip()
    if isinstance(value, str) and (text != value or "{" in value):
        text = yaml.safe_dump(value, allow_unicode=True, width=10**9, default_style='"').strip()
    return text
