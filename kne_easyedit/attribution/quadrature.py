"""Quadratures of the path integral of Eq. 5: pure functions ``m -> (nodes, weights)`` on [0, 1], in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kne_easyedit._util.messages import require_one_of

Quadrature = Callable[[int], tuple[Tensor, Tensor]]


def riemann(steps: int) -> tuple[Tensor, Tensor]:
    """The right Riemann sum of Eq. 5: nodes ``i/m`` and weights ``1/m``, ``i = 1..m``. Its error falls as ``1/m``.

    Args:
        steps: ``m``.

    Returns:
        Nodes and weights, each ``(m,)`` in float64.

    Raises:
        ValueError: ``steps`` is no whole number of at least 1.
    """
    _require_steps(steps)
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps, torch.full((steps,), 1 / steps, dtype=torch.float64)


def gauss_legendre(steps: int) -> tuple[Tensor, Tensor]:
    """The Gauss-Legendre rule: ``m`` nodes that integrate polynomials up to degree ``2m - 1`` exactly.

    It is not the paper's sum, but approximates the same integral: with few steps better than `riemann` with many.

    Args:
        steps: ``m``.

    Returns:
        Nodes and weights, each ``(m,)`` in float64.

    Raises:
        ValueError: ``steps`` is no whole number of at least 1.
    """
    import numpy

    _require_steps(steps)
    nodes, weights = numpy.polynomial.legendre.leggauss(steps)  # on [-1, 1]
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


QUADRATURES: dict[str, Quadrature] = {"riemann": riemann, "gauss-legendre": gauss_legendre}
"""Setting ``quadrature`` -> function."""


def quadrature_of(chosen: Quadrature | str) -> Quadrature:
    """The function of a name in `QUADRATURES`, else ``chosen`` itself.

    Raises:
        ValueError: It is neither a function nor such a name.
    """
    if callable(chosen):
        return chosen
    require_one_of("quadrature", chosen, QUADRATURES)
    return QUADRATURES[chosen]


def _require_steps(steps: int) -> None:
    if type(steps) is not int or steps < 1:
        raise ValueError(f"attribution_steps: {steps!r} must be a whole number of at least 1 (20 is customary)")
