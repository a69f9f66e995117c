"""Eq. 6-7: from scores to the ensemble."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

AGGREGATIONS = ("max", "mean")
SCALES = ("none", "layer")


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


def scaled(scores: Tensor, scale: str) -> Tensor:
    """Scores ``(layers, d2)`` as the threshold sees them: ``layer``: in relation to their layer's largest; ``none``: as they are."""
    if scale == "none":
        return scores
    largest = scores.amax(1, keepdim=True)
    return scores / torch.where(largest > 0, largest, torch.ones_like(largest))
