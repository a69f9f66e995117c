"""Leave a model as it was found: flags, modules and attributes, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
