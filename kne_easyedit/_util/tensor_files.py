"""Tensors in safetensors files, one at a time: written without a copy of all, and found by their place in a file.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: name -> type, shape, first
and last byte), and the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kne_easyedit._util.files import parse_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names of the number types that are read and written here."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file."""

    dtype: str
    """Safetensors' name of its number type."""
    shape: tuple[int, ...]
    start: int
    """Offset in the file, in bytes."""
    end: int


def places(path: str | os.PathLike[str]) -> dict[str, Place]:
    """The tensors of a safetensors file, by name; reads its header only.

    Raises:
        ValueError: It is no safetensors file, or it is truncated; the message names it.
        OSError: It cannot be read.
    """
    header, first = _header(Path(path))
    header.pop("__metadata__", None)
    return {
        name: Place(one["dtype"], tuple(one["shape"]), first + one["data_offsets"][0], first + one["data_offsets"][1])
        for name, one in header.items()
    }


def texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in the header of a safetensors file. Raises as `places`."""
    return _header(Path(path))[0].get("__metadata__") or {}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the offset of the first tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):  # the library's own checks: lengths, overlaps, types
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: no complete safetensors file ({error})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return parse_json(file.read(length)), 8 + length


def read_tensor(file: BinaryIO, place: Place) -> Tensor:
    """Reads one tensor of an open safetensors file.

    Raises:
        ValueError: Its number type is none of `DTYPES`, or the file ends before it.
    """
    if place.dtype not in DTYPES:
        raise ValueError(f"its numbers are {place.dtype}, expected one of {', '.join(DTYPES)}")
    content = bytearray(place.end - place.start)
    file.seek(place.start)
    if file.readinto(content) != len(content):  # type: ignore[attr-defined]
        raise ValueError("it ends before its tensors do")
    if not content:
        return torch.empty(place.shape, dtype=DTYPES[place.dtype])
    return torch.frombuffer(content, dtype=DTYPES[place.dtype]).reshape(place.shape)


def write_tensor(file: BinaryIO, place: Place, tensor: Tensor) -> None:
    """Writes one tensor over its place in an open file; type and shape are those of ``place``."""
    file.seek(place.start)
    file.write(bytes_of(tensor))


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor, contiguous, without a copy where it is so on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def values_digest(values: Tensor) -> str:
    """SHA-256 (hex) of a tensor's bytes."""
    return hashlib.sha256(bytes_of(values)).hexdigest()


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, one tensor at a time, and sees that it is on the disk.

    Args:
        path: The file; it must not exist.
        tensors: Asked twice for each tensor, and never for all at once: they may be read from elsewhere.
        metadata: Texts for its header.

    Raises:
        OSError: It exists, or cannot be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in _items(tensors):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in _items(tensors):
            file.write(bytes_of(tensor))
        file.flush()
        os.fsync(file.fileno())


def _items(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name in tensors:
        yield name, tensors[name]
