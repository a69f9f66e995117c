"""Eq. 3-5: integrated gradients of the answer's token probabilities with respect to output neurons."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, overload
from weakref import WeakSet

import torch
from torch import Tensor, nn

from kne_easyedit._util.machine import free_memory
from kne_easyedit._util.workers import side_by_side
from kne_easyedit.attribution.full_passes import attribute_by_full_passes, changes_by_full_passes
from kne_easyedit.attribution.preparation import HEAD_ROWS, PreparedSweep, prepare
from kne_easyedit.attribution.quadrature import Quadrature, quadrature_of
from kne_easyedit.attribution.replay import Replay, ReplayMismatch, UnsupportedModel, not_everywhere
from kne_easyedit.attribution.sweep import add_points, probability_changes, scores, start_integrals
from kne_easyedit.facts.encoding import Fact, Tokenizer, encode, require_known, require_length
from kne_easyedit.models.fast_linear import fast_linear
from kne_easyedit.models.state import preserve_state
from kne_easyedit.models.targets import Target, resolve_target

logger = logging.getLogger(__name__)

ENGINES = ("auto", "sweep", "whole")

FREE_SHARE = 0.25
"""Share of the free memory that rows in flight may take if their number is not given."""
TOGETHER = 0.75
"""That of all processes that work side by side: each sees the same memory as free."""
MOST_ROWS = {"cpu": 2400}
"""Device -> rows in flight at most. On a CPU, activations of more outgrow its caches; elsewhere memory is the limit."""

_WARNED: WeakSet[nn.Module] = WeakSet()


@overload
def attribute(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    target: str,
    target_module: str,
    steps: int = 20,
    *,
    layers: Sequence[int] = (),
    chunk_rows: int | None = None,
    quadrature: Quadrature | str = "riemann",
    engine: str = "auto",
    return_completeness: Literal[False] = False,
) -> Tensor: ...
@overload
def attribute(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    target: str,
    target_module: str,
    steps: int = 20,
    *,
    layers: Sequence[int] = (),
    chunk_rows: int | None = None,
    quadrature: Quadrature | str = "riemann",
    engine: str = "auto",
    return_completeness: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attribute(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    target: str,
    target_module: str,
    steps: int = 20,
    *,
    layers: Sequence[int] = (),
    chunk_rows: int | None = None,
    quadrature: Quadrature | str = "riemann",
    engine: str = "auto",
    return_completeness: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Eq. 5: the attribution of every output neuron of ``target_module`` for one fact.

    Args:
        model: A causal language model of transformers. It is left exactly as it was.
        tokenizer: Its tokenizer.
        prompt: The fact's prompt.
        target: The fact's answer; it follows ``prompt`` after one blank.
        target_module: Template such as ``model.layers.{}.mlp.down_proj``.
        steps: ``m``, the number of nodes of the quadrature.
        layers: Numbers of the layers to attribute, in any order; empty: all.
        chunk_rows: See `attribute_facts`.
        quadrature: See `attribute_facts`.
        engine: See `attribute_facts`.
        return_completeness: Also return the completeness gap of every layer.

    Returns:
        Scores ``(layers, d2)``, layers in ascending order, in float32 (float64 for a float64 model) on the CPU, in
        probability. For ``m -> inf`` a row sums to ``sum_j P(w_j) - P(0)``, the change of the answer tokens'
        probabilities along the layer's path. With ``return_completeness`` also the sum of each row minus that change,
        ``(layers,)``: see `attribute_facts`.

    Raises:
        ValueError: The fact or the template cannot be used.
        UnsupportedModel, ReplayMismatch, FloatingPointError: See `attribute_facts`.
    """
    chosen = resolve_target(model, target_module, layers)
    facts = [encode(tokenizer, prompt, target)]
    found, gaps = _attribute(model, [chosen], facts, steps, chunk_rows, quadrature, engine, return_completeness)
    return (found[0][0], gaps[0][0]) if return_completeness else found[0][0]


@overload
def attribute_facts(
    model: nn.Module,
    targets: Sequence[Target],
    facts: Sequence[Fact],
    steps: int = 20,
    *,
    chunk_rows: int | None = None,
    quadrature: Quadrature | str = "riemann",
    engine: str = "auto",
    return_completeness: Literal[False] = False,
) -> list[Tensor]: ...
@overload
def attribute_facts(
    model: nn.Module,
    targets: Sequence[Target],
    facts: Sequence[Fact],
    steps: int = 20,
    *,
    chunk_rows: int | None = None,
    quadrature: Quadrature | str = "riemann",
    engine: str = "auto",
    return_completeness: Literal[True],
) -> tuple[list[Tensor], list[Tensor]]: ...
def attribute_facts(
    model: nn.Module,
    targets: Sequence[Target],
    facts: Sequence[Fact],
    steps: int = 20,
    *,
    chunk_rows: int | None = None,
    quadrature: Quadrature | str = "riemann",
    engine: str = "auto",
    return_completeness: bool = False,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Eq. 5 for several facts and module types in one sweep.

    Args:
        model: A causal language model of transformers. It is left exactly as it was.
        targets: The modules, of one decoder (`resolve_target`).
        facts: The facts (`encode`).
        steps: ``m``, the number of nodes of the quadrature.
        chunk_rows: Path points in flight at most (one point of every path at least). Bounds memory; the result depends
            on it by rounding alone, as it does on which facts are attributed together. None: chosen from the free
            memory (`rows_in_flight`).
        quadrature: ``riemann``, the paper's, ``gauss-legendre``, or a function ``m -> (nodes, weights)``.
        engine: ``sweep``: the fused sweep; ``whole``: a pass through the whole model for every path point, slow, for
            models whose layers cannot be replayed; ``auto``: ``whole`` for those, with a warning.
        return_completeness: Also return the completeness gap of every fact and layer.

    Returns:
        Scores, for each target ``(facts, layers, d2)``, in probability, on the CPU. With ``return_completeness`` a
        pair: the scores, and for each target the gaps ``(facts, layers)`` in probability,
        ``sum_k Attr_k - sum_j (P(w_j) - P(0))``. By the completeness of integrated gradients this is the error of the
        quadrature in Eq. 5: it falls as ``1/m`` for `riemann`, and is nearly 0 for `gauss_legendre` with many nodes.

    Raises:
        ValueError: The engine, the quadrature or the number of steps is unknown, a fact is too long or has tokens that
            the model has not, there is none, or the targets are of several decoders.
        UnsupportedModel: The model is an encoder-decoder, or (``sweep``) its layers cannot be replayed.
        ReplayMismatch: The layers replay differently from the model itself.
        FloatingPointError: Scores are not finite.
    """
    found, gaps = _attribute(model, targets, facts, steps, chunk_rows, quadrature, engine, return_completeness)
    return (found, gaps) if return_completeness else found


def rows_in_flight(model: nn.Module, targets: Sequence[Target], fact: Fact) -> int:
    """How many path points `attribute_facts` may have in flight, by the memory that is free now.

    A row's need is measured on ``fact``, not modelled: what autograd keeps of it in each layer.
    """
    with preserve_state(model), Replay(model, targets[0].layers_path) as replay:
        return _rows_in_flight(prepare(replay, targets, [fact], end_gradients=False))


def _rows_in_flight(prepared: PreparedSweep) -> int:
    logits = prepared.clean.logits
    head = 3 * HEAD_ROWS * logits.shape[-1] * 4  # with their softmax, in float32
    share = min(FREE_SHARE, TOGETHER / side_by_side())
    rows = int((share * free_memory(logits.device) - head) / prepared.row_bytes)
    return max(1, min(rows, MOST_ROWS.get(logits.device.type, rows)))


def _attribute(
    model: nn.Module,
    targets: Sequence[Target],
    facts: Sequence[Fact],
    steps: int,
    chunk_rows: int | None,
    quadrature: Quadrature | str,
    engine: str,
    completeness: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """For each target the scores ``(facts, layers, d2)`` and, if asked for, completeness gaps ``(facts, layers)``."""
    if engine not in ENGINES:
        raise ValueError(f"attribution_engine: {engine!r} must be one of {ENGINES}")
    if not facts:
        raise ValueError("facts: there are none; name one at least")
    if chunk_rows is not None and (type(chunk_rows) is not int or chunk_rows < 1):
        raise ValueError(f"chunk_rows: {chunk_rows!r} must be a whole number of at least 1, or None")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(model).__name__} is an encoder-decoder; KNE edits decoders that answer by going on with the prompt"
        )
    for fact in facts:
        require_length(fact, model.config)
        require_known(fact, model)
    for target in targets:
        _require_every_position(model, target)
    alphas, weights = quadrature_of(quadrature)(steps)
    with preserve_state(model), fast_linear(model):
        found = None
        if engine != "whole":
            try:
                found = _by_sweep(model, targets, facts, alphas, weights, chunk_rows, completeness)
            except ReplayMismatch:
                raise
            except UnsupportedModel as error:
                if engine == "sweep":
                    raise
                _warn(model, error)
        if found is None:
            found = _by_full_passes(model, targets, facts, alphas, weights, chunk_rows, completeness)
    of_targets, changes = found
    for i, fact in enumerate(facts):
        if not all(of_target[i].isfinite().all() for of_target in of_targets):
            raise FloatingPointError(
                f"attribution of {fact.prompt!r} -> {fact.target!r} is not finite; load the model in float32 or "
                f"bfloat16"
            )
    gaps = [of_target.sum(-1) - change for of_target, change in zip(of_targets, changes)]
    return of_targets, gaps


def _require_every_position(model: nn.Module, target: Target) -> None:
    """Raises UnsupportedModel for a module of a list within a decoder layer, such as an expert of a mixture.

    The router may send every position there, in an order of its own: the number of outputs does not tell.
    """
    for name in target.names:
        inner = name.split(".")[target.layers_path.count(".") + 2 :]  # below the decoder layer
        for i, part in enumerate(inner):
            holder = name.rsplit(".", len(inner) - i)[0]
            if part.isdigit() and isinstance(model.get_submodule(holder), nn.ModuleList):
                raise not_everywhere(name)


def _by_sweep(
    model: nn.Module,
    targets: Sequence[Target],
    facts: Sequence[Fact],
    alphas: Tensor,
    weights: Tensor,
    chunk_rows: int | None,
    completeness: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and changes of probability by the fused sweep."""
    paths = {target.layers_path for target in targets}
    if len(paths) != 1:
        raise ValueError(f"target_modules: {', '.join(t.template for t in targets)} are not of one decoder")
    inner = (alphas != 1).nonzero().flatten()
    end_weight = float(weights[alphas == 1].sum()) if len(inner) < len(alphas) else None
    with Replay(model, paths.pop()) as replay:
        prepared = prepare(replay, targets, facts, end_gradients=end_weight is not None)
        per_chunk = max(1, (chunk_rows or _rows_in_flight(prepared)) // (prepared.paths * len(facts)))
        integrals = start_integrals(prepared, end_weight)
        points = torch.cartesian_prod(torch.arange(prepared.answers.longest), inner)  # (token, step)
        for chunk in points.split(per_chunk) if len(points) else ():
            add_points(replay, prepared, integrals, chunk[:, 0], alphas[chunk[:, 1]], weights[chunk[:, 1]])
        changes = probability_changes(replay, prepared, targets, per_chunk) if completeness else []
        return scores(prepared, integrals, targets), changes


def _by_full_passes(
    model: nn.Module,
    targets: Sequence[Target],
    facts: Sequence[Fact],
    alphas: Tensor,
    weights: Tensor,
    chunk_rows: int | None,
    completeness: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and changes of probability by passes through the whole model."""
    rows = chunk_rows or MOST_ROWS["cpu"]
    alone = [attribute_by_full_passes(model, targets, fact, alphas, weights, rows) for fact in facts]
    changes = [changes_by_full_passes(model, targets, fact) for fact in facts] if completeness else []
    return [torch.stack(of_target) for of_target in zip(*alone)], [
        torch.stack(of_target) for of_target in zip(*changes)
    ]


def _warn(model: nn.Module, error: UnsupportedModel) -> None:
    if model not in _WARNED:
        _WARNED.add(model)
        logger.warning(
            "%s. Every path point takes a pass through the whole model instead: exact, but tens of times slower", error
        )
