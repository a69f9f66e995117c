"""Means of numbers in nested lists, as EasyEdit returns them."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from statistics import fmean
from typing import Any


def mean_of(values: Iterable) -> float | None:
    """The mean of numbers, or of means where they are lists; what is None or empty is left out."""
    numbers = [number for number in map(number_of, values) if number is not None]
    return fmean(numbers) if numbers else None


def number_of(value: Any) -> float | None:
    """A number as it is, or the mean of lists of numbers; None if there is none."""
    if type(value) is float:  # nearly all are: asking whether something is Real takes ten times as long
        return value
    is_single = value is None or isinstance(value, Real)  # numpy's numbers are Real, too
    return value if is_single else mean_of(value)
