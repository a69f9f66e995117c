"""AlphaEdit's projections onto the null space of general text, for any model, under any name.

EasyEdit's method takes the matrices' shape from words in the model's name, and keeps projections (in a file of the
working directory) and the keys of earlier edits in globals of its module: those of another model, or of an edit that
was undone, are used again.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from kne_easyedit._util.interrupts import safe_point
from kne_easyedit._util.settings import replace_settings
from kne_easyedit.bridge.edited_modules import in_features, rewritten
from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.patches import runtime_patch


@dataclass
class _Known:
    """What is kept between two edits of one model."""

    model: weakref.ref
    key: tuple
    """The moments and settings of which the projections were made."""
    projections: torch.Tensor
    keys: torch.Tensor
    """Of all edits so far, keys times keys."""
    weights: list[torch.Tensor]
    """The edited matrices as the last edit left them: the keys of earlier edits count only on top of these."""


@runtime_patch(
    "null-space",
    "AlphaEdit knows shapes by words in the model's name, and uses projections of other models and keys of undone "
    "edits: NameError",
)
def _null_space(easyeditor: ModuleType) -> bool:
    main: Any = sys.modules.get("easyeditor.models.alphaedit.AlphaEdit_main")
    if main is None:
        return False
    methods = module("util.alg_dict").ALG_DICT
    original = main.apply_AlphaEdit_to_model
    for name, method in list(methods.items()):
        if inspect.isfunction(method) and inspect.unwrap(method) is original:
            methods[name] = _projected(main, method)
    main.apply_AlphaEdit_to_model = _projected(main, original)
    return True


def _projected(main: Any, method: Any) -> Any:
    """The method with the projections of this model, and the keys of those earlier edits that it still has."""
    known: list[_Known] = []

    @functools.wraps(method)
    def apply(model, tok, requests, hparams, *args, reset_cache=False, **kwargs):
        modules = rewritten(model, hparams)
        last = known[0] if known and known[0].model() is model else None
        key = _key(main, model, tok, hparams)
        main.P = last.projections if last and last.key == key else _projections(main, model, tok, hparams, modules)
        if reset_cache or last is None or last.key != key or not _same(last.weights, modules):
            size = in_features(modules[0])
            main.cache_c = torch.zeros(len(modules), size, size)
        else:
            main.cache_c = last.keys.clone()  # an edit that fails may have added some of its keys
        main.P_loaded = main.cache_c_new = True
        # A file that exists, so that the method computes no projections; it reads none, for they are loaded.
        result = method(model, tok, requests, replace_settings(hparams, P_loc=__file__), *args, **kwargs)
        weights = [its.weight.detach().clone() for its in modules]
        known[:] = [_Known(weakref.ref(model), key, main.P, main.cache_c, weights)]
        return result

    return apply


def _key(main: Any, model: nn.Module, tok: Any, hparams: Any) -> tuple:
    """What the projections depend on: the moments of the layers, and the threshold."""
    layers = tuple(hparams.layers), hparams.rewrite_module_tmp
    moments = _moments(main, model, tok, hparams)
    sums = tuple(float(matrix.double().diagonal().sum()) for matrix in moments)
    return *layers, hparams.nullspace_threshold, sums


@torch.no_grad()
def _moments(main: Any, model: nn.Module, tok: Any, hparams: Any) -> list[torch.Tensor]:
    names = [hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers]
    settings = hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype
    return [main.get_cov(model, tok, name, *settings, hparams=hparams).cpu() for name in names]


@torch.no_grad()
def _projections(main: Any, model: nn.Module, tok: Any, hparams: Any, modules: list[Any]) -> torch.Tensor:
    """``(layers, d1, d1)``: for each layer the projection onto the directions of small second moments.

    Always computed: EasyEdit's own file of them (``P_loc``) is a pickle that may be of another model.
    """
    size = in_features(modules[0])
    found = torch.empty(len(modules), size, size)
    for i, moments in enumerate(_moments(main, model, tok, hparams)):
        safe_point()
        values, directions = torch.linalg.eigh(moments)
        kept = directions[:, values < hparams.nullspace_threshold]
        found[i] = kept @ kept.T
    return found


def _same(weights: list[torch.Tensor], modules: list[Any]) -> bool:
    return all(torch.equal(kept, its.weight) for kept, its in zip(weights, modules))
