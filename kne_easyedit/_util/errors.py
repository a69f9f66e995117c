"""Errors that several modules raise or catch. Standard library only."""

from __future__ import annotations


class RunStopped(RuntimeError):
    """A run that cannot go on, through no fault of its input; what was finished is kept.

    The message says why, and what to do.
    """


_NO_MEMORY = ("allocate memory", "not enough memory", "out of memory")
"""How torch says it in a RuntimeError: the CPU's allocator on Linux and on Windows, and drivers of devices."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice: Python's, or torch's of a GPU or of the CPU's allocator.

    torch is not imported for it: its errors are known by their names and texts.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
