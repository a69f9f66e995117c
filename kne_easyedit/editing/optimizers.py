"""How the trained rows move: optimisers, by name in `OPTIMIZERS`.

An optimiser is a class with the members of `Optimizer`, built from the rows and the settings, and a line in
`OPTIMIZERS`. What is minimised is in `objectives`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kne_easyedit.editing.projection import InputProjection
from kne_easyedit.editing.settings import EditSettings


@dataclass(frozen=True)
class TrainedRows:
    """The trained parameter of one module: ``scale * values`` is added to the rows of its weight."""

    module: str
    values: Tensor
    """PEFT's ``A``, which is ``W_kne`` (Eq. 8-10): ``(n, d1)``, a leaf."""
    scale: float
    """``alpha / sqrt(n)`` (Eq. 11)."""
    projection: InputProjection | None = None
    """Along what it leaves of a direction the rows may move; None: anywhere."""

    def project(self, directions: Tensor) -> Tensor:
        """What rows ``(n, d1)`` have of the directions in which these rows may move."""
        return directions if self.projection is None else self.projection(directions)


class Optimizer(Protocol):
    """What `train_rows` asks of an optimiser. It changes ``values`` of the rows in place."""

    rate_setting: ClassVar[str]
    """The setting that makes its steps longer or shorter, for messages."""
    moments: ClassVar[int]
    """Tensors of the rows' size that it keeps between steps, for `memory_formulas`."""

    def __init__(self, rows: Sequence[TrainedRows], hparams: EditSettings) -> None:
        """Before the first step."""

    def step(self, loss: Tensor, gradients: Sequence[Tensor], directions: Sequence[Tensor] | None = None) -> bool:
        """One step.

        Args:
            loss: The sum that is minimised: the answers' cross-entropy and all weighted objectives, in nats.
            gradients: Its gradients with respect to ``values``, one for each of the rows.
            directions: Their projections (`TrainedRows.project`), where these are known; None: they are computed.

        Returns:
            Whether this step, or one before it, has moved anything.

        Raises:
            FloatingPointError: A gradient, or the step, is not finite; nothing has moved.
        """


class AdamW:
    """torch's AdamW on ``W_kne``: the paper's. Reads ``lr`` and ``weight_decay``.

    Where rows have a projection, their gradients and the steps that AdamW makes of them are projected.
    """

    rate_setting: ClassVar[str] = "lr"
    moments: ClassVar[int] = 2

    def __init__(self, rows: Sequence[TrainedRows], hparams: EditSettings) -> None:
        self._rows = rows
        self._optimizer = torch.optim.AdamW(
            [one.values for one in rows], lr=hparams.lr, weight_decay=hparams.weight_decay
        )
        self._moved = hparams.weight_decay > 0

    def step(self, loss: Tensor, gradients: Sequence[Tensor], directions: Sequence[Tensor] | None = None) -> bool:
        """One step of AdamW; of ``loss`` only the device is used."""
        largest = _numbers([torch.linalg.vector_norm(gradient, math.inf) for gradient in gradients], loss.device)
        _require_finite(self._rows, largest)
        self._moved |= any(largest)
        for one, direction in zip(self._rows, directions or _projected(self._rows, gradients)):
            one.values.grad = direction
        bound = [(one, one.values.detach().clone()) for one in self._rows if one.projection is not None]
        self._optimizer.step()
        with torch.no_grad():  # AdamW divides elementwise: its step leaves the space of the gradients
            for one, before in bound:
                one.values.copy_(before + one.project(one.values - before))
        return self._moved


class Polyak:
    """Polyak's step along gradients that are normalised for each module: no learning rate. Reads ``polyak_fraction``.

    With ``g_m`` the gradient with respect to the rows of module ``m`` themselves (to ``ΔW_m = scale * A``, not to
    ``A``) and ``d_m`` its projection (``g_m`` itself where there is none), every module moves by ``-c * d_m / ||d_m||``
    with one common length ``c = polyak_fraction * L / sum_m <g_m, d_m> / ||d_m||``. Without projections that is
    ``polyak_fraction * L / sum_m ||g_m||``. The sum is what the loss falls by for each unit of length, so that a loss
    that were linear would fall by ``polyak_fraction * L``. Rows with a gradient of zero stay, and those of which the
    projection leaves rounding noise alone: along that the loss may even rise.

    ``L`` is the sum that is minimised, with the weighted objectives, for the gradients are those of the sum: 0 is a
    lower bound of every term. Steps do not depend on ``alpha``: ``ΔW`` is the same, up to rounding.
    """

    rate_setting: ClassVar[str] = "polyak_fraction"
    moments: ClassVar[int] = 0

    def __init__(self, rows: Sequence[TrainedRows], hparams: EditSettings) -> None:
        self._rows, self._fraction = rows, hparams.polyak_fraction
        self._moved = False

    def step(self, loss: Tensor, gradients: Sequence[Tensor], directions: Sequence[Tensor] | None = None) -> bool:
        """One step, of zero length where all gradients are zero."""
        directions = directions or _projected(self._rows, gradients)
        norms = _numbers([direction.norm() for direction in directions], loss.device)
        inner = _numbers([(g * d).sum() for g, d in zip(gradients, directions)], loss.device)
        _require_finite(self._rows, inner)
        norms = [norm if product > 0 else 0.0 for product, norm in zip(inner, norms)]
        # d/dA = scale * d/dΔW: of ΔW both norm and slope are those of A divided by the scale.
        slope = sum(product / (norm * one.scale) for product, norm, one in zip(inner, norms, self._rows) if norm)
        if not slope:
            return self._moved
        length = self._fraction * loss.item() / slope
        factors = [length / (one.scale * norm) if norm else 0.0 for one, norm in zip(self._rows, norms)]
        for one, factor in zip(self._rows, factors):
            if not abs(factor) <= torch.finfo(one.values.dtype).max:
                why = (
                    "its gradient is all but 0; load the model in float32 or bfloat16"
                    if one.projection is None
                    else "hardly a direction is left in which its rows may move; take fewer neighbours "
                    "(neighbour_relation_size, neighbour_subject_size) or a larger projection_ridge"
                )
                raise FloatingPointError(f"training: the step of {one.module} is {length:.3g} long: {why}")
        with torch.no_grad():
            for one, direction, factor in zip(self._rows, directions, factors):
                if factor:
                    one.values.add_(direction, alpha=-factor)
        self._moved |= any(factors)
        return self._moved


def _projected(rows: Sequence[TrainedRows], gradients: Sequence[Tensor]) -> list[Tensor]:
    return [one.project(gradient) for one, gradient in zip(rows, gradients)]


def _require_finite(rows: Sequence[TrainedRows], sizes: Sequence[float]) -> None:
    """Raises FloatingPointError for a module whose gradient has a size that is not finite."""
    for one, size in zip(rows, sizes):
        if not math.isfinite(size):
            raise FloatingPointError(
                f"training: the gradient of {one.module} is not finite: it is beyond the model's number type; load the "
                f"model in float32 or bfloat16"
            )


def _numbers(scalars: Sequence[Tensor], device: torch.device) -> list[float]:
    """Scalars of any device as numbers, by one transfer."""
    return torch.stack([scalar.to(device) for scalar in scalars]).tolist()


OPTIMIZERS: Mapping[str, type[Optimizer]] = {"adamw": AdamW, "polyak": Polyak}
"""Value of the setting ``optimizer`` -> the optimiser."""
