"""Which device and which number type: from settings, and of a loaded model."""

from __future__ import annotations

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device of the input embeddings: where token ids belong, also in a model spread over several."""
    return model.get_input_embeddings().weight.device


def resolve_device(device: int | str):
    """The torch device of a ``device`` setting. Raises ValueError if this machine does not have it."""
    import torch

    name = f"cuda:{device}" if str(device).isdigit() else str(device)
    resolved = torch.device(name)
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            found = f"has {count} CUDA device(s)" if count else "has no CUDA device"
            raise ValueError(
                f"device: {device!r} does not exist, this machine {found}; set device: cpu or another number"
            )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device: {device!r} does not exist on this machine; set device: cpu")
    return resolved


def dtype_of(hparams) -> torch.dtype:
    """The type of the weights that ``fp16`` or ``bf16`` of a method's settings ask for; float32 if neither does, or neither is there.

    Raises ValueError if both do.
    """
    bf16, fp16 = getattr(hparams, "bf16", False), getattr(hparams, "fp16", False)
    if bf16 and fp16:
        raise ValueError("fp16: True and bf16 exclude each other")
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
