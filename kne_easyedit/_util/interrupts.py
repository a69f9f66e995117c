"""Ctrl-C at safe points only: inside, an interrupt waits until the code asks for it.

A ``finally`` that puts something back is itself interrupted by a signal that comes while it runs. So what changes a
model for a while does not run under Python's own handler, which raises at any bytecode, but under one that only notes
the signal; the program asks at points where raising is safe, once every forward pass at least.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable

_HELD = threading.local()  # signals come to the main thread alone: other threads find nothing here


def safe_point() -> None:
    """Gives a SIGINT that came in the meantime to the handler that was in place before: it may raise KeyboardInterrupt here."""
    outermost = getattr(_HELD, "outermost", None)
    if outermost is not None:
        outermost.deliver()


class defer_interrupts:
    """Inside, SIGINT is noted, and given to the handler that was in place before at a `safe_point` or at the end.

    ``undo`` is called if the handler raises at the end of a block that succeeded: the result of the block is then lost to the
    caller. Blocks nest, the outermost one holds. Nothing is held outside of the main thread, where no signals arrive, and
    where no Python handler is in place: SIGINT is ignored then, or ends the process.

    From the moment when the handler is back until the caller has the result, Python itself looks for signals at calls only
    (since 3.11; 3.10 looks after almost every bytecode, so that some microseconds remain there).
    """

    def __init__(self, undo: Callable[[], None] | None = None):
        self._undo, self._before, self._came, self._raised = undo, None, False, None

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread() or getattr(_HELD, "outermost", None) is not None:
            return
        before = signal.getsignal(signal.SIGINT)
        if callable(before):
            self._before = before
            signal.signal(signal.SIGINT, self._note)  # nothing raises from here on
            _HELD.outermost = self

    def __exit__(self, kind, error, trace) -> None:
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
            except (
                BaseException
            ) as raised:  # by the handler before: at `deliver`, or in the moment in which it came back
                self._raised = raised
            self._hold_again()
            if self._raised is not None and undo is not None:
                undo()
                undo = None
        if self._raised is not None:
            raise self._raised

    def deliver(self) -> None:
        """Calls the handler before if a signal came. Several signals are one, as everywhere."""
        if self._came:
            self._came = False
            self._before(signal.SIGINT, sys._getframe(1))

    def _note(self, number, frame) -> None:
        self._came = True

    def _hold_again(self) -> None:
        while True:
            try:
                signal.signal(signal.SIGINT, self._note)
                _HELD.outermost = self
                return
            except BaseException as raised:  # a further signal, before the handler was exchanged
                self._raised = raised
