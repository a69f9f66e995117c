"""Who does what: processes, on any number of machines, that share a folder claim pieces of work in a file there.

A claim is a lock of one byte of that file, whose place follows from the piece's name. The system releases it when the
process ends, however it ends, and no clock is asked: neither a killed process nor one whose clock is wrong can keep or
lose a claim. On a file system without such locks nothing is claimed; the same work may then be done twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

FILE = ".claims"
"""The name of the file. Its content does not matter, and it may be removed at any time."""
_WITHOUT: set[Path] = set()
"""Files on systems without locks, each of which is told of once."""


@contextlib.contextmanager
def claimed(folder: Path, names: Iterable[str]) -> Iterator[bool]:
    """Claims all of ``names`` for this process as long as the block lasts, or none of them.

    The claims belong to the process: in other threads of it they count as its own. One block a process at a time; the
    end of an inner one would release the outer one's claims.

    Args:
        folder: The shared folder; it must exist.
        names: Names of the pieces of work.

    Yields:
        Whether they are claimed; False: another process has one of them.

    Raises:
        OSError: The folder cannot be written.
    """
    # In one order everywhere: of two processes that want the same names at the same time one gets them all.
    places = sorted({int(hashlib.sha256(name.encode()).hexdigest()[:15], 16) for name in names})
    file = (folder / FILE).open("ab")
    try:
        ours = all(_lock(file, place, folder) for place in places)
        if not ours:
            file.close()  # with the claims that were made before the one that failed
        yield ours
    finally:
        file.close()


def _lock(file: IO[bytes], place: int, folder: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes
        return False
    except OSError as error:
        if folder not in _WITHOUT:
            _WITHOUT.add(folder)
            logger.warning(
                "%s: this file system has no locks (%s): processes that share the folder may do the same work twice, "
                "which changes no result",
                folder,
                error.strerror or error,
            )
    return True
