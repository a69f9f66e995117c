"""Replay single decoder layers at chosen positions against a frozen prefix.

Attention is causal: if only the hidden state *at* a position changes, no earlier position does. So after one
clean pass that keeps every layer's keys and values, any number of variants ("rows") of a position can be run
through a layer as queries that see the clean prefix and themselves, and nothing else. The layers are the
model's own modules, called with the arguments they got in the clean pass; only their attention is exchanged,
through transformers' ``AttentionInterface`` (or the ``_attn`` method of the older, eager-only models).

Nothing is trusted: `sweep.Sweep` first runs the clean hidden states through every layer and through the output
head and compares with what the model computed itself (`Replay.require_equal`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.facts.encoding import Batch
from kne_easyedit.models.devices import device_of

ATTENTION_NAME = "kne_shared_prefix"


@dataclass
class Prefix:
    """What the rows of one layer attend to, beside themselves."""

    keys: Tensor
    """``(facts, kv_heads, prefix, head_dim)`` of the clean pass."""
    values: Tensor
    positions: Tensor
    """``(facts, rows)``: the position of each row; it sees the keys before it."""
    softcapped: bool = True
    """Whether the model's own attention heeds a softcap (torch's fused one does not)."""
    used: bool = False


_PREFIX: ContextVar[Prefix] = ContextVar("kne_prefix")


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

    query ``(facts, heads, rows, head_dim)``, key and value ``(facts, kv_heads, rows, head_dim)``, ``sinks``
    ``(heads,)``: scores that take their share and give nothing; returns ``(facts, heads, rows, head_dim)``. The
    prefix is never expanded: its share is one product a head.
    """
    facts, heads, n_rows, width = query.shape
    kv_heads, length = prefix.keys.shape[1:3]
    grouped = query.reshape(
        facts, kv_heads, -1, width
    )  # heads of one group share keys: (facts, kv_heads, group*rows, width)
    scores = (grouped @ prefix.keys.to(query.dtype).transpose(-1, -2)).view(facts, kv_heads, -1, n_rows, length)
    own = (grouped.view(facts, kv_heads, -1, n_rows, width) * key.unsqueeze(2)).sum(-1, keepdim=True)
    scores = torch.cat([scores, own], -1) * scaling  # (facts, kv_heads, group, rows, prefix + 1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(length, device=query.device)
    hidden = at >= prefix.positions.unsqueeze(-1)  # (facts, rows, prefix): the clean self and the future
    if window is not None:
        hidden |= at <= prefix.positions.unsqueeze(-1) - window
    mask = torch.zeros(hidden.shape, dtype=scores.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    scores = scores + nn.functional.pad(mask, (0, 1))[:, None, None]
    if sinks is not None:
        scores = torch.cat([sinks.to(scores).view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1), scores], -1)
    # Softmax in float32 at least, as the models' own eager attention does for half precision.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    shared = weights[..., -1 - length : -1].reshape(facts, kv_heads, -1, length) @ prefix.values.to(value.dtype)
    out = shared.view(facts, kv_heads, -1, n_rows, value.shape[-1]) + weights[..., -1:] * value.unsqueeze(2)
    return out.reshape(facts, heads, n_rows, value.shape[-1])


def _attention_interface(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    """`attend` under the signature of transformers' AttentionInterface."""
    prefix = _PREFIX.get()
    prefix.used = True
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.get("softcap") if prefix.softcapped else None
    out = attend(prefix, query, key, value, scaling, kwargs.get("sliding_window"), softcap, kwargs.get("s_aux"))
    return out.transpose(1, 2).contiguous(), None


def _eager_attn(attention: nn.Module):
    """`attend` under the signature of GPT-J's and its kin's ``_attn`` method."""

    def _attn(query, key, value, attention_mask=None, *args, **kwargs):
        prefix = _PREFIX.get()
        prefix.used = True
        return attend(prefix, query, key, value, 1.0 / float(attention.scale_attn)), None

    return _attn


class UnsupportedModel(NotImplementedError):
    """The layers of this model cannot be replayed; the message says why."""


class ReplayMismatch(UnsupportedModel):
    """They can, but give something else than the model itself: the self-check's verdict."""


@dataclass
class Clean:
    """What the clean pass leaves behind. ``facts`` is the batch, ``s`` the longest answer."""

    positions: Tensor
    """``(facts, s)`` predicting positions; a shorter answer repeats its last."""
    inputs: list[Tensor]
    """Hidden state that enters each layer at the positions: ``(facts, s, hidden)``; last entry: that leaves the last."""
    neurons: dict[str, Tensor]
    """Module name -> its output ``w`` at the positions, ``(facts, s, d2)``."""
    logits: Tensor
    """``(facts, s, vocabulary)``."""


class Replay:
    """Runs rows through single decoder layers of ``model``. Use as a context manager, in evaluation mode."""

    def __init__(self, model: nn.Module, layers_path: str):
        self.model = model
        self.layers: Sequence[nn.Module] = model.get_submodule(layers_path)
        self._arguments: list[dict] = []
        self._cache = None
        self._values: list[int] = []

    def __enter__(self) -> Replay:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION_NAME, _attention_interface)
        return self

    def __exit__(self, *exc) -> None:
        self._arguments, self._cache = [], None

    @torch.no_grad()
    def clean_pass(self, batch: Batch, positions: Tensor, modules: Mapping[str, nn.Module]) -> Clean:
        """One ordinary forward pass of a right-padded batch, keeping what the replay needs, and what ``modules`` give."""
        from transformers import DynamicCache

        if "past_key_values" not in inspect.signature(self.model.forward).parameters:
            raise UnsupportedModel(f"{type(self.model).__name__} keeps no keys and values of earlier positions")
        device = device_of(self.model)
        positions = positions.to(device)
        captured: dict[int, dict] = {}
        outputs: dict[int | str, Tensor | tuple] = {}
        with ExitStack() as hooks:
            for i, layer in enumerate(self.layers):
                hooks.callback(
                    layer.register_forward_pre_hook(_capture_arguments(captured, i), with_kwargs=True).remove
                )
                hooks.callback(layer.register_forward_hook(capture_output(outputs, i)).remove)
            for name, module in modules.items():
                hooks.callback(module.register_forward_hook(capture_output(outputs, name)).remove)
            self._cache = DynamicCache()
            out = self.model(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                past_key_values=self._cache,
                use_cache=True,
            )
        if len(self._cache.layers) < len(self.layers):
            raise UnsupportedModel(
                f"{type(self.model).__name__}: layer {len(self._cache.layers)} keeps no keys and values; its prefix cannot be shared"
            )
        self._arguments = [captured[i] for i in range(len(self.layers))]
        self._values = [len(outputs[i]) if isinstance(outputs[i], tuple) else 0 for i in range(len(self.layers))]
        hidden = [arguments.pop("hidden") for arguments in self._arguments] + [_first(outputs[len(self.layers) - 1])]
        for name in modules:
            if name not in outputs:
                raise never_called(name)
        facts, length = batch.input_ids.shape
        return Clean(
            positions,
            [gather(h, positions) for h in hidden],
            {name: gather(unfolded(name, outputs[name], facts, length), positions) for name in modules},
            gather(out.logits, positions),
        )

    def layer(self, index: int, hidden: Tensor, positions: Tensor) -> Tensor:
        """Rows ``hidden`` ``(facts, rows, d)`` at ``positions`` ``(facts, rows)`` through decoder layer ``index``."""
        safe_point()
        cached = self._cache.layers[index]
        prefix = Prefix(
            cached.keys, cached.values, positions.to(hidden.device), self.model.config._attn_implementation != "sdpa"
        )
        token = _PREFIX.set(prefix)
        try:
            with _own_attention(self.layers[index]):
                out = self.layers[index](hidden, **self._at(index, prefix.positions))
        finally:
            _PREFIX.reset(token)
        if not prefix.used:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: the attention of layer {index} ({type(self.layers[index]).__name__}) uses "
                f"neither transformers' AttentionInterface nor an _attn method, so its prefix cannot be shared"
            )
        return _first(out)

    def head(self, hidden: Tensor) -> Tensor:
        """All that comes after the layers: ``(rows, d)`` -> logits ``(rows, vocabulary)``.

        The model itself runs, its layers only hand on ``hidden``: norm, output head, and whatever a model does
        to its logits then are its own.
        """
        embeddings = self.model.get_input_embeddings().weight
        before = [layer.__dict__.get("forward") for layer in self.layers]
        try:
            for layer, values in zip(self.layers, self._values):
                layer.forward = _constant((hidden[:, None], *[None] * (values - 1)) if values else hidden[:, None])
            return self.model(
                inputs_embeds=embeddings.new_zeros(len(hidden), 1, embeddings.shape[1]), use_cache=False
            ).logits.flatten(0, 1)
        finally:
            for layer, own in zip(self.layers, before):
                if own is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = own

    def require_equal(self, replayed: Tensor, own: Tensor, where: str) -> None:
        """The self-check: raises ReplayMismatch unless a replayed clean state equals the model's ``own``."""
        own = own.to(replayed.device)
        # Some models compute attention in float32 whatever their dtype; half precision rounds in another order.
        epsilon = max(torch.finfo(own.dtype).eps, torch.finfo(torch.float32).eps)
        scale = own.abs().max().float()
        model = type(self.model).__name__
        if not scale.isfinite():
            raise FloatingPointError(
                f"{model}: {where} gives values that are not finite; load the model in float32 or bfloat16"
            )
        difference = (replayed - own).abs().max().float()
        if not difference <= min(200 * epsilon, 0.05) * scale:  # 200 roundings of bfloat16 would let anything pass
            raise ReplayMismatch(
                f"{model}: replaying {where} gives another result than the model itself (difference {difference:.2e}, largest "
                f"value {scale:.2e}); scores would be wrong, so none are computed. attribution_engine: whole runs the whole "
                f"model instead, which is slow"
            )

    def _at(self, index: int, positions: Tensor) -> dict:
        """The layer's arguments of the clean pass, as they are for rows at ``positions``."""
        return {name: _for_rows(name, value, positions, self.model) for name, value in self._arguments[index].items()}


@contextmanager
def replaced_output(name: str, module: nn.Module, rows: Tensor, start: int, total: int) -> Iterator[None]:
    """Inside, ``rows`` ``(facts, n, d2)`` take the place of what ``module`` gives for rows ``start..start+n`` of ``total``.

    These rows are not even computed. The module may be called with facts and rows folded into one dimension.
    """
    facts, stop = len(rows), start + rows.shape[1]
    shape = ()

    def without(_, args):
        nonlocal shape
        shape = args[0].shape[:-1]
        x = unfolded(name, args[0], facts, total)
        return (torch.cat([x[:, :start], x[:, stop:]], 1) if stop < total else x[:, :start].contiguous()), *args[1:]

    def together(_, args, out):
        return torch.cat([out[:, :start], rows.to(out.device), out[:, start:]], 1).reshape(*shape, out.shape[-1])

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(without).remove)
        hooks.callback(module.register_forward_hook(together).remove)
        yield


def unfolded(name: str, values, batch: int, length: int) -> Tensor:
    """What a linear module takes or gives, as ``(batch, length, d)``: some layers fold the first two into one dimension.

    Raises UnsupportedModel if it is not one vector for every position.
    """
    leading = [n for n in values.shape[:-1] if n > 1] if isinstance(values, Tensor) else None
    if leading not in ([n for n in (batch, length) if n > 1], [n for n in (batch * length,) if n > 1]):
        raise UnsupportedModel(
            f"target_modules: {name} does not give one vector for every position (an expert or its router?); its output at the "
            f"predicting position is not defined, choose another module"
        )
    return values.reshape(batch, length, values.shape[-1])


def never_called(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"target_modules: {name} is not called in this model's forward pass; it has no output to attribute"
    )


def gather(values: Tensor, positions: Tensor) -> Tensor:
    """``values`` ``(facts, length, d)`` at ``positions`` ``(facts, n)``: ``(facts, n, d)``."""
    positions = positions.to(values.device)
    return values.gather(1, positions.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


@contextmanager
def _own_attention(layer: nn.Module) -> Iterator[None]:
    """Inside, the attention of ``layer`` is `attend`; afterwards it is what it was before."""
    modules = list(layer.modules())
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


def _capture_arguments(into: dict, index: int):
    def hook(layer, args, kwargs):
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in inspect.signature(layer.forward).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        arguments["hidden"] = arguments.pop(next(iter(bound.arguments)))
        into[index] = arguments

    return hook


def capture_output(into: dict, key):
    """A forward hook that puts what the module gives into ``into[key]``."""

    def hook(module, args, out):
        into[key] = out

    return hook


def _first(out: Tensor | tuple) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _constant(value):
    return lambda *args, **kwargs: value


def _for_rows(name: str, value, positions: Tensor, model: nn.Module):
    """One layer argument of the clean pass, gathered at the rows' positions (or dropped: caches and masks)."""
    if name in ("past_key_values", "past_key_value", "layer_past", "attention_mask", "causal_mask", "cache_position"):
        return None
    if name == "use_cache" or value is None or isinstance(value, (bool, int, float, str)):
        return False if name == "use_cache" else value
    if name.startswith("position_"):
        facts = positions.shape[0]
        if isinstance(value, tuple):  # rotary cos and sin, each (1 or facts, length, width)
            return tuple(gather(part.expand(facts, -1, -1), positions) for part in value)
        if value.ndim == 2:  # position ids
            return value.to(positions.device).expand(facts, -1).gather(1, positions)
    raise UnsupportedModel(
        f"{type(model).__name__}: unknown argument {name!r} ({type(value).__name__}) of the decoder layers"
    )
