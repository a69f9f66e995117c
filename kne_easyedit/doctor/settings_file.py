"""Settings for a model that no file is shipped for: its modules are found by structure, its weights are not read."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
import yaml
from torch import nn

from kne_easyedit._util.settings_text import commented, field_help, with_values
from kne_easyedit.bridge.edited_modules import depth
from kne_easyedit.doctor.structure import structure_of
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.models.editable import stored_quantisation
from kne_easyedit.models.layer_kinds import UNQUANTISED
from kne_easyedit.models.targets import LinearLayer, default_target, find_linear, resolve_target

WIDTH = 120
"""Longest line of the head, in characters."""
HALF = ("bfloat16", "float16")
"""Types of a checkpoint that is loaded in bfloat16 where a GPU is at hand; the trained rows are float32 in any case."""


def settings_for(name: str, pattern: str) -> str:
    """The text of a settings file for a model.

    Args:
        name: ``smollm2-135m``, the path of a model's folder, or a hub name in the cache. Nothing is downloaded.
        pattern: The text of a shipped settings file. The settings that depend on the model are replaced: its name,
            device and type, modules and layers; it is localised on the packaged facts.

    Returns:
        The file, with a head that says what was found, and a comment at each setting.

    Raises:
        ValueError: The model is not on this machine, transformers does not know its kind, or no linear layer was found
            that an edit could take.
    """
    config, model = structure_of(name)
    found = find_linear(model)
    chosen = default_target(found)
    if chosen is None:
        others = f"; its linear layers are {', '.join(each.template for each in found)}" if found else ""
        raise ValueError(
            f"model_name: {name!r} is a {type(model).__name__}; no output of an MLP or an attention was found in its "
            f"layers{others}; copy a shipped file and set target_modules by hand"
        )
    layers = [] if len(chosen.layers) == depth(model) else list(chosen.layers)
    resolve_target(model, chosen.template, layers)  # what edits it will find it, too
    gpu = torch.cuda.is_available()
    half = str(getattr(config, "dtype", None)).removeprefix("torch.") in HALF
    values = {
        "model_name": name,
        "device": 0 if gpu else "cpu",
        "fp16": False,
        "bf16": gpu and half,
        "target_modules": [chosen.template],
        "layers": layers,
        "localization_data": "embedded",
        "localization_size": 20,
    }
    body = pattern[pattern.index("alg_name:") :]  # the comments above are about the pattern's model
    text = commented(f"{_head(model, name, found, chosen)}{with_values(body, values)}", field_help(KNEHyperParams))
    written = yaml.safe_load(text)
    if written != {**yaml.safe_load(body), **values}:
        raise ValueError(f"model_name: {name!r} cannot be written into a line of YAML; rename the folder")
    KNEHyperParams.from_dict(written)
    return text


def hparams_for(name: str, pattern: str) -> KNEHyperParams:
    """The settings of `settings_for` as an object. Raises as it does."""
    return KNEHyperParams.from_dict(yaml.safe_load(settings_for(name, pattern)))


def _head(model: nn.Module, name: str, found: list[LinearLayer], chosen: LinearLayer) -> str:
    """The comment above the settings: what the model is, what else could be edited, what was not tried."""
    leaf = chosen.template.rsplit(".", 1)[-1]
    others = ", ".join(
        f"{each.template} ({each.outputs}{'' if each.layers == chosen.layers else f', {len(each.layers)} layers'})"
        for each in found
        if each is not chosen
    )
    sentences = [
        f"KNE (arXiv 2412.20637) for {Path(name).name}, a {type(model).__name__}: {len(chosen.layers)} layers, "
        f"{chosen.outputs} neurons each in {leaf} ({chosen.role}). Written by `kne hparams`; not tried yet.",
        'Training spares neighbours as measured on SmolLM2 (docs/edit.md, "One fact and no other"); score_scale, p and '
        "lr are the paper's. What was tuned for SmolLM2: score_scale layer, p 0.16.",
        f"Other linear layers of a decoder layer, with their neurons: {others or 'none'}.",
    ]
    if chosen.role != "MLP output":
        sentences.append(
            "Its layers have no MLP output that is called on every token, so that of the attention or mixer is taken."
        )
    if stored := stored_quantisation(model):
        sentences.append(f"The files are quantised ({stored}), and such rows cannot be edited: {UNQUANTISED}.")
    return "".join(f"# {line}\n" for sentence in sentences for line in _wrapped(sentence))


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(" ".join(sentence.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
