"""Weights of modules in a model's files, by the module's name in the loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from kne_easyedit._util.tensor_files import DTYPES, Place

File = TypeVar("File")


def candidates(name: str, shape: tuple[int, int], files: Mapping[File, Mapping[str, Place]]) -> list[tuple[File, str]]:
    """Files and keys that may be a module's weight, the exact name first.

    Files name modules with other prefixes than the loaded model has: ``h.0.mlp`` for ``transformer.h.0.mlp``,
    ``language_model.model.layers`` for ``model.language_model.layers``.

    Args:
        name: The module.
        shape: Of its weight, as it is stored.
        files: Each file -> its tensors.
    """
    wanted = f"{name}.weight"
    parts = wanted.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
    tail = ".".join(parts[max(number - 1, 0) :])
    found = [
        (file, key)
        for file, tensors in files.items()
        for key, place in tensors.items()
        if (key == tail or key.endswith(f".{tail}")) and place.shape == tuple(shape) and place.dtype in DTYPES
    ]
    return sorted(found, key=lambda one: one[1] != wanted)
