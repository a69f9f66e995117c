"""Ctrl-C at safe points only: inside, an interrupt is deferred until the code asks for it.

A ``finally`` that restores something is itself interrupted by a signal that comes while it runs. So code that changes a
model for a while does not run under Python's own handler, which raises at any bytecode, but under one that only records
the signal; the program asks at points where raising is safe, at least once every forward pass.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HELD = threading.local()  # signals come to the main thread alone: other threads find no handler here


class Stopped(KeyboardInterrupt):
    """What `stoppable` code was doing was stopped; it is cleaned up after as after Ctrl-C."""


def safe_point() -> None:
    """Passes a SIGINT that came in the meantime to the previous handler, which may raise KeyboardInterrupt here.

    Raises:
        Stopped: It is inside a `stoppable` that is to stop.
    """
    outermost = getattr(_HELD, "outermost", None)
    if outermost is not None:
        outermost.deliver()
    wanted = getattr(_HELD, "stop_wanted", None)
    if wanted is not None and wanted():
        raise Stopped("stopped")


@contextmanager
def stoppable(wanted: Callable[[], bool]) -> Iterator[None]:
    """Inside, in this thread, a `safe_point` raises `Stopped` as soon as it is wanted: Ctrl-C for threads.

    Args:
        wanted: Whether to stop; another thread may decide it.
    """
    before = getattr(_HELD, "stop_wanted", None)
    _HELD.stop_wanted = wanted
    try:
        yield
    finally:
        _HELD.stop_wanted = before


class defer_interrupts:
    """Inside, SIGINT is recorded, and passed to the previous handler at a `safe_point` or at the end of the block.

    Blocks nest; the outermost one counts. Nothing is deferred outside the main thread, where no signals arrive, and
    where no Python handler is in place: SIGINT is ignored then, or ends the process.

    After the handler is restored, until the caller has the result, Python checks for signals at calls only (since 3.11;
    3.10 checks after almost every bytecode, so that some microseconds remain there).

    Args:
        undo: Called if the handler raises at the end of a block that succeeded: its result is lost to the caller.
    """

    def __init__(self, undo: Callable[[], None] | None = None):
        self._undo = undo
        self._before: Callable[[int, FrameType | None], Any] | None = None
        self._came = False
        self._raised: BaseException | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread() or getattr(_HELD, "outermost", None) is not None:
            return
        before = signal.getsignal(signal.SIGINT)
        if callable(before):
            self._before = before
            signal.signal(signal.SIGINT, self._note)  # nothing raises after this
            _HELD.outermost = self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if getattr(_HELD, "outermost", None) is not self:
            return
        undo = self._undo if kind is None else None
        while True:
            try:
                self.deliver()
                _HELD.outermost = None
                signal.signal(signal.SIGINT, self._before)
                if not self._came:
                    break
            # The previous handler raised: at `deliver`, or at the moment when it was restored.
            except BaseException as raised:  # noqa: BLE001  (raised again below)
                self._raised = raised
            self._hold_again()
            if self._raised is not None and undo is not None:
                undo()
                undo = None
        if self._raised is not None:
            raise self._raised

    def deliver(self) -> None:
        """Calls the previous handler if a signal came. Several signals count as one."""
        if self._came and self._before is not None:
            self._came = False
            self._before(signal.SIGINT, sys._getframe(1))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def _hold_again(self) -> None:
        while True:
            try:
                signal.signal(signal.SIGINT, self._note)
                _HELD.outermost = self
                return
            except BaseException as raised:  # noqa: BLE001, PERF203  (a further signal; raised again by __exit__)
                self._raised = raised
