"""Preserves the state of a model, and of random number generators, whatever happens in between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kne_easyedit._util.interrupts import defer_interrupts
from kne_easyedit.models.layer_kinds import SPREAD, is_bitsandbytes, known_kind
from kne_easyedit.models.offload import computing_device, read_again


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode and frozen parameters; afterwards all flags (also ``use_cache``) are restored.

    Parameters are frozen because only activations need gradients here: autograd then neither computes nor keeps
    anything for the weights. Evaluation mode also switches gradient checkpointing off, under which a decoder layer
    would drop its cache. torch's modes are those of `default_modes`, and Ctrl-C waits for an `interrupts.safe_point`,
    so that no clean-up is interrupted. Offloaded weights are read again for the backward pass (`read_again`).

    Raises:
        ValueError: The model cannot be trained (`require_trainable`).
    """
    require_trainable(model)
    config: Any = model.config
    with defer_interrupts(), default_modes(model), _differentiable(model), read_again(model):
        training = [(module, module.training) for module in model.modules()]
        # By name: of offloaded modules, every pass makes new parameters.
        trainable: list[tuple[Any, str, bool]] = [
            (m._parameters, key, p.requires_grad) for m in model.modules() for key, p in _own(m)
        ]
        use_cache = getattr(config, "use_cache", None)
        try:
            model.eval()
            for parameters, key, _ in trainable:
                parameters[key].requires_grad_(False)
            yield
        finally:
            for module, flag in training:
                module.training = flag
            for parameters, key, flag in trainable:
                parameters[key].requires_grad_(flag)
            if use_cache is not None:
                config.use_cache = use_cache


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return module.named_parameters(recurse=False)


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, gradients flow through bitsandbytes' 4-bit layers on every CPU.

    Where a CPU has products of bfloat16 (AVX-512), the library packs weights in another order for passes without
    gradients. Of a packed weight there are no gradients: they would silently be 0.
    """
    packing: list[Any] = [
        module
        for module in model.modules()
        if is_bitsandbytes(module) and getattr(module, "support_avx512bf16_for_cpu", False)
    ]
    try:
        for module in packing:
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # saving a layer unpacks it
        yield
    finally:
        for module in packing:
            module.support_avx512bf16_for_cpu = True


@contextmanager
def default_modes(model: nn.Module) -> Iterator[None]:
    """Inside, torch's modes are the defaults, whatever the caller's: gradients on, no inference mode, no autocast.

    Under autocast, training would use copies of the weights that autocast keeps.
    """
    kinds = {"cpu", *(parameter.device.type for parameter in model.parameters())}
    kinds |= {device.type for module in model.modules() if (device := computing_device(module))}
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as off:
        for kind in sorted(kinds):
            if torch.amp.is_autocast_available(kind):
                off.enter_context(torch.autocast(kind, enabled=False))
        yield


def require_trainable(model: nn.Module) -> None:
    """Raises ValueError for a model that cannot be trained as it is.

    That is a compiled one, one that is spread over processes, and one that was made in ``torch.inference_mode``.
    """
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
        if known_kind(parameter) == SPREAD:
            raise ValueError(
                f"model: {kind} is spread over processes: {name} is a DTensor (FSDP2's fully_shard, or tensor "
                f"parallelism), of which each process has a part; {SPREAD[1]}"
            )
        if parameter.is_inference():
            raise ValueError(
                f"model: {kind} was loaded inside torch.inference_mode (see {name}): it cannot be trained; load it "
                f"outside"
            )


def seed_generators(seed: int) -> None:
    """Seeds Python's, numpy's and torch's generators: EasyEdit draws from all three."""
    import numpy

    for seeded in (random.seed, numpy.random.seed, torch.manual_seed):
        seeded(seed)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Afterwards Python's, numpy's and torch's generators (also of all GPUs) are in the state from before."""
    import numpy

    python, numeric = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numeric)
