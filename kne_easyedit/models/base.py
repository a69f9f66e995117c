"""What an edit says about the model that it was trained on, so that another model is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit._util.digest import digest as text_digest
from kne_easyedit._util.tensor_files import values_digest
from kne_easyedit.models.fingerprint import quantisation_states
from kne_easyedit.models.targets import in_features, out_features, rows
from kne_easyedit.models.weights import Weight, linear_module

STRUCTURE = {
    "model_type": ("model_type",),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "activation": ("hidden_act", "activation_function", "hidden_activation"),
}
"""What is compared of a configuration -> its names. Names that versions of transformers write differently (rotary
embeddings), and what may change without another model (vocabulary, positions, number type), are left out."""


@dataclass(frozen=True)
class BaseModule:
    """The unedited weight of one linear layer."""

    shape: tuple[int, int]
    """``(d2, d1)``: output units and input units, whatever the orientation."""
    dtype: str
    """Number type, as torch names it: ``float32``, ``bfloat16``, ..."""
    sha256: str
    """Of the matrix's bytes, as it is stored (`weight_digest`), and of a quantised layer's `quantisation_states`."""
    transposed: bool = False
    """Stored as ``(d1, d2)``: GPT-2's Conv1D."""


@dataclass(frozen=True)
class Base:
    """Fingerprint of a model: its structure, and the weights of the modules that an edit touches."""

    architecture: str
    """Name of the model's class."""
    config: Mapping[str, Any]
    """The entries of `STRUCTURE` that the configuration has."""
    modules: Mapping[str, BaseModule]
    """Module name -> its weight without any edit."""
    name: str = ""
    """Path or hub name, as text; never read."""
    revision: str = ""
    """Commit on the hub, if it is known, as text."""

    @property
    def label(self) -> str:
        """Name and revision for messages."""
        name = self.name or self.architecture
        return f"{name!r} (revision {self.revision})" if self.revision else repr(name)

    def conflict(self, other: Base) -> str | None:
        """Why the two are of different models; None if nothing says so.

        Args:
            other: Of another edit or of a loaded model. Weights are compared where both have the module in the same
                number type.
        """
        if self.architecture != other.architecture:
            return f"it is of a {self.architecture}, and this is a {other.architecture}"
        for name, value in self.config.items():
            if name in other.config and other.config[name] != value:
                return f"its {name} is {value!r}, here it is {other.config[name]!r}"
        for name, module in self.modules.items():
            there = other.modules.get(name)
            if there is None:
                continue
            if module.shape != there.shape or module.transposed != there.transposed:
                return f"its {name} is {module.shape}, here it is {there.shape}"
            if module.dtype == there.dtype and module.sha256 != there.sha256:
                return (
                    f"the weights of {name} differ: another revision, a fine-tuned or quantised copy, or a model that "
                    f"is edited already"
                )
        return None


def structure_of(config: Any) -> dict[str, Any]:
    """The entries of `STRUCTURE` that a configuration of transformers has, those of the text model."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {}
    for name, keys in STRUCTURE.items():
        value = next((value for key in keys if (value := getattr(text, key, None)) is not None), None)
        if isinstance(value, (str, int, float)):
            found[name] = value
    return found


def weight_digest(weight: Tensor, dtype: torch.dtype | None = None) -> str:
    """SHA-256 (hex) of a matrix's bytes, as it is stored.

    Args:
        weight: On any device.
        dtype: Number type to convert to before; None: as it is.
    """
    return values_digest(weight.to(dtype or weight.dtype))


def base_of(
    model: Any,
    names: Sequence[str],
    originals: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Base:
    """The fingerprint of a loaded model.

    Args:
        model: A model of transformers. It is not changed.
        names: The modules to fingerprint, linear layers.
        originals: Module name -> row numbers and what they hold without edits, ``(n, d1)``, in place of what the model
            has.
        dtypes: Module name -> number type in which its weight is fingerprinted; else as it is.

    Returns:
        The fingerprint, the modules in the order of ``names``.

    Raises:
        ValueError: A name is no linear layer of ``model``.
    """

    def of_module(name: str) -> BaseModule:
        module = linear_module(model, name)
        # First, for it unpacks 4-bit weights (`preserve_state`).
        states = sorted(quantisation_states(module), key=lambda one: one[0])
        # Of quantised layers: what is stored, as plain numbers.
        weight = Weight(model, name, module).stored.as_subclass(Tensor)
        d2, d1 = out_features(module), in_features(module)
        if originals and name in originals:
            index, values = originals[name]
            weight = weight.clone()
            rows(module, weight)[index.to(weight.device)] = values.to(weight)
        dtype = (dtypes or {}).get(name) or str(weight.dtype).removeprefix("torch.")
        digest = weight_digest(weight, getattr(torch, dtype))
        if states:  # the packed numbers say little without what they stand for
            digest = text_digest([digest, [[key, str(one.dtype), weight_digest(one)] for key, one in states]])
        return BaseModule((d2, d1), dtype, digest, not isinstance(module, nn.Linear))

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # few at once: each may copy a matrix
        modules = dict(zip(names, pool.map(of_module, names)))
    config = model.config
    return Base(
        type(model).__name__,
        structure_of(config),
        modules,
        str(getattr(config, "_name_or_path", "") or ""),
        str(getattr(config, "_commit_hash", "") or ""),
    )
