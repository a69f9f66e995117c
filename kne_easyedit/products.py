"""Matrix products in float32 on a CPU: by oneDNN where that is faster than torch's own choice.

torch takes MKL for them, and MKL leaves AVX-512 unused on processors that are not Intel's: there oneDNN, which
torch carries as well, is twice as fast (docs/performance.md).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class FastProducts(TorchFunctionMode):
    """Inside, linear layers with frozen float32 weights on a CPU multiply by the faster library.

    The results are those of `torch.nn.functional.linear` up to rounding. Everything else is as ever.
    """

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function is functional.linear and _applies(*arguments, **keywords):
            return _Linear.apply(*arguments, *keywords.values())
        return function(*arguments, **keywords)


@cache
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 that is not Intel's, and a torch that has oneDNN.

    Looked up, not timed: processes that chose differently would round differently.
    """
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and _vendor() not in ("", "GenuineIntel") and _has_onednn()


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _has_onednn() -> bool:
    try:
        return _onednn(torch.ones(1, 2), torch.ones(1, 2)).item() == 2
    except (AttributeError, RuntimeError):  # a torch without it, or without this entry to it
        return False


def _applies(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    frozen = not weight.requires_grad and not (bias is not None and bias.requires_grad)
    return frozen and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 and onednn_is_faster()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(context, x, weight, bias=None):
        context.weight = weight
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(context, gradient):
        return _onednn(gradient, context.weight.t()), None, None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
