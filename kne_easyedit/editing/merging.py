"""Edits merged into a model's files: a full model that anything loads, without loading the base."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


def merge_edits(
    edits: Sequence[Any],
    model_folder: str | os.PathLike[str],
    out_folder: str | os.PathLike[str],
    *,
    force: bool = False,
) -> None:
    """Writes a full model with edits merged."""
    raise NotImplementedError
