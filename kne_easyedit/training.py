"""Eq. 8-11: train the ensemble's rows, jointly over all layers, until the model gives the new answers.

``W[M, :] + (alpha / sqrt(n)) * W_kne`` is a rank-stabilised LoRA: ``(alpha / sqrt(r)) * B A`` with ``r = n``,
``A = W_kne`` and ``B`` the fixed 0/1 matrix that selects the rows ``M``. So PEFT's own LoRA layers do it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kne_easyedit.batching import IGNORE, Batch, Fact, collate
from kne_easyedit.divergence import Divergence
from kne_easyedit.editable import demand_bare, demand_editable
from kne_easyedit.ensemble import NeuronEnsemble
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.layout import device_of, rows
from kne_easyedit.state import undisturbed

ADAPTER = "kne"


@dataclass(frozen=True)
class RowEdit:
    """A trained edit, not yet written: what is added to which rows."""

    deltas: Mapping[str, tuple[tuple[int, ...], Tensor]]
    """Module name -> its rows and what to add to them, ``(n, d1)``, scaling ``alpha / sqrt(n)`` included."""
    losses: tuple[float, ...]
    """Batch loss before every step; the last one is the loss of ``deltas``."""

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return len(self.losses) - 1


def train_rows(
    model: nn.Module, facts: Sequence[Fact], ensemble: NeuronEnsemble, hparams: KNEHyperParams, divergence: Divergence | None = None
) -> RowEdit:
    """Trains ``W_kne`` (Eq. 8-11) on ``facts`` in one batch; the model is left exactly as it was.

    Stops as soon as the loss is below ``hparams.stop_loss``, after ``hparams.num_steps`` steps at the latest. A
    ``divergence`` is added to what is minimised, times ``hparams.kl_weight``; stopping goes by the answers' loss alone.
    Raises FloatingPointError for a loss that is not finite, ValueError for an ensemble of another model.
    """
    batch = collate(facts).to(device_of(model))
    chosen = _rows_by_module(model, ensemble)
    with undisturbed(model), row_adapter(model, ensemble, hparams) as trained:
        parameters = [layer.lora_A[ADAPTER].weight for layer in trained.values()]
        optimizer = torch.optim.AdamW(parameters, lr=hparams.lr, weight_decay=hparams.weight_decay)
        losses: list[float] = []
        with torch.enable_grad():
            while True:
                loss = answer_loss(model, batch)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"training: the loss is {losses[-1]} at step {len(losses) - 1}; lower lr (it is {hparams.lr}), "
                        f"or load the model in float32 or bfloat16"
                    )
                if losses[-1] < hparams.stop_loss or len(losses) > hparams.num_steps:
                    break
                if divergence is not None:
                    loss = loss + hparams.kl_weight * divergence.now(model)
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                    parameter.grad = gradient
                optimizer.step()
        deltas = {name: (chosen[name], (layer.lora_A[ADAPTER].weight * layer.scaling[ADAPTER]).detach()) for name, layer in trained.items()}
    return RowEdit(deltas, tuple(losses))


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the answers' tokens of all facts, in float32 at least.

    Positions count from the first token that is not padding, so that the padding side makes no difference.
    """
    position_ids = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=position_ids, use_cache=False)
    labels = batch.labels[:, 1:].to(out.logits.device)
    answers = labels != IGNORE
    logits = out.logits[:, :-1][answers]  # the answers' rows only: padding never meets the loss
    return nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[answers])


@torch.no_grad()
def write_rows(model: nn.Module, edit: RowEdit) -> dict[str, Tensor]:
    """Adds a trained edit to the weights, in place. Returns the original matrices by parameter name.

    An exception on the way (Ctrl-C too) puts the originals back bit by bit.
    """
    modules = {name: model.get_submodule(name) for name in edit.deltas}
    originals = {f"{name}.weight": module.weight.detach().clone() for name, module in modules.items()}
    try:
        for name, (chosen, delta) in edit.deltas.items():
            weight = rows(modules[name])
            index = torch.tensor(chosen, device=weight.device)
            # Added in the delta's precision, then rounded once: in bf16 a small delta would drown term by term.
            weight[index] = (weight[index].to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
    except BaseException:
        restore(model, originals)
        raise
    return originals


@torch.no_grad()
def restore(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Writes original weights back, bit by bit."""
    for name, value in originals.items():
        model.get_parameter(name).copy_(value)


@contextmanager
def row_adapter(model: nn.Module, ensemble: NeuronEnsemble, hparams: KNEHyperParams) -> Iterator[dict[str, nn.Module]]:
    """Inside, the ensemble's modules are PEFT LoRA layers: ``A`` trainable, ``B`` the frozen row selector.

    Yields module name -> LoRA layer. Afterwards the very same modules as before are back in their places.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    demand_bare(model)
    chosen = _rows_by_module(model, ensemble)
    originals = {name: model.get_submodule(name) for name in chosen}
    demand_editable(model, originals)
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
    return {name: indices for target, found in ensemble.targets(model).values() for name, indices in zip(target.names, found)}
