"""Reads LoRA adapters in PEFT's format: safetensors and JSON only, checked before anything is used."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kne_easyedit._util.files import parse_json
from kne_easyedit._util.messages import shorten

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's, before the name of a module."""
_PATTERN = re.compile(r"\^?(?:[\w-]|\.|\\[^\w]|\\[dw])*\$?")
"""Patterns of names that are run as regular expressions: without groups and repetitions their time is bounded."""
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
_PLAIN = {
    "use_dora": False,
    "use_qalora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}
"""Fields that may only have these values: with others an adapter is more than ``A`` and ``B``."""


@dataclass(frozen=True)
class LoraModule:
    """What an adapter adds to the weight ``(d2, d1)`` of one module: ``scale * b @ a``."""

    a: Tensor
    """``(rank, d1)``."""
    b: Tensor
    """``(d2, rank)``."""
    scale: float

    @property
    def delta(self) -> Tensor:
        """``(d2, d1)``."""
        return self.scale * (self.b @ self.a)


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, LoraModule]]:
    """Reads an adapter as PEFT scales it, rank patterns and rank-stabilised scaling included.

    Args:
        folder: With adapter_config.json and adapter_model.safetensors.

    Returns:
        The configuration, and module name -> its matrices and scale.

    Raises:
        ValueError: A file is missing, truncated or of another kind; the message names file and field.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(f"{folder / WEIGHTS_FILE}: {shorten(key)} is no matrix of a LoRA layer")
        modules.setdefault(found[1], {})[found[2]] = tensor
    return config, {name: _module(folder, config, name, pair) for name, pair in modules.items()}


def _module(folder: Path, config: Mapping[str, Any], name: str, pair: Mapping[str, Tensor]) -> LoraModule:
    where = f"{folder / WEIGHTS_FILE}: {shorten(name)}"
    if len(pair) != 2:
        raise ValueError(f"{where} has lora_{next(iter(pair))} only")
    a, b = pair["A"], pair["B"]
    rank, alpha = (
        _of_pattern(config, "rank_pattern", name, "r"),
        _of_pattern(config, "alpha_pattern", name, "lora_alpha"),
    )
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or len(a) != rank:
        raise ValueError(f"{where} has A {tuple(a.shape)} and B {tuple(b.shape)}, and {CONFIG_FILE} the rank {rank}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"{where} has values that are not finite")
    return LoraModule(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_pattern(config: Mapping[str, Any], pattern: str, name: str, default: str) -> Any:
    """A module's own value; PEFT takes the first pattern that matches the end of its name."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return config[default]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not read ({error}); an adapter's folder has {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: not the configuration of a LoRA adapter (peft_type must be LORA)")
    numbers = {
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        **{f"rank_pattern: {shorten(key)}": value for key, value in _mapping(path, config, "rank_pattern").items()},
        **{f"alpha_pattern: {shorten(key)}": value for key, value in _mapping(path, config, "alpha_pattern").items()},
    }
    for field, value in numbers.items():
        whole = field.startswith("r")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < 1e9:
            raise ValueError(
                f"{path}: {field} must be a positive {'integer' if whole else 'number'}, got {shorten(value)}"
            )
    for field, plain in _PLAIN.items():
        empty: list[Any] = [[], {}] if plain is None else [None]
        if config.get(field, plain) not in (plain, *empty):
            raise ValueError(
                f"{path}: {field} must be {plain!r}, got {shorten(config[field])}: that is more than A and B"
            )
    return config


def _mapping(path: Path, config: Mapping[str, Any], field: str) -> dict[str, Any]:
    found = config.get(field) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {field} must be a mapping, got {shorten(found)}")
    for key in found:
        if not _PATTERN.fullmatch(key):
            raise ValueError(
                f"{path}: {field}: {shorten(key)} is no plain name of a module: a regular expression with groups or "
                f"repetitions is not run here; write one name for each module"
            )
    return found


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path}: missing; only safetensors are read here, no pickles (adapter_model.bin)")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated, or no safetensors file ({error})") from error
    if not tensors:
        raise ValueError(f"{path}: there is no tensor in it")
    return tensors
