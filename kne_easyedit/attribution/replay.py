"""Replays single decoder layers at chosen positions against a frozen prefix.

Attention is causal: if only the hidden state *at* a position changes, no earlier position does. So after one clean pass
that keeps every layer's keys and values, any number of variants ("rows") of a position can be run through a layer as
queries that see the clean prefix and themselves, and nothing else. The layers are the model's own modules, called with
the arguments of the clean pass; only their attention is replaced, through transformers' ``AttentionInterface`` (or the
``_attn`` method of the older, eager-only models).

This is checked, not assumed: `preparation.prepare` first runs the clean hidden states through every layer and through
the output head, and compares them with what the model computed itself (`Replay.require_equal`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.attribution.attention import (
    ATTENTION_NAME,
    PREFIX,
    Prefix,
    attention_interface,
    prefix_attention,
)
from kne_easyedit.facts.encoding import Batch
from kne_easyedit.models.devices import device_of, input_embeddings
from kne_easyedit.models.fixed_layers import fixed_outputs
from kne_easyedit.models.layer_kinds import is_bitsandbytes

TYPICAL = 0.06
"""Root mean square, over dimensions, of the relative difference that the self-check lets pass in half precision.

In bfloat16 (one rounding is 0.008) it is 0.007 at most on SmolLM2, and 0.04 on tiny random models of twenty families;
where SmolLM2's attention scores are doubled it is 0.13 in half of the layers, and 0.34 at most.
"""


class UnsupportedModel(NotImplementedError):
    """The layers of this model cannot be replayed; the message says why."""


class ReplayMismatch(UnsupportedModel):
    """The layers can be replayed, but give other results than the model itself: the self-check failed."""


@dataclass
class Clean:
    """The states of the clean pass at the predicting positions; ``s`` is the length of the longest answer."""

    positions: Tensor
    """``(facts, s)``; a shorter answer repeats its last position."""
    inputs: list[Tensor]
    """Hidden states that enter each layer, ``(facts, s, hidden)``; the last entry: those that leave the last layer."""
    neurons: dict[str, Tensor]
    """Module name -> its output ``w``, ``(facts, s, d2)``."""
    logits: Tensor
    """``(facts, s, vocabulary)``."""


class Replay:
    """Runs rows through single decoder layers of ``model``. Use as a context manager, in evaluation mode."""

    def __init__(self, model: nn.Module, layers_path: str):
        self.model: Any = model
        self.layers = cast(nn.ModuleList, model.get_submodule(layers_path))
        self._arguments: list[dict] = []
        self._cache: Any = None
        self._values: list[int] = []
        # Fixed layers give no router logits, of which some mixtures of experts would compute a loss.
        has = "output_router_logits" in inspect.signature(self.model.forward).parameters
        self._without_routers = {"output_router_logits": False} if has else {}

    def __enter__(self) -> Replay:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION_NAME, attention_interface)
        return self

    def __exit__(self, *_: object) -> None:
        self._arguments, self._cache = [], None

    @torch.no_grad()
    def clean_pass(self, batch: Batch, positions: Tensor, modules: Mapping[str, nn.Module]) -> Clean:
        """One ordinary forward pass, which keeps what the replay needs.

        Args:
            batch: The facts, padded on the right.
            positions: The predicting positions, ``(facts, s)``.
            modules: Module name -> module whose output is kept.

        Returns:
            The states at the positions.

        Raises:
            UnsupportedModel: The model keeps no keys and values, or a module has no output at every position.
        """
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
                hooks.callback(module.register_forward_hook(capture_neurons(outputs, name)).remove)
            self._cache = DynamicCache()
            out = self.model(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                past_key_values=self._cache,
                use_cache=True,
            )
        if len(self._cache.layers) < len(self.layers):
            raise UnsupportedModel(
                f"{type(self.model).__name__}: layer {len(self._cache.layers)} keeps no keys and values; its prefix "
                f"cannot be shared"
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
        """Rows ``(facts, rows, hidden)`` at ``positions`` ``(facts, rows)`` through decoder layer ``index``."""
        safe_point()
        cached = self._cache.layers[index]
        prefix = Prefix(
            cached.keys, cached.values, positions.to(hidden.device), self.model.config._attn_implementation != "sdpa"
        )
        token = PREFIX.set(prefix)
        try:
            with prefix_attention(self.layers[index]):
                out = self.layers[index](hidden, **self._at(index, prefix.positions))
        finally:
            PREFIX.reset(token)
        if not prefix.used:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: the attention of layer {index} ({type(self.layers[index]).__name__}) "
                f"uses neither transformers' AttentionInterface nor an _attn method, so its prefix cannot be shared"
            )
        return _first(out)

    def head(self, hidden: Tensor) -> Tensor:
        """All that comes after the layers: ``(rows, hidden)`` -> logits ``(rows, vocabulary)``.

        The model itself runs, with layers that only return ``hidden``: so the norm, the output head, and what a model
        does to its logits are its own.
        """
        embeddings, device = input_embeddings(self.model), device_of(self.model)
        rows = hidden[:, None]
        outputs = [(rows, *[None] * (values - 1)) if values else rows for values in self._values]
        with fixed_outputs(list(self.layers), outputs):
            return self.model(
                inputs_embeds=embeddings.new_zeros(len(hidden), 1, embeddings.shape[1], device=device),
                use_cache=False,
                **self._without_routers,
            ).logits.flatten(0, 1)

    def require_equal(self, replayed: Tensor, own: Tensor, where: str) -> None:
        """The self-check: raises ReplayMismatch unless a replayed clean state equals the model's ``own``.

        Raises FloatingPointError if ``own`` is not finite. ``where`` is for the message.
        """
        own = own.to(replayed.device)
        # Some models compute attention in float32 whatever their dtype; half precision rounds in another order.
        # Products of bitsandbytes take other kernels with gradients than without, and some are in half precision.
        coarsest = torch.float16 if any(map(is_bitsandbytes, self.model.modules())) else torch.float32
        epsilon = max(torch.finfo(own.dtype).eps, torch.finfo(coarsest).eps)
        scale = own.abs().max().float()
        model = type(self.model).__name__
        if not scale.isfinite():
            raise FloatingPointError(
                f"{model}: {where} gives values that are not finite; load the model in float32 or bfloat16"
            )
        difference = (replayed - own).abs().max().float()
        # 200 roundings of bfloat16 would let anything pass.
        alike = difference <= min(200 * epsilon, 0.05) * scale
        if not (alike and _typical_difference(replayed, own) <= min(2000 * epsilon, TYPICAL)):
            raise ReplayMismatch(
                f"{model}: replaying {where} gives another result than the model itself (difference {difference:.2e}, "
                f"largest value {scale:.2e}); scores would be wrong, so none are computed. attribution_engine: whole "
                f"runs the whole model instead, which is slow"
            )

    def _at(self, index: int, positions: Tensor) -> dict:
        """The layer's arguments of the clean pass, for rows at ``positions``."""
        return {name: _for_rows(name, value, positions, self.model) for name, value in self._arguments[index].items()}


@contextmanager
def replaced_output(name: str, module: nn.Module, rows: Tensor, start: int, total: int) -> Iterator[None]:
    """Inside, ``rows`` ``(facts, n, d2)`` replace the module's output for rows ``start..start+n`` of ``total``.

    Those outputs are not computed. The module may be called with facts and rows folded into one dimension.
    """
    facts, stop = len(rows), start + rows.shape[1]
    shape: tuple[int, ...] = ()

    def without(_: nn.Module, args: tuple) -> tuple:
        nonlocal shape
        shape = args[0].shape[:-1]
        x = unfolded(name, args[0], facts, total)
        return (torch.cat([x[:, :start], x[:, stop:]], 1) if stop < total else x[:, :start].contiguous()), *args[1:]

    def together(_: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return torch.cat([out[:, :start], rows.to(out.device), out[:, start:]], 1).reshape(*shape, out.shape[-1])

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(without).remove)
        hooks.callback(module.register_forward_hook(together).remove)
        yield


def unfolded(name: str, values: object, batch: int, length: int) -> Tensor:
    """Input or output of a linear module as ``(batch, length, d)``: some layers fold the first two dimensions.

    Raises:
        UnsupportedModel: It is not one vector for every position.
    """
    sound = ([n for n in (batch, length) if n > 1], [n for n in (batch * length,) if n > 1])
    if not isinstance(values, Tensor) or [n for n in values.shape[:-1] if n > 1] not in sound:
        raise not_everywhere(name)
    return values.reshape(batch, length, values.shape[-1])


def not_everywhere(name: str) -> UnsupportedModel:
    """The error for a module whose outputs are not those of all positions, in their order."""
    return UnsupportedModel(
        f"target_modules: {name} does not give one vector for every position (an expert or its router?); its output at "
        f"the predicting position is not defined, choose another module"
    )


def never_called(name: str) -> UnsupportedModel:
    """The error for a module that the forward pass does not call."""
    return UnsupportedModel(
        f"target_modules: {name} is not called in this model's forward pass; it has no output to attribute"
    )


def gather(values: Tensor, positions: Tensor) -> Tensor:
    """``values`` ``(facts, length, d)`` at ``positions`` ``(facts, n)``: ``(facts, n, d)``."""
    positions = positions.to(values.device)
    return values.gather(1, positions.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _capture_arguments(into: dict[int, dict], index: int) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in inspect.signature(layer.forward).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        arguments["hidden"] = arguments.pop(next(iter(bound.arguments)))
        into[index] = arguments

    return hook


def capture_output(into: dict[Any, Any], key: int | str) -> Callable[..., None]:
    """A forward hook that stores the module's output in ``into[key]``."""

    def hook(module: nn.Module, args: tuple, out: object) -> None:
        into[key] = out

    return hook


def capture_neurons(into: dict[Any, Any], name: str) -> Callable[..., object]:
    """As `capture_output`, but the model goes on with a copy: some models (OLMo) clamp projections in place."""

    def hook(module: nn.Module, args: tuple, out: object) -> object:
        into[name] = out
        return out.clone() if isinstance(out, Tensor) else out

    return hook


def _typical_difference(found: Tensor, own: Tensor) -> float:
    """The root mean square, over dimensions, of the largest difference in each, relative to the largest value there.

    A few dimensions of hidden states are hundreds of times as large as the others, and would hide an error in these.
    """
    found, own = (values.flatten(0, -2).float() for values in (found, own))
    scale = own.abs().amax(0)
    scale = scale.clamp(min=scale.median().clamp(min=torch.finfo(scale.dtype).tiny))
    return ((found - own).abs().amax(0) / scale).square().mean().sqrt().item()


def _first(out: Tensor | tuple) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _for_rows(name: str, value: Any, positions: Tensor, model: nn.Module) -> Any:
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
