"""Which parts of a model the settings of a method name, and their sizes. Works without weights (on the meta device)."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from kne_easyedit.models.targets import out_features


def depth(model: Any) -> int:
    """Number of decoder layers."""
    return model.config.get_text_config().num_hidden_layers


def vocabulary(model: Any) -> int:
    """Number of tokens that have an embedding."""
    return model.get_input_embeddings().weight.shape[0]


def in_features(module: Any) -> int:
    """Input units ``d1`` of a linear layer in either orientation."""
    return module.weight.numel() // out_features(module)


def matrix_size(module: Any) -> int:
    """Number of weights of a linear layer."""
    return module.weight.numel()


def state_bytes(model: Any, itemsize: int) -> int:
    """Bytes that a layer keeps of a token for the backward pass. Measured on Llama, GPT-2, GPT-J: 0.5 to 0.9 of it."""
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return itemsize * (12 * config.hidden_size + 5 * inner)


def at_layer(template: str, layer: int) -> str:
    """The name of a module in a layer: ``{}`` in the template becomes the layer's number."""
    return template.replace("{}", str(layer))


def fine_tuned(model: nn.Module, text: str) -> list[str]:
    """The parameters that EasyEdit's FT trains: all whose names contain ``text``."""
    return [name for name, _ in model.named_parameters() if text in name]


def adapted(model: nn.Module, hparams: Any) -> list[Any]:
    """The modules that PEFT adapts: their names end in one of ``target_modules``, or match it if it is a string."""
    wanted, layers = hparams.target_modules, [f".{layer}." for layer in hparams.layers or ()]

    def matches(name: str) -> bool:
        if isinstance(wanted, str):
            return (wanted == "all-linear" and "lm_head" not in name) or re.fullmatch(wanted, name) is not None
        return any(f".{name}".endswith(f".{end}") for end in wanted)

    linear = (
        (name, m) for name, m in model.named_modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 2
    )
    return [m for name, m in linear if matches(name) and (not layers or any(layer in name for layer in layers))]


def rewritten(model: nn.Module, hparams: Any) -> list[Any]:
    """The modules of ``rewrite_module_tmp`` in ``layers``. Raises ValueError if the model lacks one."""
    try:
        return [model.get_submodule(at_layer(hparams.rewrite_module_tmp, layer)) for layer in hparams.layers]
    except AttributeError as error:
        raise ValueError(f"rewrite_module_tmp: {error}") from error
