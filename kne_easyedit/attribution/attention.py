"""Attention of independent rows over a frozen prefix, in place of a model's own.

It is put in through transformers' ``AttentionInterface``, or the ``_attn`` method of the older, eager-only models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION_NAME = "kne_shared_prefix"


@dataclass
class Prefix:
    """The clean keys and values that the rows of one layer attend to."""

    keys: Tensor
    """``(facts, kv_heads, prefix, head_dim)`` of the clean pass."""
    values: Tensor
    positions: Tensor
    """``(facts, rows)``: the position of each row; it attends to the keys before it."""
    softcapped: bool = True
    """Whether the model's own attention applies a softcap (torch's fused one does not)."""
    used: bool = False


PREFIX: ContextVar[Prefix] = ContextVar("kne_prefix")
"""The prefix of the layer in flight."""


def attend(
    prefix: Prefix,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of independent rows over a shared prefix and over themselves.

    The prefix is never expanded: its part is one product a head.

    Args:
        prefix: Keys and values of the clean pass.
        query: ``(facts, heads, rows, head_dim)``.
        key: ``(facts, kv_heads, rows, head_dim)``.
        value: ``(facts, kv_heads, rows, head_dim)``.
        scaling: Factor of the scores.
        window: Length of a sliding window.
        softcap: Bound of the scores.
        sinks: ``(heads,)``: further scores in the softmax, without values.

    Returns:
        ``(facts, heads, rows, head_dim)``.
    """
    facts, heads, n_rows, width = query.shape
    kv_heads, length = prefix.keys.shape[1:3]
    grouped = query.reshape(facts, kv_heads, -1, width)  # heads of one group share keys: (.., group * rows, width)
    scores = (grouped @ prefix.keys.to(query.dtype).transpose(-1, -2)).view(facts, kv_heads, -1, n_rows, length)
    own = (grouped.view(facts, kv_heads, -1, n_rows, width) * key.unsqueeze(2)).sum(-1, keepdim=True)
    scores = torch.cat([scores, own], -1) * scaling  # (facts, kv_heads, group, rows, prefix + 1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(length, device=query.device)
    positions = prefix.positions.to(query.device).unsqueeze(-1)  # a layer's inputs may come from another device
    hidden = at >= positions  # (facts, rows, prefix): the clean row itself and later ones
    if window is not None:
        hidden |= at <= positions - window
    mask = torch.zeros(hidden.shape, dtype=scores.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    scores = scores + nn.functional.pad(mask, (0, 1))[:, None, None]
    if sinks is not None:
        scores = torch.cat([sinks.to(scores).view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1), scores], -1)
    # Softmax in float32 at least, as the models' own eager attention does for half precision.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    shared = weights[..., -1 - length : -1].reshape(facts, kv_heads, -1, length) @ prefix.values.to(value.dtype)
    out = shared.view(facts, kv_heads, -1, n_rows, value.shape[-1]) + weights[..., -1:] * value.unsqueeze(2)
    return out.reshape(facts, heads, n_rows, value.shape[-1])


def attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attend` under the signature of transformers' AttentionInterface."""
    prefix = PREFIX.get()
    prefix.used = True
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.get("softcap") if prefix.softcapped else None
    out = attend(prefix, query, key, value, scaling, kwargs.get("sliding_window"), softcap, kwargs.get("s_aux"))
    return out.transpose(1, 2).contiguous(), None


def _eager_attn(attention: Any) -> Callable[..., tuple[Tensor, None]]:
    """`attend` under the signature of the ``_attn`` method of GPT-J and related models."""

    def _attn(
        query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        prefix = PREFIX.get()
        prefix.used = True
        return attend(prefix, query, key, value, 1.0 / float(attention.scale_attn)), None

    return _attn


@contextmanager
def prefix_attention(layer: nn.Module) -> Iterator[None]:
    """Inside, the attention of ``layer`` is `attend` over the `PREFIX` that is set."""
    modules: list[Any] = list(layer.modules())
    configs = list({id(m.config): m.config for m in modules if hasattr(m, "config")}.values())
    eager = [m for m in modules if callable(getattr(type(m), "_attn", None)) and hasattr(m, "scale_attn")]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = ATTENTION_NAME
        for module in eager:
            module._attn = _eager_attn(module)
        yield
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name
        for module in eager:
            module.__dict__.pop("_attn", None)
