"""Decoder layers that return what is known already instead of computing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def fixed_outputs(layers: Sequence[nn.Module], outputs: Sequence[object]) -> Iterator[None]:
    """Inside, each of ``layers`` returns its entry of ``outputs``, whatever it gets; afterwards they are as they were.

    The model's own forward still runs: what it does before, between and after the layers is its own.
    """
    before = [layer.__dict__.get("forward") for layer in layers]  # accelerate's hooks are there
    try:
        for layer, value in zip(layers, outputs, strict=True):
            layer.forward = _constant(value)
        yield
    finally:
        for layer, own in zip(layers, before):
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = own


def _constant(value: object) -> Callable[..., object]:
    return lambda *args, **kwargs: value
