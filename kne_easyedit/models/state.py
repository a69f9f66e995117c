"""Leave a model, and the generators of random numbers, as they were found, whatever happens in between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from kne_easyedit._util.interrupts import defer_interrupts


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside; ``training``, ``requires_grad`` and ``use_cache`` put back after.

    Frozen because only activations need gradients here: autograd then neither computes nor keeps anything
    for the weights. Evaluation mode also switches gradient checkpointing off, under which a decoder layer
    would drop its cache. torch's modes are those of `default_modes`, and Ctrl-C waits for an `interrupts.safe_point`, so
    that no clean-up is interrupted. Raises ValueError for a model that cannot be trained (`require_trainable`).
    """
    require_trainable(model)
    with defer_interrupts(), default_modes(model):
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


@contextmanager
def default_modes(model: nn.Module) -> Iterator[None]:
    """Inside, torch's modes are the usual ones, whatever the caller's: gradients on, no inference mode, no autocast.

    Under autocast a step would train against copies of the weights that autocast made once and keeps.
    """
    kinds = {"cpu", *(parameter.device.type for parameter in model.parameters())}
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as off:
        for kind in sorted(kinds):
            if torch.amp.is_autocast_available(kind):
                off.enter_context(torch.autocast(kind, enabled=False))
        yield


def require_trainable(model: nn.Module) -> None:
    """Raises ValueError for a compiled model, and for one whose parameters were made in ``torch.inference_mode``."""
    kind = type(model).__name__
    for name, module in model.named_modules():
        where = f"model: {name} ({type(module).__name__})" if name else f"model: {kind}"
        if type(module).__name__ == "OptimizedModule":  # by name: importing torch._dynamo takes seconds
            way = "pass model._orig_mod" if not name else "put its _orig_mod in its place"
            raise ValueError(
                f"{where} is compiled by torch.compile; {way} (the weights are the same) and compile after the edit"
            )
        if module._compiled_call_impl is not None:
            raise ValueError(
                f"{where} was compiled by its compile(); set its _compiled_call_impl to None and compile after the edit"
            )
        if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            raise ValueError(
                f"{where} has a compiled forward; delete it (`del module.forward`) and compile after the edit"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"model: {kind} was loaded inside torch.inference_mode (see {name}): it cannot be trained; load it outside"
            )


def seed_generators(seed: int) -> None:
    """Seeds Python's, numpy's and torch's generators: what EasyEdit draws comes from all three."""
    import numpy

    for seeded in (random.seed, numpy.random.seed, torch.manual_seed):
        seeded(seed)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Python's, numpy's and torch's generators (of all GPUs, too) go on afterwards as if nothing had been drawn or seeded inside."""
    import numpy

    python, numeric = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numeric)
