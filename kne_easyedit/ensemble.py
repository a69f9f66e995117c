"""Eq. 6-7: from attributions to the ensemble, the artefact between localising and editing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kne_easyedit.hparams import AGGREGATIONS, SCALES
from kne_easyedit.layout import Target, count_parameters, resolve_target
from kne_easyedit.paths import atomic_write

FORMAT = "kne-ensemble-1"


@dataclass(frozen=True)
class NeuronEnsemble:
    """Which output neurons of which layers are edited. Frozen; row indices are plain integers.

    Hand-made or random ensembles are as good as located ones: training and editing take any.
    """

    neurons: Mapping[str, Mapping[int, tuple[int, ...]]]
    """Template -> layer -> ascending row indices; layers without neurons are left out."""
    widths: Mapping[str, int]
    """Template -> neurons a layer (``d2``)."""
    layers: tuple[int, ...] = ()
    """The layers that were attributed."""
    thresholds: Mapping[str, float] | None = None
    """Template -> ``t_p`` (Eq. 6)."""
    p: float | None = None
    aggregation: str | None = None
    facts: int | None = None
    """Number of facts whose scores were aggregated."""
    seconds: float | None = None
    """How long their attribution took when it was computed (cached scores remember it)."""

    def __post_init__(self) -> None:
        if not self.size:
            raise ValueError("ensemble: empty, there is nothing to train; raise p or localise on other facts")
        for template, layers in self.neurons.items():
            width = self.widths.get(template)
            for layer, rows in layers.items():
                if width is None or list(rows) != sorted(set(rows)) or not rows or rows[0] < 0 or rows[-1] >= width:
                    raise ValueError(
                        f"ensemble: rows of {template.format(layer)} must be ascending, distinct and in [0, {width}); got {list(rows)[:8]}..."
                    )

    @property
    def size(self) -> int:
        """Number of neurons."""
        return sum(len(rows) for layers in self.neurons.values() for rows in layers.values())

    def counts(self) -> dict[str, dict[int, int]]:
        """Template -> layer -> number of neurons, zeros included."""
        return {
            template: {layer: len(found.get(layer, ())) for layer in sorted({*self.layers, *found})}
            for template, found in self.neurons.items()
        }

    def overlap(self, other: NeuronEnsemble) -> float:
        """Share of neurons that two ensembles have in common: shared ones over the mean size (Dice), in [0, 1]."""
        return 2 * len(self.members() & other.members()) / (self.size + other.size)

    def members(self) -> set[tuple[str, int, int]]:
        """Every neuron as (template, layer, row)."""
        return {(template, layer, row) for template, layers in self.neurons.items() for layer, rows in layers.items() for row in rows}

    def targets(self, model: nn.Module) -> dict[str, tuple[Target, list[tuple[int, ...]]]]:
        """Template -> its modules in ``model`` and the rows of each.

        Raises ValueError if ``model`` lacks a module or has it in another width: the ensemble is of another model.
        """
        found = {}
        for template, layers in self.neurons.items():
            if not layers:
                continue
            target = resolve_target(model, template, sorted(layers))
            if target.n_neurons != self.widths[template]:
                raise ValueError(
                    f"ensemble: {template} has {self.widths[template]} neurons a layer, but {target.n_neurons} in this model; "
                    f"it was made for another model"
                )
            found[template] = (target, [layers[i] for i in target.layers])
        return found

    def parameter_share(self, model: nn.Module) -> float:
        """Share of the model's parameters that lie in the ensemble's rows (biases are not trained)."""
        chosen = 0
        for target, rows in self.targets(model).values():
            chosen += sum(len(r) * (m.weight.numel() // target.n_neurons) for m, r in zip(target.modules, rows))
        return chosen / count_parameters(model)

    def save(self, path: str | Path) -> None:
        """Writes the ensemble as JSON, beside and renamed."""
        content = {
            "format": FORMAT,
            "neurons": {t: {str(layer): list(rows) for layer, rows in found.items()} for t, found in self.neurons.items()},
            "widths": dict(self.widths),
            "layers": list(self.layers),
            "thresholds": None if self.thresholds is None else dict(self.thresholds),
            "p": self.p,
            "aggregation": self.aggregation,
            "facts": self.facts,
            "seconds": self.seconds,
        }
        atomic_write(Path(path), json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> NeuronEnsemble:
        """Reads what `save` wrote. Raises ValueError for any other file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise KeyError("format")
            content["neurons"] = {
                t: {int(layer): tuple(map(int, rows)) for layer, rows in found.items()} for t, found in content["neurons"].items()
            }
            content["layers"] = tuple(content["layers"])
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # also of text, JSON, and rows that cannot be
            raise ValueError(f"ensemble: {path} is no ensemble file ({FORMAT}): {error!r}") from error


def aggregate(scores: Iterable[Tensor], aggregation: str = "max") -> tuple[Tensor, int]:
    """Elementwise ``max`` or ``mean`` of any number of score tensors (section 4.4), one in memory at a time.

    Returns the aggregate and the number of tensors. Raises ValueError if there is none.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: {aggregation!r} must be one of {AGGREGATIONS}")
    total, count = None, 0
    for one in scores:
        count += 1
        if total is None:
            total = one.clone()
        elif aggregation == "max":
            torch.maximum(total, one, out=total)
        else:
            total += one
    if total is None:
        raise ValueError("scores: there are none to aggregate; localise on at least one fact")
    return (total / count if aggregation == "mean" else total), count


def select_ensemble(
    scores: Tensor | Mapping[str, Tensor],
    p: float = 0.04,
    *,
    target_module: str | None = None,
    layers: Sequence[int] = (),
    aggregation: str = "max",
    facts: int | None = None,
    seconds: float | None = None,
    scale: str = "none",
) -> NeuronEnsemble:
    """Eq. 6-7: keeps the top ``p`` of the neurons over all layers, and of these the positive ones.

    Parameters
    ----------
    scores:
        Attributions ``(layers, d2)`` of one fact, or ``(facts, layers, d2)``, which are aggregated first; or a
        mapping of templates to such tensors. Every template has a threshold of its own.
    p:
        Fraction kept, in (0, 1]: the threshold ``t_p`` is the ``floor(p * neurons)``-th largest score (at least
        the largest); equal scores are kept together.
    target_module:
        The template, if ``scores`` is a tensor.
    layers:
        Numbers of the layers that the rows of ``scores`` stand for; empty: 0, 1, ...
    facts, seconds:
        How many facts ``scores`` were aggregated from, if that is done already, and how long they took.
    scale:
        ``layer``: scores count in relation to their layer's largest (beyond the paper); ``none``: as they are.

    Raises ValueError if nothing is positive (an empty ensemble), FloatingPointError for scores that are not finite.
    """
    if not 0 < p <= 1:
        raise ValueError(f"p: {p!r} must be in (0, 1]: it is the fraction of the neurons that is kept")
    if scale not in SCALES:
        raise ValueError(f"scale: {scale!r} must be one of {SCALES}")
    if isinstance(scores, Tensor):
        if target_module is None:
            raise ValueError("target_module: name the template that the scores belong to, or pass {template: scores}")
        scores = {target_module: scores}
    neurons, widths, thresholds, numbers = {}, {}, {}, tuple(layers)
    for template, values in scores.items():
        if values.ndim == 3:
            values, facts = aggregate(values, aggregation)
        if values.ndim != 2 or (layers and len(values) != len(layers)):
            raise ValueError(f"scores: {template} has shape {tuple(values.shape)}, wanted is (layers, d2) for layers {list(layers)}")
        if not values.isfinite().all():
            raise FloatingPointError(f"scores: those of {template} are not finite; load the model in float32 or bfloat16")
        if scale == "layer":
            largest = values.amax(1, keepdim=True)
            values = values / torch.where(largest > 0, largest, torch.ones_like(largest))
        numbers = tuple(layers) or tuple(range(len(values)))
        kept = max(1, math.floor(p * values.numel() + 1e-9))
        threshold = values.flatten().topk(kept).values[-1]
        chosen = (values >= threshold) & (values > 0)
        rows = {layer: tuple(mask.nonzero().flatten().tolist()) for layer, mask in zip(numbers, chosen)}
        neurons[template] = {layer: found for layer, found in rows.items() if found}
        widths[template], thresholds[template] = values.shape[1], float(threshold)
    return NeuronEnsemble(neurons, widths, numbers, thresholds, p, aggregation, facts, seconds)
