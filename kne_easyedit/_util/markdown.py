"""Markdown: tables, and text of others without any effect."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kne_easyedit._util.messages import printable

__all__ = ["literal", "markdown_table", "table_of_rows"]

_MARKS = re.compile(r"[\\`*\[\]|<>#!~$]|(?<!\w)_|_(?!\w)")
_NUMBER = re.compile(r"(\*\*|<u>)?([+-]?\d|-$)")


def markdown_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str], width: int = 6) -> str:
    """A Markdown table whose columns are aligned as plain text, too.

    Args:
        rows: Label -> values by column; None or a missing value is shown as ``-``, a float with two digits.
        columns: Keys of the values, which are the heads of the columns.
        width: Least number of characters of the first column.
    """
    width = max([width, *map(len, rows)])
    header = f"| {'method':<{width}} | " + " | ".join(columns) + " |"
    rule = f"|{'-' * (width + 2)}|" + "|".join("-" * (len(name) + 1) + ":" for name in columns) + "|"
    lines = [
        f"| {label:<{width}} | " + " | ".join(f"{_cell(summary.get(name)):>{len(name)}}" for name in columns) + " |"
        for label, summary in rows.items()
    ]
    return "\n".join([header, rule, *lines])


def table_of_rows(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head, columns of numbers are aligned to the right."""
    head, *body = rows
    right = [bool(body) and all(_NUMBER.match(row[i]) for row in body) for i in range(len(head))]
    rule = "".join("---:|" if numeric else "---|" for numeric in right)
    return "\n".join(["| " + " | ".join(head) + " |", "|" + rule, *("| " + " | ".join(row) + " |" for row in body)])


def literal(value: object, length: int | None = None) -> str:
    """Any value as one line of text without any effect in Markdown and HTML: no markup, link, picture or formula.

    Addresses stay text, too, where a reader makes links of them (GitHub Flavored Markdown, 6.9).

    An underscore within a word is not markup, and stays.

    Args:
        value: Its ``str`` is taken; blanks are merged, what is not printed becomes a blank.
        length: Characters after which the text is cut; None for all of it.
    """
    line = printable(value)
    cut = line if length is None or len(line) <= length else line[: length - 1] + "…"
    text = html.escape(_MARKS.sub(r"\\\g<0>", cut), quote=False).replace("\\&lt;", "&lt;").replace("\\&gt;", "&gt;")
    return text.replace("://", "&#58;//").replace("www.", "www&#46;")


def _cell(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
