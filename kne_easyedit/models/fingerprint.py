"""The digest that tells one loaded model from another."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from kne_easyedit._util.digest import digest

_NOT_IN_CONFIG = ("_name_or_path", "transformers_version", "use_cache", "architectures", "dtype", "torch_dtype")


def model_digest(model: nn.Module) -> str:
    """SHA-256 of all weights (names, types, shapes, bits), buffers and the configuration.

    It tells models apart, not files: the same path with other weights, or an edited model, has another digest.
    """

    def of_tensor(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        if tensor.is_meta:
            raise ValueError(
                f"model: {name} is not loaded (on the meta device), and scores belong to all weights; load it without offload"
            )
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(
            f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + hashlib.sha256(data).digest()
        ).hexdigest()

    tensors = [*model.named_parameters(), *model.named_buffers()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets other threads run
        digests = list(pool.map(of_tensor, tensors))
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_IN_CONFIG}
    return digest([type(model).__name__, sorted(digests), config])
