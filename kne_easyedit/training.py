"""Eq. 8-11: train the ensemble's rows, jointly over all layers, until the model gives the new answers.

``W[M, :] + (alpha / sqrt(n)) * W_kne`` is a rank-stabilised LoRA: ``(alpha / sqrt(r)) * B A`` with ``r = n``,
``A = W_kne`` and ``B`` the fixed 0/1 matrix that selects the rows ``M``. So PEFT's own LoRA layers do it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kne_easyedit.batching import IGNORE, Batch, Fact, collate
from kne_easyedit.divergence import Divergence
from kne_easyedit.editable import demand_bare, demand_editable
from kne_easyedit.ensemble import NeuronEnsemble
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.interrupts import interrupts_held, safe_point
from kne_easyedit.layout import device_of, rows
from kne_easyedit.products import fast_products
from kne_easyedit.state import demand_trainable, own_modes, undisturbed

ADAPTER = "kne"
PATIENCE = 5.0
"""Seconds after which training shows its progress."""


class EditLost(NotImplementedError):
    """The written model does not have the loss that was trained; it has been put back."""


@dataclass(frozen=True)
class Answer:
    """How well a trained edit gives the answer of one fact."""

    fact: Fact
    loss: float
    """Mean cross-entropy of the answer's tokens, in nats."""
    probability: float
    """Of the whole answer after the prompt."""
    greedy: bool
    """Whether every token of it is the most probable one after those before."""


@dataclass(frozen=True)
class RowEdit:
    """A trained edit, not yet written: what is added to which rows."""

    deltas: Mapping[str, tuple[tuple[int, ...], Tensor]]
    """Module name -> its rows and what to add to them, ``(n, d1)``, scaling ``alpha / sqrt(n)`` included."""
    losses: tuple[float, ...]
    """Batch loss before every step; the last one is the loss of ``deltas``."""
    answers: tuple[Answer, ...] = ()
    """The facts and how well ``deltas`` give their answers; empty for an edit that was not trained."""

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return len(self.losses) - 1

    def failed(self, stop_loss: float) -> tuple[Answer, ...]:
        """The facts that the edit did not reach.

        If training ended above ``stop_loss``: those whose own loss is. If it stopped below, or was never to stop (0): those whose
        answer the model would not give, since another token is more probable somewhere. A mean below can hide such a fact.
        """
        if 0 < stop_loss <= self.losses[-1]:
            return tuple(answer for answer in self.answers if answer.loss >= stop_loss) or self.answers
        return tuple(answer for answer in self.answers if not answer.greedy)


def train_rows(
    model: nn.Module,
    facts: Sequence[Fact],
    ensemble: NeuronEnsemble,
    hparams: KNEHyperParams,
    divergence: Divergence | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> RowEdit:
    """Trains ``W_kne`` (Eq. 8-11) on ``facts`` in one batch; the model is left exactly as it was.

    Stops as soon as the loss is below ``hparams.stop_loss``, after ``hparams.num_steps`` steps at the latest. A
    ``divergence`` is added to what is minimised, times ``hparams.kl_weight``; stopping goes by the answers' loss alone.
    ``on_step`` is told each step's number and the loss before it.
    Raises FloatingPointError for a loss that is not finite, ValueError for an ensemble of another model.
    """
    batch = collate(facts).to(device_of(model))
    chosen = _rows_by_module(model, ensemble)
    with undisturbed(model), row_adapter(model, ensemble, hparams) as trained, fast_products(model), _progress(hparams.num_steps) as progress:
        parameters = [layer.lora_A[ADAPTER].weight for layer in trained.values()]
        optimizer = torch.optim.AdamW(parameters, lr=hparams.lr, weight_decay=hparams.weight_decay)
        losses: list[float] = []
        with torch.enable_grad():
            while True:
                safe_point()
                logits, labels = answer_logits(model, batch)
                loss = _cross_entropy(logits, labels)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"training: the loss is {losses[-1]} at step {len(losses) - 1}; lower lr (it is {hparams.lr}), "
                        f"or load the model in float32 or bfloat16"
                    )
                if losses[-1] < hparams.stop_loss or len(losses) > hparams.num_steps:
                    break
                if on_step is not None:
                    on_step(len(losses), losses[-1])
                if divergence is not None:
                    loss = loss + hparams.kl_weight * divergence.now(model)
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                    parameter.grad = gradient
                optimizer.step()
                progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                progress.update()
        deltas = {name: (chosen[name], (layer.lora_A[ADAPTER].weight * layer.scaling[ADAPTER]).detach()) for name, layer in trained.items()}
        answers = _answers(facts, logits.detach(), labels)
    return RowEdit(deltas, tuple(losses), answers)


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the answers' tokens of all facts, in float32 at least."""
    return _cross_entropy(*answer_logits(model, batch))


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits ``(tokens, vocabulary)`` that predict the answers' tokens, fact by fact, and these tokens ``(tokens,)``.

    Positions count from the first token that is not padding, so that the padding side makes no difference.
    """
    position_ids = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=position_ids, use_cache=False)
    labels = batch.labels[:, 1:].to(out.logits.device)
    answers = labels != IGNORE
    return out.logits[:, :-1][answers], labels[answers]  # the answers' rows only: padding never meets the loss


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction=reduction)


def _answers(facts: Sequence[Fact], logits: Tensor, labels: Tensor) -> tuple[Answer, ...]:
    lengths = [len(fact.answer) for fact in facts]
    losses = _cross_entropy(logits, labels, "none").split(lengths)
    best = (logits.argmax(-1) == labels).split(lengths)
    return tuple(
        Answer(fact, own.mean().item(), math.exp(-own.sum().item()), bool(same.all())) for fact, own, same in zip(facts, losses, best)
    )


def _progress(steps: int) -> tqdm:
    """The bar of a long training: on a terminal only (``disable=None``), so that logs stay clean, and gone when it is done."""
    disable = True if os.environ.get("TQDM_DISABLE", "0") not in ("", "0") else None
    return tqdm(total=steps, desc="train", unit="step", delay=PATIENCE, leave=False, disable=disable)


def write_rows(model: nn.Module, edit: RowEdit, check: bool = True) -> dict[str, Tensor]:
    """Adds a trained edit to the weights, in place. Returns the original matrices by parameter name.

    ``check``: one forward pass compares the loss of the model that one gets with the one that was trained; raises EditLost
    if they differ by more than rounding. An exception on the way (Ctrl-C too) puts the originals back bit by bit.
    """
    demand_trainable(model)
    modules = {name: model.get_submodule(name) for name in edit.deltas}
    originals: dict[str, Tensor] = {}

    def put_back() -> None:
        with own_modes(model), torch.no_grad():
            for name, value in originals.items():
                modules[name.removesuffix(".weight")].weight.copy_(value)
            torch.clear_autocast_cache()

    with interrupts_held(undo=put_back), own_modes(model):
        originals.update((f"{name}.weight", module.weight.detach().clone()) for name, module in modules.items())
        try:
            with torch.no_grad():
                for name, (chosen, delta) in edit.deltas.items():
                    weight = rows(modules[name])
                    index = torch.tensor(chosen, device=weight.device)
                    # Added in the delta's precision, then rounded once: in bf16 a small delta would drown term by term.
                    weight[index] = (weight[index].to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
            torch.clear_autocast_cache()  # the caller's autocast keeps copies of the weights as they were
            if check and edit.answers:
                _demand_trained_loss(model, edit)
        except BaseException:
            put_back()
            raise
    return originals


def _demand_trained_loss(model: nn.Module, edit: RowEdit) -> None:
    batch = collate([answer.fact for answer in edit.answers]).to(device_of(model))
    with undisturbed(model), torch.no_grad():
        logits, labels = answer_logits(model, batch)
        loss, trained = _cross_entropy(logits, labels).item(), edit.losses[-1]
    # What the written rows lose to rounding moves the logits by some units in the last place of the largest one. Measured on 220
    # edits, the loss moves by up to 3.3 units in tiny models (float64 to bfloat16) and by 0.85 in SmolLM2 (bfloat16): 32 are no
    # rounding in any type. In half precision 32 may be more than an edit gains: there it is lost if half of its gain is, unless
    # that is within 4 units.
    unit = torch.finfo(logits.dtype).eps * logits.abs().max().item()
    allowed = min(32 * unit, max(4 * unit, abs(edit.losses[0] - trained) / 2))
    if not abs(loss - trained) <= allowed:
        modules = map(model.get_submodule, edit.deltas)
        kinds = sorted({f"{type(module).__name__} in {module.weight.dtype}" for module in modules})
        raise EditLost(
            f"the edit was trained to a loss of {trained:.4g}, but the written model has {loss:.4g} (rounding explains {allowed:.2g}), so its "
            f"weights were put back. {next(iter(edit.deltas))} and its like ({', '.join(kinds)}) do not keep what is written, or the "
            f"model has changed since the training; load it unquantised, in float32 or bfloat16"
        )


def restore(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Writes original weights back, bit by bit: ``originals`` as an edit of ``model`` returned them, by parameter name.

    They are whole matrices as they were before *that* edit: restoring an earlier one of several edits takes back the later
    ones, too, where they changed the same matrices, and only there. To undo several, restore them last first.

    Raises ValueError, before anything is changed, for a name, shape or type that is not of ``model``.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in originals.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"originals: {type(model).__name__} has no parameter {name!r}; they are of another model, or its modules were exchanged"
            )
        if not isinstance(value, Tensor) or value.shape != parameter.shape or value.dtype != parameter.dtype:
            given = f"{tuple(value.shape)} in {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"originals: {name} is {given}, in {type(model).__name__} it is {tuple(parameter.shape)} in {parameter.dtype}; "
                f"give what an edit of this very model returned"
            )
    with interrupts_held(), own_modes(model), torch.no_grad():
        for name, value in originals.items():
            parameters[name].copy_(value)
        torch.clear_autocast_cache()


@contextmanager
def row_adapter(model: nn.Module, ensemble: NeuronEnsemble, hparams: KNEHyperParams) -> Iterator[dict[str, nn.Module]]:
    """Inside, the ensemble's modules are PEFT LoRA layers: ``A`` trainable, ``B`` the frozen row selector.

    Yields module name -> LoRA layer. Afterwards the very same modules as before are back in their places. Use it inside
    `undisturbed`, where Ctrl-C does not interrupt that.
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
