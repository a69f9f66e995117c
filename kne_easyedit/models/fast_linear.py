"""Matrix products in float32 on a CPU: by oneDNN where that is faster than torch's own choice.

torch takes MKL for them, and MKL leaves AVX-512 unused on processors that are not Intel's: there oneDNN, which
torch carries as well, is twice as fast (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kne_easyedit.models.offload import own_forward


@contextmanager
def fast_linear(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers of ``model`` with frozen float32 weights on a CPU multiply by the faster library.

    The results are those of `torch.nn.functional.linear` up to rounding. Afterwards the layers are as they were, also
    after Ctrl-C if this is used inside `preserve_state`, which defers it.
    """
    chosen: list[Any] = [m for m in model.modules() if type(m) is nn.Linear] if onednn_is_faster() else []
    plain = [m for m in chosen if "forward" not in m.__dict__]
    # Where accelerate loads weights or moves inputs: its forward calls the module's own.
    hooked = [(m, m._old_forward) for m in chosen if "_hf_hook" in m.__dict__ and own_forward(m) is nn.Linear.forward]
    try:
        for module in plain:
            module.forward = partial(_forward, module)
        for module, _ in hooked:
            module._old_forward = partial(_forward, module)
        yield
    finally:
        for module in plain:
            module.__dict__.pop("forward", None)
        for module, own in hooked:
            module._old_forward = own


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by the faster library, which is used for frozen ``weight`` and ``bias`` only."""
    frozen = not weight.requires_grad and not (bias is not None and bias.requires_grad)
    if (
        frozen
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel()
        and onednn_is_faster()
    ):
        # In two dimensions: of more the library returns a view, which a model must not change in place (OLMo clamps).
        return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    return functional.linear(x, weight, bias)


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


@cache
def onednn_is_faster() -> bool:
    """Whether the processor has AVX-512 and is not Intel's, and torch has oneDNN.

    This is looked up, not timed: processes that chose differently would round differently.
    """
    return (
        "AVX512" in torch.backends.cpu.get_cpu_capability() and _vendor() not in ("", "GenuineIntel") and _has_onednn()
    )


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _has_onednn() -> bool:
    try:
        return _onednn(torch.ones(1, 2), torch.ones(1, 2)).item() == 2
    except (AttributeError, RuntimeError):  # a torch without it, or without this function
        return False


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        context.save_for_backward(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        return _onednn(gradient, weight.t()), None, None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
