"""Matrix products in float32 on a CPU: by oneDNN where that is faster than torch's own choice.

torch takes MKL for them, and MKL leaves AVX-512 unused on processors that are not Intel's: there oneDNN, which
torch carries as well, is up to twice as fast. Which one is faster is measured once a process, not looked up.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_ROWS, _WIDTH = 512, 768
"""Size of the trial: rows of a sweep, a small model's width. It takes some milliseconds."""


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
    """Whether oneDNN beats torch's own choice on this machine by a tenth or more."""
    try:
        x, weight = torch.randn(_ROWS, _WIDTH), torch.randn(_WIDTH, _WIDTH)
        own, other = [], []
        for _ in range(5):
            own.append(_seconds(lambda: functional.linear(x, weight)))
            other.append(_seconds(lambda: _onednn(x, weight)))
    except (AttributeError, RuntimeError):  # a torch without oneDNN, or without this entry to it
        return False
    return min(other) < 0.9 * min(own)


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


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
