"""Memory that an edit of each method needs beside weights and activations, from the model's configuration alone.

Quantities called estimated were fitted to measurements; all others are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from kne_easyedit.attribution.preparation import HEAD_ROWS
from kne_easyedit.bridge.edited_modules import (
    adapted,
    at_layer,
    depth,
    fine_tuned,
    in_features,
    matrix_size,
    rewritten,
    state_bytes,
    vocabulary,
)
from kne_easyedit.editing.neighbours import neighbours_in_step, neighbours_wanted
from kne_easyedit.editing.optimizers import OPTIMIZERS
from kne_easyedit.editing.projection import LARGEST_SHARE
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization.named import named_targets
from kne_easyedit.models.targets import Target, resolve_target

MemoryFormula: TypeAlias = Callable[[nn.Module, Any, int], dict[str, int]]
"""(model, hyperparameters, bytes per weight) -> bytes by purpose. Raises ValueError for a module that is missing."""
PRECISE = 4
"""Bytes of a float32."""
TOKENS_OF_A_NEIGHBOUR = 16
"""Of a neighbour and its continuation; a beginning that several share counts less."""


def kne(model: nn.Module, hparams: KNEHyperParams, itemsize: int) -> dict[str, int]:
    """KNE: rows of some matrices are trained in float32 or better."""
    precise = max(itemsize, PRECISE)
    rows = _kne_rows(model, hparams)
    copies = 2 + OPTIMIZERS[hparams.optimizer].moments
    needed = {
        # Whole matrices: EasyEdit undoes by no less.
        "originals": itemsize * sum(matrix_size(module) for target, _ in rows for module in target.modules),
        # W_kne, its gradient, and what the optimiser keeps.
        "trained rows": copies * precise * sum(n * in_features(target.modules[0]) for target, n in rows),
        # The difference of the weights, before it is added.
        "differences": precise * sum(n * in_features(target.modules[0]) for target, n in rows),
        # PEFT's B, dense: (neurons, rows) in every layer.
        "row selector": precise * sum(n * target.n_neurons for target, n in rows),
    }
    neighbours = hparams.batch_size * neighbours_wanted(hparams)
    if hparams.neighbour_weight:
        # What the unedited model says after each neighbour: log-probabilities of every token.
        needed["neighbours"] = precise * neighbours * hparams.neighbour_tokens * vocabulary(model)
    if hparams.input_projection:
        closed = [
            (t, min(neighbours * TOKENS_OF_A_NEIGHBOUR, int(LARGEST_SHARE * in_features(t.modules[0]))))
            for t, _ in rows
        ]
        # Of each module the inputs of all neighbours' tokens, and the basis of what is removed.
        needed["projections (estimated)"] = sum(
            (itemsize + precise) * len(target.modules) * n * in_features(target.modules[0]) for target, n in closed
        )
    if hparams.ensemble is None:
        # At least a row of every path, with half of the layers before it, and the head's rows. More rows are used if
        # there is room, in a quarter of what is free then (see attribution.rows_in_flight).
        paths = sum(len(target.layers) for target, _ in rows)
        head = 3 * PRECISE * HEAD_ROWS * vocabulary(model)
        needed["localisation (estimated)"] = paths * depth(model) * state_bytes(model, itemsize) // 2 + head
    return needed


def kne_texts_at_once(hparams: KNEHyperParams) -> int:
    """Texts in one step of KNE: the facts, a variant of each, their neighbours, and the prompts of ``kl_data``."""
    kl = hparams.kl_size if hparams.kl_weight else 0
    return hparams.batch_size * (1 + neighbours_in_step(hparams) + bool(hparams.subject_variants)) + kl


def _kne_rows(model: Any, hparams: KNEHyperParams) -> list[tuple[Target, int]]:
    """The modules, and how many rows of them are trained: the floor(p * neurons) of Eq. 6 if no ensemble is named."""
    if hparams.ensemble is not None:
        return named_targets(model, hparams)
    targets = [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]
    return [(t, hparams.selection.budget(len(t.layers) * t.n_neurons)) for t in targets]


def ft(model: nn.Module, hparams: Any, itemsize: int) -> dict[str, int]:
    """FT: whole matrices are trained by Adam."""
    names = {
        name for layer in hparams.layers for name in fine_tuned(model, at_layer(hparams.rewrite_module_tmp, layer))
    }
    matrices = itemsize * sum(model.get_parameter(name).numel() for name in names)
    return {"originals": matrices, "gradients": matrices, "Adam's moments": 2 * matrices, "differences": matrices}


def lora(model: nn.Module, hparams: Any, itemsize: int) -> dict[str, int]:
    """LoRA, AdaLoRA: A and B, their gradients, and Adam's two moments, in float32 over any model."""
    # AdaLoRA begins with PEFT's init_r of 12, whatever the rank; the release of 2023 knows nothing else.
    rank = hparams.rank if getattr(hparams, "lora_type", "adalora") == "lora" else max(hparams.rank, 12)
    return {"adapter": 4 * PRECISE * rank * sum(sum(module.weight.shape) for module in adapted(model, hparams))}


def rome(model: nn.Module, hparams: Any, itemsize: int) -> dict[str, int]:
    """ROME, R-ROME: an update of rank one, and second moments by ``mom2_adjustment``."""
    edited = rewritten(model, hparams)
    squares = [in_features(module) ** 2 for module in edited] if hparams.mom2_adjustment else [0]
    return {
        "originals": itemsize * sum(matrix_size(module) for module in edited),
        # A matrix of rank one, in full.
        "update": PRECISE * max(matrix_size(module) for module in edited),
        # Each layer keeps the inverse (d1, d1) of its second moments; an inversion needs these and their factors, too.
        "second moments": PRECISE * (sum(squares) + 2 * max(squares)),
    }


def memit(model: nn.Module, hparams: Any, itemsize: int) -> dict[str, int]:
    """MEMIT: second moments of every layer, and a solver in float64."""
    edited = rewritten(model, hparams)
    squares = [in_features(module) ** 2 for module in edited]
    return {
        "originals": itemsize * sum(matrix_size(module) for module in edited),
        # A layer's update and its new weights, in float64.
        "update": 2 * 8 * max(matrix_size(module) for module in edited),
        # (d1, d1) in float32 for each layer.
        "second moments": PRECISE * sum(squares),
        # In float64: the weighted moments, keys times keys, and their sum (later its factors).
        "solver": 3 * 8 * max(squares),
    }


def alphaedit(model: nn.Module, hparams: Any, itemsize: int) -> dict[str, int]:
    """AlphaEdit: beside second moments, projections and keys of earlier edits of every layer."""
    edited = rewritten(model, hparams)
    squares = [in_features(module) ** 2 for module in edited]
    return {
        "originals": 3 * itemsize * sum(matrix_size(module) for module in edited),
        "update": PRECISE * sum(matrix_size(module) for module in edited),
        # Moments, projections and keys, (d1, d1) in float32 for each layer.
        "second moments": 3 * PRECISE * sum(squares),
        # Projection, keys, their products, and the solver's factors.
        "solver": 6 * PRECISE * max(squares),
    }


def wise(model: nn.Module, hparams: Any, itemsize: int) -> dict[str, int]:
    """WISE: copies of one matrix, its gradient and mask."""
    size = matrix_size(_inner(model, hparams))
    return {"copies": 4 * itemsize * size, "gradients": 2 * itemsize * size, "mask": 2 * 8 * size}


def grace(model: nn.Module, hparams: Any, itemsize: int) -> dict[str, int]:
    """GRACE: a copy of one layer; keys and values are vectors."""
    return {"originals": itemsize * matrix_size(_inner(model, hparams))}


def _inner(model: nn.Module, hparams: Any) -> Any:
    """The module of ``inner_params``, which EasyEdit writes as ``model.layers[3].mlp.down_proj.weight``."""
    name = str(hparams.inner_params[0]).replace("[", ".").replace("]", "").removesuffix(".weight")
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"inner_params: {error}") from error


def nothing(model: nn.Module, hparams: Any, itemsize: int) -> dict[str, int]:
    """KN: the values of single neurons, few of them in a trained model."""
    return {}
