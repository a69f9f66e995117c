"""Eq. 3-5: integrated gradients of the answer's token probabilities with respect to output neurons."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn

from kne_easyedit._util.machine import free_memory
from kne_easyedit.attribution.full_passes import attribute_by_full_passes
from kne_easyedit.attribution.quadrature import Quadrature, riemann
from kne_easyedit.attribution.replay import Replay, ReplayMismatch, UnsupportedModel
from kne_easyedit.attribution.sweep import HEAD_ROWS, Sweep
from kne_easyedit.facts.encoding import Fact, encode
from kne_easyedit.models.fast_linear import fast_linear
from kne_easyedit.models.state import preserve_state
from kne_easyedit.models.targets import Target, resolve_target

logger = logging.getLogger(__name__)

ENGINES = ("auto", "sweep", "whole")

FREE_SHARE = 0.25
"""Share of the free memory that rows in flight may take if their number is not given."""
MOST_ROWS = {"cpu": 2400}
"""More bring no speed: on a CPU their activations only outgrow its caches. Elsewhere memory is the limit."""

_WARNED: WeakSet[nn.Module] = WeakSet()


def attribute(
    model: nn.Module,
    tokenizer,
    prompt: str,
    target: str,
    target_module: str,
    steps: int = 20,
    *,
    layers: Sequence[int] = (),
    chunk_rows: int | None = None,
    quadrature: Quadrature = riemann,
    engine: str = "auto",
) -> Tensor:
    """Eq. 5: the attribution of every output neuron of ``target_module`` for one fact.

    Parameters
    ----------
    model, tokenizer:
        A causal language model of transformers. It is left exactly as it was found.
    prompt, target:
        The fact: its answer ``target`` follows ``prompt`` after one blank.
    target_module:
        Template such as ``model.layers.{}.mlp.down_proj``.
    layers:
        Numbers of the layers to attribute; empty: all.
    steps, chunk_rows, quadrature, engine:
        As in `attribute_facts`.

    Returns
    -------
    Tensor ``(layers, d2)`` in float32 (float64 for a float64 model) on the CPU, in probability: for one answer
    token and ``m -> inf`` a row sums to ``P(w) - P(0)``.

    Raises ValueError for a fact or template that cannot be used, and what `attribute_facts` raises.
    """
    chosen = resolve_target(model, target_module, layers)
    facts = [encode(tokenizer, prompt, target)]
    return attribute_facts(model, [chosen], facts, steps, chunk_rows=chunk_rows, quadrature=quadrature, engine=engine)[
        0
    ][0]


def attribute_facts(
    model: nn.Module,
    targets: Sequence[Target],
    facts: Sequence[Fact],
    steps: int = 20,
    *,
    chunk_rows: int | None = None,
    quadrature: Quadrature = riemann,
    engine: str = "auto",
) -> list[Tensor]:
    """Eq. 5 for several facts and module types in one sweep: for each target ``(facts, layers, d2)``.

    Parameters
    ----------
    steps:
        ``m``, the number of nodes.
    chunk_rows:
        Path points in flight at most (one point of every path at least). Bounds memory, not the result; None:
        chosen from the free memory (`rows_in_flight`).
    quadrature:
        ``m -> (nodes, weights)``: `quadrature.riemann`, the paper's, or `quadrature.gauss_legendre`.
    engine:
        ``sweep``: the fused sweep; ``whole``: a pass through the whole model for every path point, slow, for
        models whose layers cannot be replayed; ``auto``: ``whole`` for those, with a warning.

    Raises UnsupportedModel for an encoder-decoder model or (``sweep``) for layers that cannot be replayed,
    ReplayMismatch for layers that replay differently from the model itself, FloatingPointError for scores that
    are not finite.
    """
    if engine not in ENGINES:
        raise ValueError(f"attribution_engine: {engine!r} must be one of {ENGINES}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(model).__name__} is an encoder-decoder; KNE edits decoders that answer by going on with the prompt"
        )
    alphas, weights = quadrature(steps)
    with preserve_state(model), fast_linear(model):
        scores = None
        if engine != "whole":
            try:
                scores = _by_sweep(model, targets, facts, alphas, weights, chunk_rows)
            except ReplayMismatch:
                raise
            except UnsupportedModel as error:
                if engine == "sweep":
                    raise
                _warn(model, error)
        if scores is None:
            rows = chunk_rows or MOST_ROWS["cpu"]
            alone = [attribute_by_full_passes(model, targets, fact, alphas, weights, rows) for fact in facts]
            scores = [torch.stack(of_target) for of_target in zip(*alone)]
    for i, fact in enumerate(facts):
        if not all(of_target[i].isfinite().all() for of_target in scores):
            raise FloatingPointError(
                f"attribution of {fact.prompt!r} -> {fact.target!r} is not finite; load the model in float32 or bfloat16"
            )
    return scores


def rows_in_flight(model: nn.Module, targets: Sequence[Target], fact: Fact) -> int:
    """How many path points `attribute_facts` may have in flight, by the memory that is free now.

    A row's need is measured on ``fact``, not modelled: what autograd keeps of it in each layer.
    """
    with preserve_state(model), Replay(model, targets[0].layers_path) as replay:
        return _rows_in_flight(Sweep(replay, targets, [fact]))


def _rows_in_flight(sweep: Sweep) -> int:
    device = sweep.clean.logits.device
    logits = 3 * HEAD_ROWS * sweep.clean.logits.shape[-1] * 4  # with their softmax, in float32
    rows = int((FREE_SHARE * free_memory(device) - logits) / sweep.row_bytes)
    return max(1, min(rows, MOST_ROWS.get(device.type, rows)))


def _by_sweep(
    model: nn.Module,
    targets: Sequence[Target],
    facts: Sequence[Fact],
    alphas: Tensor,
    weights: Tensor,
    chunk_rows: int | None,
) -> list[Tensor]:
    paths = {target.layers_path for target in targets}
    if len(paths) != 1:
        raise ValueError(f"target_modules: {', '.join(t.template for t in targets)} are not of one decoder")
    with Replay(model, paths.pop()) as replay:
        sweep = Sweep(replay, targets, facts)
        per_chunk = max(1, (chunk_rows or _rows_in_flight(sweep)) // (sweep.paths * len(facts)))
        inner = (alphas != 1).nonzero().flatten()
        if len(inner) < len(alphas):
            sweep.run_end(float(weights[alphas == 1].sum()))
        points = torch.cartesian_prod(torch.arange(sweep.longest), inner)  # (token, step)
        for chunk in points.split(per_chunk) if len(points) else ():
            sweep.run(chunk[:, 0], alphas[chunk[:, 1]], weights[chunk[:, 1]])
        return sweep.scores()


def _warn(model: nn.Module, error: UnsupportedModel) -> None:
    if model not in _WARNED:
        _WARNED.add(model)
        logger.warning(
            "%s. Every path point takes a pass through the whole model instead: exact, but tens of times slower", error
        )
