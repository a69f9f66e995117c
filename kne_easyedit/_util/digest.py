"""What stands for a value: the same digest in every process."""

from __future__ import annotations

import hashlib
import json

__all__ = ["digest"]


def digest(value) -> str:
    """SHA-256 (hex) of lists, mappings, sets and whatever has a text or attributes of its own (paths, types, settings)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value):
    if isinstance(value, (set, frozenset)):
        return sorted(value)  # a set's own order differs from process to process
    if type(value).__str__ is object.__str__ and type(value).__repr__ is object.__repr__:
        return [type(value).__name__, vars(value)]  # its text is its address, which differs likewise
    return str(value)
