"""What a check has found, and how figures read in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

OK, WARNING, FAILURE = "ok", "warning", "failure"


@dataclass(frozen=True)
class Finding:
    """One answer of a check. Only a ``failure`` stands in the way."""

    name: str
    status: Literal["ok", "warning", "failure"]
    text: str
    """One line, or more where a list is needed."""
    way_out: str = ""


def failure(name: str, error: Exception | str) -> Finding:
    """An error as a finding: this package's messages say what is wrong and, behind a semicolon, what to do."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text, _, way_out = lines[0].partition("; ")
    return Finding(name, FAILURE, text, way_out)


def left_out(name: str, why: str) -> Finding:
    return Finding(name, WARNING, f"left out: {why}")


def listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def size(number: float) -> str:
    """Bytes for people."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes = seconds / 60
    return f"{seconds:.1f} s" if minutes < 1 else f"{minutes:.0f} min" if minutes < 60 else f"{minutes / 60:.1f} h"
