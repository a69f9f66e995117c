"""Eq. 6-7: the rules by which scores become an ensemble. A new rule is one entry of `AGGREGATIONS` or `SCALES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kne_easyedit._util.messages import require_one_of


@dataclass(frozen=True)
class Aggregation:
    """A rule that makes one score tensor of many (section 4.4), one in memory at a time."""

    add: Callable[[Tensor, Tensor], Tensor]
    """``(total, scores)`` -> the total with one more tensor; may write into ``total``."""
    finish: Callable[[Tensor, int], Tensor] = lambda total, count: total
    """``(total, number of tensors)`` -> the aggregate."""


AGGREGATIONS: dict[str, Aggregation] = {
    "max": Aggregation(lambda total, scores: torch.maximum(total, scores, out=total)),
    "mean": Aggregation(lambda total, scores: total.add_(scores), lambda total, count: total / count),
}


def _by_layer(scores: Tensor) -> Tensor:
    """Scores divided by their layer's largest; a layer without a positive score stays as it is."""
    largest = scores.amax(1, keepdim=True)
    return scores / torch.where(largest > 0, largest, torch.ones_like(largest))


def _shuffled(scores: Tensor, scale: Callable[[Tensor], Tensor] = _by_layer, seed: int = 0) -> Tensor:
    """As ``scale``, then permuted within each layer, always alike: as many rows of each layer, chosen at random."""
    generator = torch.Generator().manual_seed(seed)
    scaled = scale(scores)
    order = torch.stack([torch.randperm(scaled.shape[1], generator=generator) for _ in scaled])
    return scaled.gather(1, order.to(scaled.device))


def _as_it_is(scores: Tensor) -> Tensor:
    return scores


SHUFFLED = {
    "layer": ("shuffled", *(f"shuffled-{seed}" for seed in range(1, 5))),
    "none": ("shuffled-none", *(f"shuffled-none-{seed}" for seed in range(1, 5))),
}
"""Scale -> its controls, each another draw: as many rows of each layer as under that scale, chosen at random."""
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _as_it_is,
    "layer": _by_layer,
    # the controls of a comparison: what does it matter which rows these are?
    **{name: partial(_shuffled, seed=seed) for seed, name in enumerate(SHUFFLED["layer"])},
    **{name: partial(_shuffled, scale=_as_it_is, seed=seed) for seed, name in enumerate(SHUFFLED["none"])},
}
"""Rules ``(layers, d2) -> (layers, d2)`` that scale the scores before the threshold."""


@dataclass(frozen=True)
class Selection:
    """Which neurons are kept, given their scores: the settings of Eq. 6-7.

    Raises:
        ValueError: A field is out of range. The message names the setting of `KNEHyperParams` (``score_scale`` for
            ``scale``), its range, the value, and the nearest valid name.
    """

    p: float = 0.04
    """Fraction of the neurons kept, in (0, 1]; of each module type, over all layers."""
    aggregation: str = "max"
    """How the scores of several facts become one: a name of `AGGREGATIONS`."""
    scale: str = "none"
    """How scores are scaled before the threshold: a name of `SCALES`."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers in which neurons are chosen; empty: all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)) or not 0 < self.p <= 1:
            raise ValueError(f"p: {self.p!r} must be in (0, 1]: it is the fraction of the neurons that is kept")
        require_one_of("aggregation", self.aggregation, AGGREGATIONS)
        require_one_of("score_scale", self.scale, SCALES)
        if not all(type(i) is int and i >= 0 for i in self.layers):
            raise ValueError(f"layers: {list(self.layers)!r} must be numbers of layers, from 0")

    def running(self) -> RunningAggregate:
        """An empty aggregate of score tensors under this selection's rule."""
        return RunningAggregate(self.aggregation)

    def scaled(self, scores: Tensor) -> Tensor:
        """The scores ``(layers, d2)`` in the unit in which the threshold compares them."""
        return SCALES[self.scale](scores)

    def budget(self, neurons: int) -> int:
        """How many of ``neurons`` neurons are kept if no scores are equal: ``floor(p * neurons)``, at least one."""
        return max(1, math.floor(self.p * neurons + 1e-9))

    def choose(self, scores: Tensor) -> tuple[Tensor, float]:
        """Eq. 6-7 on the scores ``(layers, d2)`` of one module type.

        The threshold ``t_p`` is the `budget`-th largest of all scaled scores. Scores that equal it are kept, and of all
        of these only positive ones.

        Returns:
            A mask ``(layers, d2)`` of the neurons kept, and ``t_p``.
        """
        scores = self.scaled(scores)
        threshold = scores.flatten().topk(self.budget(scores.numel())).values[-1]
        return (scores >= threshold) & (scores > 0), float(threshold)


class RunningAggregate:
    """Elementwise aggregate of score tensors (section 4.4) that are added one after another.

    Raises:
        ValueError: ``aggregation`` is not a name of `AGGREGATIONS`.
    """

    def __init__(self, aggregation: str = "max") -> None:
        require_one_of("aggregation", aggregation, AGGREGATIONS)
        self.rule, self.count = AGGREGATIONS[aggregation], 0
        self._total: Tensor | None = None

    def add(self, scores: Tensor) -> None:
        """Adds one tensor; all must have the same shape."""
        self._total = scores.clone() if self._total is None else self.rule.add(self._total, scores)
        self.count += 1

    def result(self) -> Tensor:
        """The aggregate of what was added. Raises ValueError if that is nothing."""
        if self._total is None:
            raise ValueError("scores: there are none to aggregate; localise on at least one fact")
        return self.rule.finish(self._total, self.count)


def aggregate(scores: Iterable[Tensor], aggregation: str = "max") -> tuple[Tensor, int]:
    """Elementwise aggregate of any number of score tensors (section 4.4), one in memory at a time.

    Args:
        scores: Tensors of one shape; they are left as they are.
        aggregation: ``max`` or ``mean``.

    Returns:
        The aggregate, of the same shape, and the number of tensors.

    Raises:
        ValueError: There is no tensor, or ``aggregation`` is unknown.
    """
    running = RunningAggregate(aggregation)
    for one in scores:
        running.add(one)
    return running.result(), running.count
