"""Digests of a loaded model and of its tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit._util.digest import digest
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.models.layer_kinds import is_bitsandbytes
from kne_easyedit.models.weights import itself, named_weights

_NOT_IN_CONFIG = ("_name_or_path", "transformers_version", "use_cache", "architectures", "dtype", "torch_dtype")


_REWRITTEN = ("absmax", "quant_state")
"""Parts of the names of what a pass rewrites: on CPUs that multiply bfloat16, bitsandbytes packs 4-bit weights for
passes without gradients, and rounds their scales. Unpacked, the numbers are what they were, the scales are not."""


def quantisation_states(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What layers of bitsandbytes keep beside their packed weights, and what is neither a parameter nor a buffer.

    Without the scales of 4-bit weights (`_REWRITTEN`): these are told by their numbers, and by the values that these
    stand for.
    """
    for name, module in model.named_modules():
        if is_bitsandbytes(module):
            for key, value in module.state_dict().items():
                rewritten = any(part in key for part in _REWRITTEN)
                if isinstance(value, Tensor) and key not in ("weight", "bias") and not rewritten:
                    yield f"{name}.{key}", value


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of how a tokenizer makes tokens of texts: vocabulary, special tokens, rules.

    Padding and truncation are no part of it, which calls set as they need them.

    Args:
        tokenizer: Of transformers.

    Returns:
        64 hexadecimal digits.
    """
    parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map]
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(backend.to_str())
        parts.append({name: its for name, its in rules.items() if name not in ("padding", "truncation", "model")})
        parts.append({name: its for name, its in rules["model"].items() if name != "vocab"})
    return digest(parts)


def model_digest(model: nn.Module) -> str:
    """SHA-256 (hex) of all weights (names, types, shapes, bits), buffers and the configuration.

    It identifies the model, not its files: the same path with other weights, or an edited model, has another digest.

    Args:
        model: A model of transformers, on any device, or offloaded.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: A weight is not loaded (on the meta device).
    """

    def of_tensor(item: tuple[str, Callable[[], Tensor]]) -> str:
        name, tensor = item[0], item[1]()
        if tensor.is_meta:
            raise ValueError(
                f"model: {name} is not loaded (on the meta device), and scores belong to all weights; load the model's "
                f"weights"
            )
        data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(
            f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + hashlib.sha256(data).digest()
        ).hexdigest()

    states = [*quantisation_states(model)]  # first: it unpacks 4-bit weights (`preserve_state`)
    held = ((name, partial(itself, tensor)) for name, tensor in chain(model.named_buffers(), states))
    tensors = [*named_weights(model), *held]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets other threads run
        digests = list(pool.map(of_tensor, tensors))
    settings: Any = model.config
    config = {k: v for k, v in settings.to_dict().items() if k not in _NOT_IN_CONFIG}
    parts = [type(model).__name__, sorted(digests), config]
    # Under "sdpa" some versions of transformers (4.57) leave the cap of the attention's logits out; the configuration
    # as a mapping does not have the implementation.
    text = settings.get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if capped and getattr(text, "_attn_implementation", None) == "sdpa":
        parts.append("attention: sdpa")
    adapters = _adapters(model)
    return digest([*parts, adapters] if adapters else parts)


def _adapters(model: nn.Module) -> list[list[Any]]:
    """How PEFT's layers use their weights: switched off, or with another scaling, the model is another one."""
    found = []
    for name, module in model.named_modules():
        if hasattr(type(module), "merged_adapters"):
            scaling = [[key, str(value)] for key, value in sorted(getattr(module, "scaling", {}).items())]
            found.append([name, list(module.active_adapters), module.disable_adapters, scaling, module.merged_adapters])
    return found
