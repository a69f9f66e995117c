"""Reads data files: JSON, JSON Lines or CSV, recognised by their content. `schemas` maps the records' fields."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

EMBEDDED = "embedded"
"""Names the packaged facts where a data file is asked for."""
DELIMITERS = ",\t;"
"""Of CSV files; the first that gives the header a known name is used."""
COLUMNS = {"prompt", "template", "text", "src"}
"""Names of the prompt in a header: a CSV file is recognised by one of them."""
REWRITE = "requested_rewrite"
"""The field of CounterFact's and MQuAKE's records that holds the prompt."""
FORMATS = (
    "a JSON list of records, JSON Lines (one record a line), or a CSV file whose header names prompt and target_new"
)


class _AsWritten(float):
    """A number of JSON that keeps its digits: an answer 3.10 is not 3.1."""

    def __new__(cls, text: str) -> _AsWritten:
        new = super().__new__(cls, text)
        new._text = text
        return new

    _text: str

    def __str__(self) -> str:
        return self._text


class Unreadable(str):
    """Takes the place of a record that cannot be read; the text says where in the file, and why."""


def read_records(path: str | Path) -> list[Any]:
    """The records of a data file, unchanged and in order.

    Args:
        path: The file; ``~`` and environment variables are expanded. ``embedded``: the packaged facts.

    Returns:
        The records; in place of a line of JSON Lines or CSV that cannot be read, an `Unreadable`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no data file; the message names it.
    """
    if str(path) == EMBEDDED:
        return json.loads(_embedded().read_text(encoding="utf-8"))
    real = _real(path)
    if not real.is_file():
        raise FileNotFoundError(
            f"data file {real} does not exist; KnowEdit is published as zjunlp/KnowEdit, {EMBEDDED!r} needs no file"
        )
    try:
        text = real.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        raise ValueError(f"{real}: not a JSON file: {error}; save it as UTF-8") from error
    try:
        content = json.loads(text, parse_float=_AsWritten)
    except RecursionError as error:
        raise ValueError(f"{real}: not a JSON file of records: it is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, and numbers of thousands of digits
        try:
            records = _json_lines(text) if text.lstrip().startswith("{") else _csv(text)
        except ValueError as fault:
            raise ValueError(f"{real}: {fault}") from fault
        if records is None:
            raise ValueError(f"{real}: not a JSON file: {error}; expected {FORMATS}") from error
        return records
    if isinstance(content, dict) and (COLUMNS | {REWRITE}) & content.keys():
        content = [content]  # JSON Lines of one line
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: not a KnowEdit file, expected {FORMATS}, found {type(content).__name__}")
    return content


def data_digest(path: str | Path) -> str | None:
    """SHA-256 of a data file; None if there is no such file."""
    real = _embedded() if str(path) == EMBEDDED else _real(path)
    return hashlib.sha256(real.read_bytes()).hexdigest() if real.is_file() else None


def same_data(one: str | Path, other: str | Path) -> bool:
    """Whether two names are of one data file, however they are written (relative, by ``~``, by a link)."""
    if EMBEDDED in (str(one), str(other)):
        return str(one) == str(other)
    return _real(one).resolve() == _real(other).resolve()


def _embedded() -> Traversable:
    return files("kne_easyedit.facts").joinpath("facts.json")


def _real(path: str | Path) -> Path:
    return Path(os.path.expandvars(str(path))).expanduser()


def _json_lines(text: str) -> list | None:
    """The records; None if no line holds one. Lines end with a line feed only: U+2028 may be part of a text."""
    records: list[Any] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line, parse_float=_AsWritten))
        except (ValueError, RecursionError) as error:
            records.append(Unreadable(f"line {number}: no JSON ({error})"))
    return records if any(isinstance(record, dict) for record in records) else None


def _csv(text: str) -> list | None:
    """The records, keyed by the header's names; empty cells are left out. None if there is no such header.

    Raises ValueError for a name that stands twice in it.
    """
    text = text.lstrip("\r\n")
    for delimiter in DELIMITERS:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            names = [name.strip() for name in next(rows, [])]
        except csv.Error:
            continue
        if len(names) > 1 and COLUMNS & set(names):
            if twice := [name for name in names if name and names.count(name) > 1]:
                raise ValueError(f"{twice[0]!r} stands twice in the header; rename one, or leave it out")
            return list(_rows(rows, names))
    return None


def _rows(rows: Any, names: list[str]) -> Iterator[dict | Unreadable]:
    while True:
        begin = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # the reader goes on with the next line; an open quote has taken all of them
            more = f" to {rows.line_num}" if rows.line_num > begin else ""
            yield Unreadable(f"line {begin}{more}: no CSV ({error})")
            continue
        if len(cells) == len(names):
            yield {name: cell for name, cell in zip(names, cells) if name and cell.strip()}
        elif cells:
            yield Unreadable(
                f"line {rows.line_num}: {len(cells)} cells, the header has {len(names)}; quote cells that hold the "
                f"delimiter"
            )
