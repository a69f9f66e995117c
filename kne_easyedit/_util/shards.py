"""Parts ``i/n`` of a list of work."""

from __future__ import annotations

WHOLE = "0/1"


def shard_of(text: str) -> tuple[int, int]:
    """``"i/n"`` as numbers. Raises ValueError for anything else."""
    i, slash, n = str(text).partition("/")
    if not slash or not i.isdigit() or not n.isdigit() or not int(i) < int(n):
        raise ValueError(f"shard: {text!r} is no part i/n with i from 0 to n - 1")
    return int(i), int(n)
