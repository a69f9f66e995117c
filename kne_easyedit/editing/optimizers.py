"""How the trained rows move: optimisers, by name in `OPTIMIZERS`.

An optimiser is a class with the members of `Optimizer`, built from the rows and the settings, and a line in
`OPTIMIZERS`. What is minimised is in `objectives`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kne_easyedit.editing.settings import EditSettings


@dataclass(frozen=True)
class TrainedRows:
    """The trained parameter of one module: ``scale * values`` is added to the rows of its weight."""

    module: str
    values: Tensor
    """PEFT's ``A``, which is ``W_kne`` (Eq. 8-10): ``(n, d1)``, a leaf."""
    scale: float
    """``alpha / sqrt(n)`` (Eq. 11)."""


class Optimizer(Protocol):
    """What `train_rows` asks of an optimiser. It changes ``values`` of the rows in place."""

    rate_setting: ClassVar[str]
    """The setting that makes its steps longer or shorter, for messages."""
    moments: ClassVar[int]
    """Tensors of the rows' size that it keeps between steps, for `memory_formulas`."""

    def __init__(self, rows: Sequence[TrainedRows], hparams: EditSettings) -> None:
        """Before the first step."""

    def step(self, loss: Tensor, gradients: Sequence[Tensor]) -> None:
        """One step.

        Args:
            loss: The sum that is minimised: the answers' cross-entropy and all weighted objectives, in nats.
            gradients: Its gradients with respect to ``values``, one for each of the rows.
        """


class AdamW:
    """torch's AdamW on ``W_kne``: the paper's. Reads ``lr`` and ``weight_decay``."""

    rate_setting: ClassVar[str] = "lr"
    moments: ClassVar[int] = 2

    def __init__(self, rows: Sequence[TrainedRows], hparams: EditSettings) -> None:
        self._parameters = [one.values for one in rows]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=hparams.lr, weight_decay=hparams.weight_decay)

    def step(self, loss: Tensor, gradients: Sequence[Tensor]) -> None:
        """One step of AdamW; ``loss`` is not used."""
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient
        self._optimizer.step()


class Polyak:
    """Polyak's step along gradients that are normalised for each module: no learning rate. Reads ``polyak_fraction``.

    With ``g_m`` the gradient with respect to the rows of module ``m`` themselves (to ``ΔW_m = scale * A``, not to
    ``A``), every module moves by ``-c * g_m / ||g_m||`` with one common length ``c = polyak_fraction * L / sum_m
    ||g_m||``. The sum of the norms is what the loss falls by for each unit of length, so that a loss that were linear
    would fall by ``polyak_fraction * L``. Rows with a gradient of zero stay.

    ``L`` is the sum that is minimised, with the weighted objectives, for the gradients are those of the sum: 0 is a
    lower bound of every term. Steps do not depend on ``alpha``: ``ΔW`` is the same, up to rounding.
    """

    rate_setting: ClassVar[str] = "polyak_fraction"
    moments: ClassVar[int] = 0

    def __init__(self, rows: Sequence[TrainedRows], hparams: EditSettings) -> None:
        self._rows, self._fraction = rows, hparams.polyak_fraction

    def step(self, loss: Tensor, gradients: Sequence[Tensor]) -> None:
        """One step, of zero length where all gradients are zero."""
        of_a = torch.stack([gradient.norm().to(loss.device) for gradient in gradients]).tolist()
        norms = [norm / one.scale for norm, one in zip(of_a, self._rows)]  # d/dA = scale * d/dΔW
        total = sum(norms)
        if not total:
            return
        length = self._fraction * loss.item() / total
        with torch.no_grad():
            for one, gradient, norm in zip(self._rows, gradients, norms):
                if norm:
                    # ΔW moves by -length * g / ||g||, and A by that divided by the scale.
                    one.values.add_(gradient, alpha=-length / (one.scale**2 * norm))


OPTIMIZERS: Mapping[str, type[Optimizer]] = {"adamw": AdamW, "polyak": Polyak}
"""Value of the setting ``optimizer`` -> the optimiser."""
