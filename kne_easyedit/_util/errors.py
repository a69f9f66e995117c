"""Errors that several modules raise or catch. Standard library only."""

from __future__ import annotations


class RunStopped(RuntimeError):
    """A run that cannot go on, through no fault of its input; what was finished is kept.

    The message says why, and what to do.
    """
