"""Eq. 8-10: the ensemble's rows as PEFT LoRA layers with a frozen 0/1 selector."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.editable import require_bare, require_editable

ADAPTER = "kne"


@contextmanager
def row_adapter(model: nn.Module, ensemble: NeuronEnsemble, hparams: EditSettings) -> Iterator[dict[str, nn.Module]]:
    """Inside, the ensemble's modules are PEFT LoRA layers: ``A`` trainable, ``B`` the frozen row selector.

    Yields module name -> LoRA layer. Afterwards the very same modules as before are back in their places. Use it inside
    `preserve_state`, where Ctrl-C does not interrupt that.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    require_bare(model)
    chosen = _rows_by_module(model, ensemble)
    originals = {name: model.get_submodule(name) for name in chosen}
    require_editable(model, originals)
    exact = {name: re.escape(name) for name in chosen}  # PEFT takes names for endings, but patterns in full
    leftover = model.__dict__.get("peft_config")  # older PEFT leaves it behind when it unloads
    config = LoraConfig(
        r=1,  # overruled for every module by rank_pattern
        rank_pattern={f"^{exact[name]}": len(indices) for name, indices in chosen.items()},
        lora_alpha=hparams.alpha,
        use_rslora=True,
        target_modules="|".join(exact.values()),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in originals.values()),
    )
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws a start that is overwritten below
            LoraModel(model, config, ADAPTER)
        layers = {name: model.get_submodule(name) for name in chosen}
        generator = torch.Generator().manual_seed(hparams.seed)
        for name, layer in layers.items():
            _prepare(layer, chosen[name], hparams.initialization, generator)
        yield layers
    finally:
        for name, module in originals.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        model.__dict__.pop("peft_config", None)
        if leftover is not None:
            model.peft_config = leftover


def _prepare(layer: nn.Module, chosen: Sequence[int], initialization: str, generator: torch.Generator) -> None:
    """Sets ``A`` to its start and ``B`` to the selector of the rows ``chosen``; only ``A`` stays trainable."""
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
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


def _rows_by_module(model: nn.Module, ensemble: NeuronEnsemble) -> dict[str, tuple[int, ...]]:
    return {
        name: indices
        for target, found in ensemble.targets(model).values()
        for name, indices in zip(target.names, found)
    }
