"""How much memory an edit takes, from the model's configuration alone: nothing is loaded, nothing is downloaded.

All formulae are here. What they call estimated was fitted to measurements, the rest is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from kne_easyedit.attribution.preparation import HEAD_ROWS
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.targets import Target, count_parameters, out_features, resolve_target

TOKENS = 64
"""Tokens of prompt and answer where the data are not known."""
_PRECISE = 4
"""Bytes of a float32."""


def memory_needed(config_or_model, hparams, tokens: int = TOKENS) -> dict[str, int]:
    """Bytes by purpose of one method's edit. With their sum free it cannot run out; not all are wanted at the same moment.

    ``config_or_model``: a configuration of transformers, or a model (on the meta device, maybe). ``tokens``: length of
    the longest prompt with its answer. For a method without a formula it is what every method needs.
    Raises ValueError for modules or layers that the model does not have.
    """
    model = config_or_model if isinstance(config_or_model, nn.Module) else without_weights(config_or_model)
    item = loaded_type(hparams).itemsize
    own = FORMULAE[hparams.alg_name](model, hparams, item) if hparams.alg_name in FORMULAE else {}
    texts = _texts_at_once(hparams) * tokens
    return {
        "weights": item * count_parameters(model),
        **own,
        # Every layer keeps its states for the backward pass; logits have copies, their softmax and gradients in float32.
        "activations (estimated)": texts
        * (depth(model) * _state_bytes(model, item) + 4 * _PRECISE * vocabulary(model)),
    }


def _kne(model: nn.Module, hparams: KNEHyperParams, item: int) -> dict[str, int]:
    precise = max(item, _PRECISE)
    rows = _kne_rows(model, hparams)
    needed = {
        # Whole matrices: EasyEdit undoes by no less.
        "originals": item * sum(module.weight.numel() for target, _ in rows for module in target.modules),
        # W_kne, its gradient, and AdamW's two moments.
        "trained rows": 4 * precise * sum(n * in_features(target.modules[0]) for target, n in rows),
        # What is added to the weights, before it is added.
        "differences": precise * sum(n * in_features(target.modules[0]) for target, n in rows),
        # PEFT's B, dense: (neurons, rows) in every layer.
        "row selector": precise * sum(n * target.n_neurons for target, n in rows),
    }
    if hparams.ensemble is None:
        # At least a row of every path, with half of the layers before it, and the head's rows. More rows are taken where
        # there is room, in a quarter of what is free then (see attribution.rows_in_flight).
        paths = sum(len(target.layers) for target, _ in rows)
        head = 3 * _PRECISE * HEAD_ROWS * vocabulary(model)
        needed["localisation (estimated)"] = paths * depth(model) * _state_bytes(model, item) // 2 + head
    return needed


def _kne_rows(model: nn.Module, hparams: KNEHyperParams) -> list[tuple[Target, int]]:
    """The modules, and how many rows of them are trained: the floor(p * neurons) of Eq. 6 if no ensemble is named."""
    if hparams.ensemble is not None:
        found = NeuronEnsemble.load(hparams.ensemble).targets(model).values()
        return [(target, sum(map(len, rows))) for target, rows in found]
    targets = [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]
    return [(t, hparams.selection.budget(len(t.layers) * t.n_neurons)) for t in targets]


def _ft(model: nn.Module, hparams, item: int) -> dict[str, int]:
    names = {
        name for layer in hparams.layers for name in fine_tuned(model, at_layer(hparams.rewrite_module_tmp, layer))
    }
    matrices = item * sum(model.get_parameter(name).numel() for name in names)
    return {"originals": matrices, "gradients": matrices, "Adam's moments": 2 * matrices, "differences": matrices}


def _lora(model: nn.Module, hparams, item: int) -> dict[str, int]:
    # AdaLoRA begins with PEFT's init_r of 12, whatever the rank; the release of 2023 knows nothing else.
    rank = hparams.rank if getattr(hparams, "lora_type", "adalora") == "lora" else max(hparams.rank, 12)
    # A and B, their gradients, and Adam's two moments, in float32 over any model.
    return {"adapter": 4 * _PRECISE * rank * sum(sum(module.weight.shape) for module in adapted(model, hparams))}


def _rome(model: nn.Module, hparams, item: int) -> dict[str, int]:
    edited = _rewritten(model, hparams)
    squares = [in_features(module) ** 2 for module in edited] if hparams.mom2_adjustment else [0]
    return {
        "originals": item * sum(module.weight.numel() for module in edited),
        # A matrix of rank one, in full.
        "update": _PRECISE * max(module.weight.numel() for module in edited),
        # Each layer keeps the inverse (d1, d1) of its second moments; an inversion has these and their factors beside it.
        "second moments": _PRECISE * (sum(squares) + 2 * max(squares)),
    }


def _memit(model: nn.Module, hparams, item: int) -> dict[str, int]:
    edited = _rewritten(model, hparams)
    squares = [in_features(module) ** 2 for module in edited]
    return {
        "originals": item * sum(module.weight.numel() for module in edited),
        # A layer's update and its new weights, in float64.
        "update": 2 * 8 * max(module.weight.numel() for module in edited),
        # (d1, d1) in float32 for each layer.
        "second moments": _PRECISE * sum(squares),
        # In float64: the weighted moments, keys times keys, and their sum (later its factors).
        "solver": 3 * 8 * max(squares),
    }


FORMULAE: dict[str, Callable[[nn.Module, object, int], dict[str, int]]] = {
    "KNE": _kne,
    "FT": _ft,
    "LoRA": _lora,
    "ROME": _rome,
    "R-ROME": _rome,
    "MEMIT": _memit,
    "KN": lambda model, hparams, item: {},  # the values of single neurons, few of them in a trained model
}
"""By EasyEdit's names: what a method needs beside weights and activations."""


def _texts_at_once(hparams) -> int:
    """Texts in one pass of an edit: facts, or one fact behind each of the method's context templates, and one for its KL term."""
    if hparams.alg_name == "MEMIT":
        return 7
    if templates := getattr(hparams, "context_template_length_params", None):
        return sum(count for _, count in templates) + 2
    return getattr(hparams, "batch_size", None) or 1


def _state_bytes(model: nn.Module, item: int) -> int:
    """What one layer keeps of one token for the backward pass. Measured on Llama, GPT-2 and GPT-J: 0.5 to 0.9 of this."""
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return item * (12 * config.hidden_size + 5 * inner)


# What settings mean in a model, with or without weights


def without_weights(config) -> nn.Module:
    """The model of a configuration on torch's meta device: every module and shape, no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(deepcopy(config))


def loaded_type(hparams) -> torch.dtype:
    """The type in which `models.load_model` loads the model."""
    return (
        torch.bfloat16
        if getattr(hparams, "bf16", False)
        else torch.float16
        if getattr(hparams, "fp16", False)
        else torch.float32
    )


def depth(model: nn.Module) -> int:
    """Number of decoder layers."""
    return model.config.get_text_config().num_hidden_layers


def vocabulary(model: nn.Module) -> int:
    """Number of tokens that have an embedding."""
    return model.get_input_embeddings().weight.shape[0]


def in_features(module: nn.Module) -> int:
    """Input units of a linear layer in either orientation."""
    return module.weight.numel() // out_features(module)


def at_layer(template: str, layer: int) -> str:
    return template.replace("{}", str(layer))


def fine_tuned(model: nn.Module, text: str) -> list[str]:
    """The parameters that EasyEdit's FT trains: all whose names hold ``text``."""
    return [name for name, _ in model.named_parameters() if text in name]


def adapted(model: nn.Module, hparams) -> list[nn.Module]:
    """The modules that PEFT adapts: their names end in one of ``target_modules``, or match it if it is one text."""
    wanted, layers = hparams.target_modules, [f".{layer}." for layer in hparams.layers or ()]

    def matches(name: str) -> bool:
        if isinstance(wanted, str):
            return wanted == "all-linear" and "lm_head" not in name or re.fullmatch(wanted, name) is not None
        return any(f".{name}".endswith(f".{end}") for end in wanted)

    linear = (
        (name, m) for name, m in model.named_modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 2
    )
    return [m for name, m in linear if matches(name) and (not layers or any(layer in name for layer in layers))]


def _rewritten(model: nn.Module, hparams) -> list[nn.Module]:
    try:
        return [model.get_submodule(at_layer(hparams.rewrite_module_tmp, layer)) for layer in hparams.layers]
    except AttributeError as error:
        raise ValueError(f"rewrite_module_tmp: {error}") from error
