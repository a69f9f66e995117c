"""A process that dies at its n-th file operation: nothing happens after it, no clean-up either."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

OPERATIONS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.scandir",
    "os.listdir",
    "shutil.copyfile",
    "shutil.rmtree",
}
"""Python's audit events of file operations: whatever function is called, it asks here before it acts."""


class Killed(BaseException):
    """No handler of the package catches it."""


class _Shim:
    left: int | None = None
    """File operations before the end; None: no end."""


def _audit(event: str, args: tuple) -> None:
    if _Shim.left is not None and event in OPERATIONS:
        if _Shim.left == 0:
            raise Killed(event)
        _Shim.left -= 1


_INSTALLED: list[bool] = []


@contextmanager
def killed_at(operation: int) -> Iterator[list[bool]]:
    """Inside, the process dies at the file operation of this number, from 0, and the block ends there.

    Yields:
        A list that holds True afterwards if it has died.
    """
    if not _INSTALLED:
        sys.addaudithook(_audit)  # for good: hooks cannot be removed
        _INSTALLED.append(True)
    died: list[bool] = []
    _Shim.left = operation
    try:
        with suppress(Killed):
            yield died
            _Shim.left = None
        if _Shim.left is not None:
            died.append(True)
    finally:
        _Shim.left = None


@contextmanager
def killed_in_write(number: int) -> Iterator[list[bool]]:
    """Inside, the process dies in the write of this number, from 0, when half of the file's bytes are on the disk.

    Yields:
        As `killed_at`.
    """
    real, left = os.fsync, [number]

    def half(file: int) -> None:
        if left[0] == 0:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            _Shim.left = 0
            raise Killed("write")
        left[0] -= 1
        real(file)

    os.fsync = half
    try:
        with killed_at(sys.maxsize) as died:
            yield died
    finally:
        os.fsync = real
