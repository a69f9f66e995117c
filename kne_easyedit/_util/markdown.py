"""Tables in Markdown that are aligned as plain text, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["markdown_table"]


def markdown_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str], width: int = 6) -> str:
    """A Markdown table with aligned columns: a row a label (at least ``width`` characters wide), a column a key.

    Two digits behind the point, whole numbers as they are, ``-`` for None and for what a row lacks.
    """
    width = max([width, *map(len, rows)])
    header = f"| {'method':<{width}} | " + " | ".join(columns) + " |"
    rule = f"|{'-' * (width + 2)}|" + "|".join("-" * (len(name) + 1) + ":" for name in columns) + "|"
    lines = [
        f"| {label:<{width}} | " + " | ".join(f"{_cell(summary.get(name)):>{len(name)}}" for name in columns) + " |"
        for label, summary in rows.items()
    ]
    return "\n".join([header, rule, *lines])


def _cell(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
