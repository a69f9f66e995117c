"""Memory of an edit by KNE beside the weights, phase by phase, from the model's configuration alone.

What a layer keeps for the backward pass is found by a forward pass through two layers of that shape. The sizes of what
is trained and written are counted. The rest are the largest temporaries, as the code makes them. The sums are compared
with what is allocated in tests/doctor/test_memory_measured.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit.attribution.engine import FREE_SHARE, MOST_ROWS
from kne_easyedit.attribution.preparation import HEAD_ROWS
from kne_easyedit.bridge.edited_modules import depth, in_features, matrix_size, state_bytes, vocabulary
from kne_easyedit.editing.after_answers import BRANCHES, COMPARED
from kne_easyedit.editing.divergence import AT_ONCE
from kne_easyedit.editing.neighbours import neighbours_in_step, neighbours_wanted, uses_neighbours
from kne_easyedit.editing.optimizers import OPTIMIZERS
from kne_easyedit.editing.projection import CONTINUED_SHARE, EARLIER_SHARE, LARGEST_SHARE
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization.named import named_targets
from kne_easyedit.models.devices import dtype_of
from kne_easyedit.models.loading import auto_class
from kne_easyedit.models.targets import Target, resolve_target

logger = logging.getLogger(__name__)

PRECISE, _DOUBLE = 4, 8
"""Bytes of a float32, and of a float64."""
TOKENS_OF_A_NEIGHBOUR = 10
"""Of a neighbour and its continuation; a beginning that several share counts less. Packaged relations: 9.4."""
LONGEST_NEIGHBOUR = 13
"""Tokens of a long one with its continuation: texts are padded to the longest of their pass."""
_TOKENS = 16
"""Tokens of the pass that finds what a layer keeps."""
Phases = dict[str, dict[str, int]]
"""Phase -> purpose -> bytes that are in use at the same moment."""


@dataclass(frozen=True)
class Facts:
    """The facts of an edit as far as memory depends on them, and the memory that localising may take its share of."""

    tokens: int
    """Tokens of the longest prompt with its answer."""
    answer_tokens: int = 1
    """Tokens of the longest answer."""
    free: int | None = None
    """Bytes that are free once the weights are loaded; None: as few path points at once as possible."""
    device: str = "cpu"
    """Type of the device."""
    earlier: Sequence[int] = ()
    """Tokens of each fact that the model was edited with before and still has."""
    template: int = 0
    """Tokens that the chat template adds to a neighbour's prompt; ``tokens`` has them."""


def kne(model: nn.Module, hparams: KNEHyperParams, itemsize: int, facts: Facts) -> Phases:
    """What each phase of an edit needs at its peak.

    Args:
        model: The model, possibly on the meta device.
        hparams: KNE's settings.
        itemsize: Bytes of a weight.
        facts: What is edited.

    Returns:
        ``localising`` (unless an ensemble is named), ``neighbours`` (if an edit has to do with them), ``training`` and
        ``writing``.

    Raises:
        ValueError: The model lacks a module or layer of the settings.
    """
    rows = _trained_rows(model, hparams)
    state = layer_bytes(model, rows[0][0].layers_path, dtype_of(hparams))
    phases: Phases = {}
    if hparams.ensemble is None:
        phases["localising"] = _localising(model, hparams, itemsize, facts, [target for target, _ in rows], state)
    bases = _bases(hparams, rows, facts) if hparams.input_projection else 0
    if uses_neighbours(hparams):
        phases["neighbours"] = _neighbours(model, hparams, itemsize, facts, rows, bases)
    phases["training"] = _training(model, hparams, itemsize, facts, rows, bases, state)
    differences = PRECISE * sum(n * in_features(target.modules[0]) for target, n in rows)
    phases["writing"] = {
        # Whole matrices: EasyEdit undoes by no less.
        "originals": itemsize * sum(matrix_size(module) for target, _ in rows for module in target.modules),
        "differences": differences,
        # One module's rows are read, added to in float32, and written.
        "rows": max((2 * PRECISE * n * in_features(t.modules[0]) // len(t.modules) for t, n in rows), default=0),
    }
    return phases


def kne_texts_at_once(hparams: KNEHyperParams, earlier: Sequence[int] = ()) -> int:
    """Texts in one step of KNE: the facts, a variant of each, their neighbours and those of ``earlier`` facts that are
    spared, and the prompts of ``kl_data``. A fact is read in the text of what follows it, where there is one.
    """
    kl = hparams.kl_size if hparams.kl_weight else 0
    own = hparams.batch_size * (1 + bool(hparams.subject_variants))
    return own + _all_neighbours_in_step(hparams, earlier) + kl


def _all_neighbours_in_step(hparams: KNEHyperParams, earlier: Sequence[int]) -> int:
    """Those of all facts, and facts of earlier edits among them."""
    more = 0 if hparams.neighbours_per_step else _earlier_neighbours(hparams, earlier)
    return hparams.batch_size * neighbours_in_step(hparams) + more


def _earlier_neighbours(hparams: KNEHyperParams, earlier: Sequence[int]) -> int:
    """How many facts of earlier edits are neighbours, too (`objectives.objectives_for`)."""
    return min(len(earlier), neighbours_wanted(hparams)) if hparams.neighbour_weight and hparams.spare_edited else 0


def _localising(
    model: Any, hparams: KNEHyperParams, itemsize: int, facts: Facts, targets: list[Target], state: int
) -> dict[str, int]:
    paths = sum(len(target.layers) for target in targets)
    # A path point passes the layers after its own: the mean over the layers in which paths begin.
    layers = depth(model)
    # Those of a module whose output a layer only adds to its own begin behind it; no other one is as wide.
    width = model.config.get_text_config().hidden_size
    after = sum(layers - layer - (t.n_neurons == width) for t in targets for layer in t.layers) / paths
    # Rows in flight attend to the frozen keys of their fact: what they keep beside is some states as wide as a token's.
    state += 2 * itemsize * width
    alone = paths * facts.answer_tokens * max(1, hparams.attribution_steps - 1)
    points = alone if hparams.localization_data is None else alone * hparams.localization_size
    room = hparams.chunk_rows
    if room is None:
        head = 3 * HEAD_ROWS * vocabulary(model) * PRECISE
        # As `rows_in_flight` counts: the first layer's states, too.
        room = paths if facts.free is None else int((FREE_SHARE * facts.free - head) / max(1, state * (after + 1)))
        room = min(room, MOST_ROWS.get(facts.device, room))
    at_once = max(paths, min(points, room))
    head_rows = min(HEAD_ROWS, at_once)
    return {
        "rows in flight": int(at_once * after * state),
        # Logits and the gradient with respect to them, both of the model's type, and a softmax in float32.
        "head": head_rows * vocabulary(model) * (PRECISE + (itemsize if itemsize >= PRECISE else 2 * itemsize)),
        # The clean pass, and the graph of every layer with two trials of its output.
        "clean states": int(facts.answer_tokens * 3 * layers * state),
    }


def _neighbours(
    model: Any, hparams: KNEHyperParams, itemsize: int, facts: Facts, rows: list[tuple[Target, int]], bases: int
) -> dict[str, int]:
    """What the unedited model reads and says."""
    earlier = _earlier_neighbours(hparams, facts.earlier)
    at_once = max(AT_ONCE, _all_neighbours_in_step(hparams, facts.earlier))
    texts = min(at_once, hparams.batch_size * neighbours_wanted(hparams) + earlier)
    longest = _longest_neighbour(hparams, facts)
    tokens = longest + 1
    modules = [module for target, _ in rows for module in target.modules]
    width = model.config.get_text_config().hidden_size
    needed = {
        # What is said after each, and its log-probabilities (`reading`: the head reads one place of each).
        "logits": texts * vocabulary(model) * (itemsize + 2 * PRECISE * hparams.neighbour_tokens),
        # As many heads as queries have: attention repeats those that are shared.
        "keys and values": 2 * texts * tokens * depth(model) * width * itemsize,
    }
    if hparams.neighbour_weight:
        needed["distributions"] = _distributions(model, hparams, facts)
    if bases:
        inputs = bases // PRECISE * itemsize
        # Inputs as they are read, and those of the last module beside them.
        reading = texts * tokens * itemsize * sum(map(in_features, modules)) + sum(needed.values())
        # A module's inputs once more; in float64 they, what is solved for, for a part of the time a copy of it, and two
        # matrices of their products.
        closed = bases // (PRECISE * sum(map(in_features, modules)))
        one = closed * max(map(in_features, modules))
        solving = max(bases, inputs) - inputs + one * (5 * _DOUBLE // 2 + itemsize) + 2 * _DOUBLE * closed**2
        return {"inputs": inputs, "temporaries": max(reading, solving)}
    return needed


def _training(
    model: nn.Module,
    hparams: KNEHyperParams,
    itemsize: int,
    facts: Facts,
    rows: list[tuple[Target, int]],
    bases: int,
    state: int,
) -> dict[str, int]:
    precise = max(itemsize, PRECISE)
    # W_kne, its gradient, what the optimiser keeps, and what a projection leaves of the gradient.
    copies = 2 + OPTIMIZERS[hparams.optimizer].moments + bool(bases)
    first = min((layer for target, _ in rows for layer in target.layers), default=0)
    own = neighbours_in_step(hparams)
    compared = COMPARED if hparams.continuation_weight else 0
    longest = max(facts.tokens + compared + bool(compared), _longest_neighbour(hparams, facts) if own else 0)
    texts = kne_texts_at_once(hparams, facts.earlier)
    tokens = texts * longest
    predicted = texts * max(facts.answer_tokens, hparams.neighbour_tokens if own else 0) + hparams.batch_size * compared
    # Of facts alone every token passes the head, as in the paper; with further texts only what predicts something.
    through_head = predicted if own or hparams.subject_variants or compared else tokens
    needed = {
        "trained rows": copies * precise * sum(n * in_features(target.modules[0]) for target, n in rows),
        # PEFT's B, dense: (neurons, rows) in every layer.
        "row selector": precise * sum(n * target.n_neurons for target, n in rows),
        # Of the first layer what comes after its module.
        "activations": int(tokens * (depth(model) - first - 0.5) * state),
        # Or gradients; of those predicted also, in float32, log-probabilities and gradients.
        "logits": vocabulary(model) * (itemsize * through_head + 3 * PRECISE * predicted),
    }
    if itemsize < PRECISE:  # the adapter's input in its own type
        needed["inputs in float32"] = PRECISE * tokens * sum(in_features(m) for t, _ in rows for m in t.modules)
    if hparams.neighbour_weight:
        needed["neighbours"] = _distributions(model, hparams, facts)
    if compared:  # log-probabilities of every token
        needed["continuations"] = PRECISE * hparams.batch_size * BRANCHES * compared * vocabulary(model)
    if bases:
        needed["projections"] = bases
    return needed


def _longest_neighbour(hparams: KNEHyperParams, facts: Facts) -> int:
    """Tokens of the longest neighbour with its continuation."""
    earlier = facts.earlier if _earlier_neighbours(hparams, facts.earlier) else ()
    return max([LONGEST_NEIGHBOUR + facts.template, *earlier])


def _distributions(model: nn.Module, hparams: KNEHyperParams, facts: Facts) -> int:
    """What the unedited model says after each neighbour: log-probabilities of every token."""
    neighbours = hparams.batch_size * neighbours_wanted(hparams) + _earlier_neighbours(hparams, facts.earlier)
    return PRECISE * neighbours * hparams.neighbour_tokens * vocabulary(model)


def _bases(hparams: KNEHyperParams, rows: list[tuple[Target, int]], facts: Facts) -> int:
    """Of each module the basis ``(N, d1)`` of what its projection removes, in float32."""
    tokens = hparams.batch_size * neighbours_wanted(hparams) * (TOKENS_OF_A_NEIGHBOUR + facts.template)
    earlier = sum(facts.earlier) if hparams.spare_edited else 0
    # Texts are taken as long as they fit into the module with the fewest inputs.
    inputs = min((in_features(target.modules[0]) for target, _ in rows), default=0)
    closed = min(tokens, int(LARGEST_SHARE * inputs)) + min(earlier, int(EARLIER_SHARE * inputs))
    continued = hparams.batch_size * BRANCHES * hparams.spare_continuation
    closed += min(continued, int(CONTINUED_SHARE * inputs))
    return PRECISE * closed * sum(in_features(m) for target, _ in rows for m in target.modules)


def _trained_rows(model: Any, hparams: KNEHyperParams) -> list[tuple[Target, int]]:
    """The modules, and how many rows of them are trained: the floor(p * neurons) of Eq. 6 if no ensemble is named."""
    if hparams.ensemble is not None:
        return named_targets(model, hparams)
    targets = [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]
    return [(t, hparams.selection.budget(len(t.layers) * t.n_neurons)) for t in targets]


def layer_bytes(model: Any, layers_path: str, dtype: torch.dtype) -> int:
    """Bytes that a decoder layer keeps of a token for the backward pass.

    Found by a forward pass through two layers of the model's shape on the CPU, with weights that are never written: the
    system has one page of zeros for all of them. A model whose layers do not run so is estimated by its widths.
    """
    try:
        bare = _two_layers(model.config, dtype)
        layers = list(bare.get_submodule(layers_path).children())
        both, last = (_kept_from(bare, layer) for layer in layers)
        return (both - last) // _TOKENS
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        logger.info("memory of a layer is estimated by its widths: %s", error)
        return state_bytes(model, dtype.itemsize)


def _two_layers(config: Any, dtype: torch.dtype) -> Any:
    """The model of a configuration with its first two layers, on the CPU, without values."""
    config = deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    with torch.device("meta"):
        bare: Any = auto_class(config).from_config(config, dtype=dtype)
    return bare.eval().requires_grad_(False).to_empty(device="cpu")


def _kept_from(model: Any, layer: nn.Module) -> int:
    """Bytes that autograd keeps of `_TOKENS` tokens from a layer on, without weights."""
    kept: dict[int, Tensor] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor  # held, or another could get its address
        return tensor

    def as_leaf(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        if arguments:
            return (arguments[0].detach().requires_grad_(), *arguments[1:]), named
        return arguments, {**named, "hidden_states": named["hidden_states"].detach().requires_grad_()}

    handle = layer.register_forward_pre_hook(as_leaf, with_kwargs=True)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(
                input_ids=torch.zeros(1, _TOKENS, dtype=torch.long),
                attention_mask=torch.ones(1, _TOKENS, dtype=torch.long),
                use_cache=False,
            )
    finally:
        handle.remove()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
