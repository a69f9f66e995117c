"""JSON lines on disk: appended durably, read up to an incomplete end; lines of other settings are moved aside."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kne_easyedit._util.files import atomic_write, name_file, parse_json

logger = logging.getLogger(__name__)


class Lines:
    """A file of JSON objects, one a line, each with a ``fingerprint`` of the settings that it belongs to.

    Lines of other runs are moved to a file of their own beside it, which nothing overwrites. Lines in such files that
    belong to the run that opens the file are taken back, unless the file has a line of the same key: settings tried
    before are not computed again. What is no JSON object is moved to a file of its own, too; only an incomplete last
    line, as a killed process leaves it, is dropped.

    Args:
        path: The file; it need not exist.
        keep: Whether a line belongs to the run that opens the file.
        key: The fields of which a run has one line for each combination of values.
        others: Folders of other jobs: lines of this run in files of the same name there are taken over.
    """

    def __init__(
        self,
        path: Path,
        keep: Callable[[dict], bool],
        key: Sequence[str] = ("method", "index"),
        others: Iterable[Path] = (),
    ):
        self.path = path
        pieces = list(_pieces(path))
        found = [piece.line for piece in pieces if piece.line is not None]
        # The incomplete line of a killed run is computed again; anything else may be the only copy of a result.
        if unreadable := [piece.content for piece in pieces if piece.line is None and not piece.incomplete]:
            name = _free_name(path, "unreadable")
            atomic_write(name, b"\n".join(unreadable) + b"\n")
            logger.warning("%s: %s lines that cannot be read moved to %s", path, len(unreadable), name.name)
        elsewhere = [
            line
            for folder in others
            for file in [*_aside(folder / path.name), folder / path.name]
            for line in _objects(file)
        ]
        aside = [line for file in _aside(path) for line in _objects(file)]
        own = [line for line in (*elsewhere, *aside, *found) if keep(line)]
        # The latest of each key.
        self.lines: list[Mapping] = list({tuple(line.get(name) for name in key): line for line in own}.values())
        known = set(map(_text_of, aside))
        if strange := [line for line in found if not keep(line) and _text_of(line) not in known]:
            name = _free_name(path, "other")
            atomic_write(name, _text(strange))
            logger.warning("%s: %s lines of other settings moved to %s", path, len(strange), name.name)
        if self.lines or found or path.exists():
            atomic_write(path, _text(self.lines))  # without the incomplete line

    def append(self, line: Mapping) -> None:
        """Adds a line; it is on the disk when this returns.

        Raises:
            OSError: It cannot be written, for example because the disk is full; the error names the file, which holds
                what it held before.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                content = memoryview(_text_of(line).encode())
                while content:  # a disk that is nearly full takes a part
                    content = content[stream.write(content) :]
                os.fsync(stream.fileno())
            except OSError as error:
                with contextlib.suppress(OSError):  # an incomplete line is known as such when the file is read
                    stream.truncate(before)
                name_file(error, self.path)
                raise
        self.lines.append(line)


def read_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """The objects of a file with the numbers of their lines, from 1. An incomplete last line is left out.

    Raises:
        ValueError: With the file and the line, for anything else that is no JSON object.
    """
    for piece in _pieces(path):
        if piece.line is not None:
            yield piece.number, piece.line
        elif piece.incomplete:
            logger.warning(
                "%s: line %s is incomplete: the run was killed, the same command resumes it", path, piece.number
            )
        else:
            raise ValueError(f"{path}: line {piece.number}: {piece.fault}")


@dataclass(frozen=True)
class _Piece:
    """One line of a file."""

    number: int
    content: bytes
    line: dict | None
    """None if it is no JSON object."""
    fault: str
    incomplete: bool
    """Whether it is an incomplete last line."""


def _pieces(path: Path) -> Iterator[_Piece]:
    r"""The lines of a file, blank ones left out; nothing if there is no file.

    A line ends with ``\n`` only: JSON escapes that within texts, but not Unicode's line separators (U+2028, U+0085).
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for number, read in enumerate(stream, start=1):  # one by one: a file may be larger than what is kept of it
            if content := read.removesuffix(b"\n") if read.strip() else b"":
                line, fault = _object(content)
                incomplete = not read.endswith(b"\n") and content.lstrip().startswith(b"{")
                yield _Piece(number, content, line, fault, incomplete)


def _object(content: bytes) -> tuple[dict | None, str]:
    try:
        found = parse_json(content)
    except ValueError as error:
        return None, str(error)
    return (found, "") if isinstance(found, dict) else (None, f"a {type(found).__name__}, expected a JSON object")


def _objects(path: Path) -> list[dict]:
    return [piece.line for piece in _pieces(path) if piece.line is not None]


def _text(lines: Iterable[Mapping]) -> str:
    return "".join(map(_text_of, lines))


def _text_of(line: Mapping) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _aside(path: Path) -> list[Path]:
    """The files beside ``path`` that hold lines of other settings, the oldest first."""
    return sorted(path.parent.glob(f"{path.stem}.other-*{path.suffix}"), key=_number)


def _free_name(path: Path, what: str) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.stem}.{what}-{number}{path.suffix}")).exists():
        number += 1
    return aside


def _number(aside: Path) -> int:
    """The number in a name of `_free_name`; 0 for any other name."""
    number = aside.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else 0
