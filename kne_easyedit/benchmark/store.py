"""JSON lines on disk: appended safely, read in spite of a torn end, never mixed and never lost."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from kne_easyedit.paths import atomic_write

logger = logging.getLogger(__name__)


class Lines:
    """A file of JSON objects, one a line, each with a ``fingerprint`` of the settings that it belongs to.

    ``keep(line)`` says whether a line that is there already belongs to the run that opens the file. Lines that do not
    are moved to a file of their own beside it, which nothing overwrites; those in such files that belong to it (again)
    are taken back, unless the file has a line of the same ``key``, so that settings tried before are not computed again.
    """

    def __init__(self, path: Path, keep: Callable[[dict], bool], key: Sequence[str] = ("method", "index")):
        self.path = path
        found = read_lines(path)
        aside = [line for file in sorted(path.parent.glob(f"{path.stem}.other-*{path.suffix}"), key=_number) for line in read_lines(file)]
        here = {tuple(line.get(name) for name in key): line for line in [*filter(keep, aside), *filter(keep, found)]}  # the latest of each
        self.lines = list(here.values())
        known = set(map(_text_of, aside))
        if others := [line for line in found if not keep(line) and _text_of(line) not in known]:
            name = _free_name(path)
            atomic_write(name, _text(others))
            logger.warning("%s: %s lines of other settings moved to %s", path, len(others), name.name)
        if self.lines or found or path.exists():
            atomic_write(path, _text(self.lines))  # without what a kill has torn

    def append(self, line: dict) -> None:
        """Adds a line; it is on the disk when this returns."""
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            stream.write(_text_of(line).encode())
            stream.flush()
            os.fsync(stream.fileno())


def read_lines(path: Path) -> list[dict]:
    """The lines of a file; what a kill has torn is left out. Empty if there is no file."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return [line for line in found if isinstance(line, dict)]


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds ``folder`` for this process. Raises ValueError if another run writes into it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{folder}: another run is writing into it; wait for it, or choose another folder") from error
        yield


def _text(lines: Iterable[dict]) -> str:
    return "".join(map(_text_of, lines))


def _text_of(line: dict) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.stem}.other-{number}{path.suffix}")).exists():
        number += 1
    return aside


def _number(aside: Path) -> int:
    """That of a name that `_free_name` gave; 0 for one that somebody else did."""
    number = aside.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else 0
