"""Eq. 8-10: the ensemble's rows as PEFT LoRA layers with a frozen 0/1 selector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.editable import require_bare, require_editable
from kne_easyedit.models.offload import offloaded

ADAPTER = "kne"


@contextmanager
def row_adapter(model: nn.Module, ensemble: NeuronEnsemble, hparams: EditSettings) -> Iterator[dict[str, Any]]:
    """Inside, the ensemble's modules are PEFT LoRA layers (Eq. 8-10): ``A`` trainable, ``B`` the frozen row selector.

    Afterwards the original modules are back in their places. Use it inside `preserve_state`, which defers Ctrl-C.

    Args:
        model: A causal language model of transformers.
        ensemble: The rows to train.
        hparams: ``alpha``, ``initialization`` and ``seed`` are read.

    Yields:
        Module name -> PEFT's LoRA layer; ``A`` is ``(n, d1)``, ``B`` is ``(d2, n)``, the scale is ``alpha / sqrt(n)``.

    Raises:
        ValueError: The ensemble is of another model, or a module cannot be edited (`require_editable`).
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    require_bare(model)
    chosen = rows_by_module(model, ensemble)
    originals = {name: model.get_submodule(name) for name in chosen}
    require_editable(model, originals, beside=True)
    places = {name: offloaded(model, f"{name}.weight") for name in chosen}
    alpha: Any = hparams.alpha  # PEFT computes with a float as well
    config = LoraConfig(
        r=1,  # overridden for every module by rank_pattern
        rank_pattern={f"^{_child(i)}": len(indices) for i, indices in enumerate(chosen.values())},
        lora_alpha=alpha,
        use_rslora=True,
        target_modules=_child(r"\d+"),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in originals.values()),
    )
    holder = _holder(model, originals.values())
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial weights that are overwritten below
        LoraModel(holder, config, ADAPTER)
    layers: dict[str, Any] = {name: holder.get_submodule(_child(i)) for i, name in enumerate(originals)}
    generator = torch.Generator().manual_seed(hparams.seed)
    for name, layer in layers.items():
        place = places[name]
        device = None if place is None else place.device
        _prepare(layer, chosen[name], hparams.initialization, generator, device)
    try:
        for name, layer in layers.items():
            _put(model, name, layer)
        yield layers
    finally:
        for name, module in originals.items():
            _put(model, name, module)


def _holder(model: nn.Module, modules: Iterable[nn.Module]) -> nn.Module:
    """A module with ``modules`` alone, as children ``module0``, ``module1``, ..., and what PEFT asks of ``model``.

    Of a whole model PEFT looks at the kind, too: of mixtures of experts it exchanges the names that it is given for
    others (in 0.21), so that modules of other layers, and experts, would become LoRA layers.
    """
    holder = nn.Module()
    for i, module in enumerate(modules):
        holder.add_module(_child(i), module)
    for bits in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
        setattr(holder, bits, getattr(model, bits, False))
    return holder


def _child(number: int | str) -> str:
    return f"module{number}"


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _prepare(
    layer: Any, chosen: Sequence[int], initialization: str, generator: torch.Generator, device: torch.device | None
) -> None:
    """Initialises ``A``, and sets ``B`` to the selector of the rows ``chosen``; only ``A`` stays trainable.

    ``device``: where an offloaded module computes; PEFT puts the adapter where it is kept, on the meta device.
    """
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    if device is not None:
        a.to_empty(device=device)
        b.to_empty(device=device)
    precise = torch.promote_types(a.weight.dtype, torch.float32)  # trained in float32 over a half-precision model
    a.to(precise)
    b.to(precise)
    with torch.no_grad():
        a.weight.zero_()
        if initialization == "kaiming":
            start = nn.init.kaiming_uniform_(torch.empty(a.weight.shape), a=math.sqrt(5), generator=generator)
            a.weight.copy_(start)
        b.weight.zero_()
        b.weight[torch.tensor(chosen), torch.arange(len(chosen))] = 1
    a.weight.requires_grad_(True)
    b.weight.requires_grad_(False)


def rows_by_module(model: nn.Module, ensemble: NeuronEnsemble) -> dict[str, tuple[int, ...]]:
    """Module name -> the ensemble's rows of its weight."""
    return {
        name: indices
        for target, found in ensemble.targets(model).values()
        for name, indices in zip(target.names, found)
    }
