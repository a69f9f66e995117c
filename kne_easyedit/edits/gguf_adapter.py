"""LoRA adapters in llama.cpp's own layout, GGUF: converted for one base file, and checked against its tensors.

llama.cpp scales each pair of matrices by ``adapter.lora.alpha`` over that pair's own rank. Its GGUF files name modules
in another way, and hold the rows of some in another order (`_Architecture`).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.messages import shorten
from kne_easyedit.edits.adapter_files import LoraModule, read_adapter

DTYPES = {"float32": np.float32, "float16": np.float16}
_ROTATED = re.compile(r"blk\.\d+\.attn_(q|k)")
"""Modules whose rows are in another order where rotary embeddings turn neighbouring pairs."""


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp's converter does with linear layers of one architecture."""

    pairs: bool = False
    """Rotary embeddings turn neighbouring pairs, where transformers turn halves: it reorders the rows of q and k."""


ARCHITECTURES = {
    "llama": _Architecture(pairs=True),  # Llama, Mistral, SmolLM2 and others
    "smollm3": _Architecture(pairs=True),
    "granite": _Architecture(pairs=True),
    "qwen2": _Architecture(),
    "qwen3": _Architecture(),
    "gemma": _Architecture(),
    "gemma2": _Architecture(),
    "gemma3": _Architecture(),
    "phi3": _Architecture(),
    # Its converter transposes Conv1D's weights; A and B of an adapter are never transposed.
    "gpt2": _Architecture(),
}
"""``general.architecture`` of a base whose conversion was read in llama.cpp's sources -> what it does."""


@dataclass(frozen=True)
class GgufBase:
    """What is needed of a base model's GGUF file; its weights are not read."""

    path: Path
    architecture: str
    blocks: int
    """Decoder layers."""
    heads: int
    key_heads: int
    shapes: Mapping[str, tuple[int, int]]
    """Name of a matrix -> ``(d2, d1)``."""


def read_gguf_base(path: str | os.PathLike[str]) -> GgufBase:
    """Reads the metadata of a model's GGUF file.

    Raises:
        ImportError: The package ``gguf`` is not installed.
        ValueError: It is no GGUF file, or not of one of `ARCHITECTURES`.
    """
    import gguf

    path = Path(path)
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: no complete GGUF file ({error})") from error

    def metadata(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    architecture = metadata("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: its architecture is {shorten(architecture)}; adapters are converted for "
            f"{', '.join(ARCHITECTURES)}. For others use llama.cpp's convert_lora_to_gguf.py on the portable adapter"
        )
    heads = metadata(f"{architecture}.attention.head_count", 1)
    return GgufBase(
        path,
        architecture,
        metadata(f"{architecture}.block_count", 0),
        heads,
        metadata(f"{architecture}.attention.head_count_kv", heads),
        {one.name: (int(one.shape[1]), int(one.shape[0])) for one in reader.tensors if len(one.shape) == 2},
    )


def adapter_to_gguf(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | GgufBase,
    out: str | os.PathLike[str],
    dtype: str = "float32",
) -> dict[str, str]:
    """Converts an adapter in PEFT's format, of either form, for llama.cpp.

    Args:
        adapter: The adapter's folder.
        base: The GGUF file of the base model over which it will be loaded.
        out: The file to write; it must not exist.
        dtype: ``float32`` or ``float16``.

    Returns:
        Module name -> name of its weight in the base file.

    Raises:
        ImportError: The package ``gguf`` is not installed.
        FileExistsError: ``out`` exists.
        ValueError: A file cannot be read, or the adapter does not belong to the base; nothing was written.
    """
    import gguf

    if dtype not in DTYPES:
        raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}, got {shorten(dtype)}")
    if os.path.lexists(out):
        raise FileExistsError(f"{out}: exists; give a file that is to be made, or remove it first")
    config, modules = read_adapter(adapter)
    base = base if isinstance(base, GgufBase) else read_gguf_base(base)
    names = {name: _name(base, name, module) for name, module in modules.items()}
    alpha = float(config["lora_alpha"])
    with tempfile.TemporaryDirectory() as folder:
        unfinished = Path(folder) / "adapter.gguf"
        writer = gguf.GGUFWriter(unfinished, base.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, module in modules.items():
            # The reader multiplies by alpha over the rank: what else the scale has goes into A.
            rank = len(module.a)
            a = module.a.float() * (module.scale * rank / alpha)
            b = _rows_of_base(base, names[name], module.b.float().numpy())
            writer.add_tensor(f"{names[name]}.lora_a", np.ascontiguousarray(a.numpy(), dtype=DTYPES[dtype]))
            writer.add_tensor(f"{names[name]}.lora_b", np.ascontiguousarray(b, dtype=DTYPES[dtype]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        atomic_write(out, unfinished.read_bytes())
    return names


def _name(base: GgufBase, name: str, module: LoraModule) -> str:
    """The name of a module's weight in the base file."""
    import gguf

    kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == base.architecture)
    found = gguf.get_tensor_name_map(kind, base.blocks).get_name(name)
    shape = base.shapes.get(f"{found}.weight")
    if found is None or shape is None:
        raise ValueError(
            f"adapter: {base.path} ({base.architecture}, {base.blocks} layers) has no module {shorten(name)}; the "
            f"adapter is of another model"
        )
    wanted = (len(module.b), module.a.shape[1])
    if shape != wanted:
        raise ValueError(f"adapter: {name} is {wanted}, in {base.path} it is {shape}; the adapter is of another model")
    return f"{found}.weight"


def _rows_of_base(base: GgufBase, name: str, b: np.ndarray) -> np.ndarray:
    """``B`` with its rows in the order of the base file, ``(d2, rank)``.

    Within a head of transformers' layout, unit ``i`` of the first half turns with unit ``i`` of the second half; where
    neighbours turn together, they stand side by side.
    """
    rotated = _ROTATED.match(name)
    if rotated is None or not ARCHITECTURES[base.architecture].pairs:
        return b
    heads = base.heads if rotated[1] == "q" else base.key_heads
    size = len(b) // heads
    places = np.arange(len(b)).reshape(heads, 2, size // 2)
    return b[places.transpose(0, 2, 1).reshape(-1)]
