"""Device and number type, from settings and of a loaded model."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

from kne_easyedit._util.machine import available_cores
from kne_easyedit.models.offload import computing_device


def device_of(model: Any) -> torch.device:
    """The device of the input embeddings: the one for token ids, also in a model spread over several, or offloaded."""
    embeddings = model.get_input_embeddings()
    return computing_device(embeddings) or embeddings.weight.device


def input_embeddings(model: Any) -> Tensor:
    """The weight of the input embeddings, ``(vocabulary, hidden)``."""
    return model.get_input_embeddings().weight


def resolve_device(device: int | str) -> torch.device:
    """The torch device of a ``device`` setting.

    Args:
        device: A name of torch's, or the number of a GPU.

    Raises:
        ValueError: It is no device, or this machine does not have it.
    """
    name = f"cuda:{device}" if str(device).isdigit() else str(device)
    try:
        resolved = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is none; set a GPU's number, cpu, cuda, cuda:N or mps") from error
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


def dtype_of(hparams: Any) -> torch.dtype:
    """The number type in which a method's settings load the model: ``bf16``, ``fp16``, else float32.

    Args:
        hparams: Settings of any method; it may lack both names.

    Raises:
        ValueError: Both are set.
    """
    bf16, fp16 = getattr(hparams, "bf16", False), getattr(hparams, "fp16", False)
    if bf16 and fp16:
        raise ValueError("fp16: True and bf16 exclude each other")
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def environment(model: Any) -> dict[str, object]:
    """Versions, device and type: what a figure depends on, apart from the settings."""
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "platform": platform.platform(),
        "cpus": available_cores(),
        "device": str(device_of(model)),
        "dtype": str(next(model.parameters()).dtype),
    }
