"""A digest of a value, the same in every process."""

from __future__ import annotations

import hashlib
import json
from typing import Any

__all__ = ["digest"]


def digest(value: object) -> str:
    """SHA-256 (hex) of a value as JSON.

    Beside JSON's own types: sets, objects with a ``str`` of their own (paths, types), and objects by their attributes.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, (set, frozenset)):
        return sorted(value)  # a set's own order differs from process to process
    kind: Any = type(value)
    if kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__:
        return [kind.__name__, vars(value)]  # its str is its address, which differs likewise
    return str(value)
