"""How far apart two results lie, measured in roundings of their number type."""

from __future__ import annotations

import torch

ONE_SUM = 64
"""Roundings that one product of matrices or one mean may differ by, cut into other partial sums.

The error of a sum of n terms grows with sqrt(n) (at worst n) roundings of its largest partial sum; here n is below a
hundred, and partial sums are not much larger than the results."""
A_MODEL = 1024
"""The same through all layers of a model, forward and backward: roundings add up over the layers, and the tests'
sharp weights magnify them. Up to 60 were measured over all kernels (`make test-kernels`); a wrong computation gives a
thousand times the bound."""


def roundings(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> float:
    """The largest difference in units of ``eps * max |expected|``, in the type of the computation (``dtype`` if given).

    Entries share one unit: what rounds in a product is its largest terms, however small the sum.
    """
    assert found.shape == expected.shape
    eps = max(torch.finfo(t).eps for t in ((dtype,) if dtype else (found.dtype, expected.dtype)))
    return ((found.double() - expected.double()).abs().max() / (eps * expected.double().abs().max())).item()


def largest(scores):
    return scores.abs().max().item()


def difference(ours, theirs):
    """Largest absolute difference and the same relative to the largest score."""
    assert ours.shape == theirs.shape
    apart = largest(ours - theirs)
    return apart, apart / largest(theirs)
