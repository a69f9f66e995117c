"""The patch by which EasyEdit's methods use second moments of local text (`second_moments`) instead of Wikipedia's."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.patches import runtime_patch
from kne_easyedit.bridge.second_moments import PATCH, Wanted, checksums, files_of, known_weights, needs_second_moments
from kne_easyedit.bridge.text_source import current_text_source


@runtime_patch(PATCH, "MEMIT: second moments are computed from a download of Wikipedia")
def _local_second_moments(easyeditor: ModuleType) -> bool:
    holders: list[Any] = [
        m
        for name, m in sorted(sys.modules.items())
        if name.startswith("easyeditor.models.") and hasattr(m, "layer_stats")
    ]
    for original in {m.layer_stats for m in holders if callable(m.layer_stats)}:
        replacement = _with_local_text(original)
        for holder in holders:
            if holder.layer_stats is original:
                holder.layer_stats = replacement
    methods = module("util.alg_dict").ALG_DICT
    for name, apply in list(methods.items()):
        if inspect.isfunction(apply) and apply.__module__.startswith("easyeditor."):
            methods[name] = _prepared(apply)
    return bool(holders)


def _prepared(apply: Callable) -> Callable:
    """The method with all second moments computed before it changes anything: it asks for them layer by layer."""

    @functools.wraps(apply)
    def prepared(model, tok, requests, hparams, *args, **kwargs):
        if not isinstance(model, nn.Module) or not needs_second_moments(hparams):
            return apply(model, tok, requests, hparams, *args, **kwargs)
        weights = known_weights(model)
        files_of(model, tok, weights, Wanted.by(hparams, Path(hparams.stats_dir)), current_text_source())
        weights.editing = True
        try:
            return apply(model, tok, requests, hparams, *args, **kwargs)
        finally:
            weights.editing = False
            weights.seen.add(checksums(model))

    return prepared


def _with_local_text(original: Callable) -> Callable:
    """EasyEdit's ``layer_stats``, pointed to the file that `files_of` finds or computes."""

    @functools.wraps(original)
    def layer_stats(model, tokenizer, layer_name, stats_dir, ds_name, to_collect, *args, **kwargs):
        if to_collect != ["mom2"]:
            return original(model, tokenizer, layer_name, stats_dir, ds_name, to_collect, *args, **kwargs)
        precision, size = kwargs.get("precision") or "float64", kwargs.get("sample_size")
        layers = _layers_with(layer_name, kwargs.get("hparams"))
        wanted = Wanted(layers, Path(stats_dir), ds_name, precision, size)
        files = files_of(model, tokenizer, known_weights(model, editing=True), wanted, current_text_source())
        found = files[layers.index(layer_name)]
        names = {**kwargs, "model_name": found.model}
        return original(model, tokenizer, layer_name, stats_dir, found.text, to_collect, *args, **names)

    return layer_stats


def _layers_with(layer_name: str, hparams: Any) -> list[str]:
    """All layers of the settings if the layer is one of them: one pass over the text serves them all."""
    template, layers = getattr(hparams, "rewrite_module_tmp", None), getattr(hparams, "layers", None)
    names = [template.format(layer) for layer in layers] if template and layers else []
    return names if layer_name in names else [layer_name]
