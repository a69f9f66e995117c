"""Leave a model, and the generators of random numbers, as they were found, whatever happens in between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside; ``training``, ``requires_grad`` and ``use_cache`` put back after.

    Frozen because only activations need gradients here: autograd then neither computes nor keeps anything
    for the weights. Evaluation mode also switches gradient checkpointing off, under which a decoder layer
    would drop its cache.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    use_cache = getattr(model.config, "use_cache", None)
    try:
        model.eval()
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        if use_cache is not None:
            model.config.use_cache = use_cache


def seed_generators(seed: int) -> None:
    """Seeds Python's, numpy's and torch's generators: what EasyEdit draws comes from all three."""
    import numpy

    for seeded in (random.seed, numpy.random.seed, torch.manual_seed):
        seeded(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Python's, numpy's and torch's generators (of all GPUs, too) go on afterwards as if nothing had been drawn or seeded inside."""
    import numpy

    python, numeric = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numeric)
