"""The result of a check, and the format of its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "warning", "failure"]
OK: Status = "ok"
WARNING: Status = "warning"
FAILURE: Status = "failure"
DATA = "data"
"""The name of findings about the records."""


@dataclass(frozen=True)
class Finding:
    """One result of a check. Only a ``failure`` prevents the run."""

    name: str
    status: Status
    text: str
    """One line, or several for a list."""
    way_out: str = ""
    """What the user can do about it."""


def failure(name: str, error: Exception | str) -> Finding:
    """An error as a finding: this package's messages say what is wrong and, after a semicolon, what to do."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text, _, way_out = lines[0].partition("; ")
    return Finding(name, FAILURE, text, way_out)


def left_out(name: str, why: str) -> Finding:
    """A check that was not made."""
    return Finding(name, WARNING, f"left out: {why}")


def listed(values: Mapping[str, object]) -> str:
    """Names and values on one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def size(number: float) -> str:
    """Bytes in a readable unit."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    minutes = seconds / 60
    return f"{seconds:.1f} s" if minutes < 1 else f"{minutes:.0f} min" if minutes < 60 else f"{minutes / 60:.1f} h"
