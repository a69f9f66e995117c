"""Eq. 11: a trained edit as a value, written into the weights and undone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit._util.interrupts import defer_interrupts
from kne_easyedit.editing.lineage import Edited, edited, note_one_more
from kne_easyedit.editing.losses import answer_logits, cross_entropy
from kne_easyedit.facts.encoding import Fact, collate
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.editable import require_unquantised
from kne_easyedit.models.state import default_modes, preserve_state, require_trainable
from kne_easyedit.models.targets import rows
from kne_easyedit.models.weights import Weight, stored_tensor, write_tensor

logger = logging.getLogger(__name__)


class EditLost(NotImplementedError):
    """The written model does not have the loss that was trained; its weights were put back."""


@dataclass(frozen=True)
class Answer:
    """How well a trained edit gives the answer of one fact."""

    fact: Fact
    loss: float
    """Mean cross-entropy of the answer's tokens, in nats."""
    probability: float
    """Probability of the whole answer after the prompt."""
    greedy: bool
    """Whether each of its tokens is the most probable one after those before it."""


@dataclass(frozen=True)
class RowEdit:
    """A trained edit, not yet written: what to add to which rows."""

    deltas: Mapping[str, tuple[tuple[int, ...], Tensor]]
    """Module name -> its rows, and what to add to them: ``(n, d1)``, with the scale ``alpha / sqrt(n)`` applied."""
    losses: tuple[float, ...]
    """The answers' mean cross-entropy in nats before every step; the last one is that of ``deltas`` as they are."""
    answers: tuple[Answer, ...] = ()
    """The facts, and how well ``deltas`` answer them; empty for an edit that was not trained."""

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return len(self.losses) - 1

    def failed(self, stop_loss: float) -> tuple[Answer, ...]:
        """The facts that the edit did not reach.

        Args:
            stop_loss: The mean loss below which training stops; 0: it never stops early.

        Returns:
            If training ended with a mean loss of at least ``stop_loss``: the facts whose own loss is at least that (all
            facts, if none is). Otherwise: the facts with an answer token that is not the most probable one.
        """
        if 0 < stop_loss <= self.losses[-1]:
            return tuple(answer for answer in self.answers if answer.loss >= stop_loss) or self.answers
        return tuple(answer for answer in self.answers if not answer.greedy)


def write_rows(
    model: nn.Module, edit: RowEdit, check: bool = True, on_written: Callable[[], None] | None = None
) -> dict[str, Tensor]:
    """Adds a trained edit to the weights, in place (Eq. 11).

    An exception on the way (Ctrl-C too) puts the originals back bit for bit.

    Args:
        model: The model for which the edit was trained.
        edit: What to add to which rows.
        check: Run one forward pass, and compare the loss of the written model with the one that was trained.
        on_written: Called when the rows are written; what it raises puts them back.

    Returns:
        The original matrices, whole, by parameter name: what `restore` takes.

    Raises:
        EditLost: The two losses differ by more than rounding; the weights were put back.
        ValueError: The model cannot be trained (`require_trainable`), or its weights are quantised.
    """
    require_trainable(model)
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in edit.deltas}
    require_unquantised(modules)
    weights = {name: Weight(model, name, module) for name, module in modules.items()}
    originals: dict[str, Tensor] = {}
    before = edited(model) if hasattr(edit, "digest") else None  # a `KNEEdit`: it may be told from others

    def put_back() -> None:
        with default_modes(model), torch.no_grad():
            for name, value in originals.items():
                weights[name.removesuffix(".weight")].write(value)
            torch.clear_autocast_cache()

    with defer_interrupts(undo=put_back), default_modes(model):
        originals.update((f"{name}.weight", weight.stored.clone()) for name, weight in weights.items())
        try:
            with torch.no_grad():
                for name, (chosen, delta) in edit.deltas.items():
                    weight, index = weights[name], torch.tensor(chosen)
                    now = weight[index]
                    # Added in the delta's precision, then rounded once: in bf16 small deltas would be lost one by one.
                    weight[index] = (now.to(delta.dtype) + delta.to(now.device)).to(now.dtype)
            torch.clear_autocast_cache()  # the caller's autocast keeps copies of the old weights
            if check and edit.answers:
                _require_trained_loss(model, edit)
            if before is not None:
                note_one_more(model, before, edit, {name: originals[f"{name}.weight"] for name in modules})
            if on_written is not None:
                on_written()
        except BaseException:
            put_back()
            raise
    return originals


def _require_trained_loss(model: nn.Module, edit: RowEdit) -> None:
    batch = collate([answer.fact for answer in edit.answers]).to(device_of(model))
    with preserve_state(model), torch.no_grad():
        logits, labels = answer_logits(model, batch)
        loss, trained = cross_entropy(logits, labels).item(), edit.losses[-1]
    # Rounding of the written rows moves the logits by some units in the last place of the largest one. Measured on 220
    # edits, the loss moves by up to 3.3 units in tiny models (float64 to bfloat16) and by 0.85 in SmolLM2 (bfloat16),
    # so 32 units are more than rounding in any type. In half precision an edit may gain less than 32 units: there it
    # counts as lost if half of its gain is, unless that is within 4 units. Where a projection leaves little room, rows
    # grow large against each other, and so does their rounding: a thousandth of what was changed is nothing lost.
    unit = torch.finfo(logits.dtype).eps * logits.abs().max().item()
    changed = abs(edit.losses[0] - trained)
    allowed = max(min(32 * unit, max(4 * unit, changed / 2)), changed / 1000)
    if not abs(loss - trained) <= allowed:
        modules = map(model.get_submodule, edit.deltas)
        kinds = sorted({f"{type(module).__name__} in {module.weight.dtype}" for module in modules})
        raise EditLost(
            f"the edit was trained to a loss of {trained:.4g}, but the written model has {loss:.4g} (rounding explains "
            f"{allowed:.2g}), so its weights were put back. {next(iter(edit.deltas))} and its like "
            f"({', '.join(kinds)}) do not keep what is written, or the model has changed since the training; load it "
            f"unquantised, in float32 or bfloat16"
        )


def restore(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Writes original weights back, bit for bit.

    They are whole matrices as they were before *that* edit. Restoring an earlier one of several edits undoes the later
    ones as well, where they changed the same matrices, and only there; a warning names them as far as they are known
    (`KNEEdit`), whatever the restored one is. To undo several, restore the last one first. To take back one of several,
    use `KNEEdit.take_back`.

    Args:
        model: The edited model.
        originals: What an edit of ``model`` returned, by parameter name.

    Raises:
        ValueError: A name, shape or type is not of ``model``; nothing was changed.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in originals.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"originals: {type(model).__name__} has no parameter {name!r}; they are of another model, or its "
                f"modules were exchanged"
            )
        if not isinstance(value, Tensor) or value.shape != parameter.shape or value.dtype != parameter.dtype:
            given = (
                f"{tuple(value.shape)} in {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise ValueError(
                f"originals: {name} is {given}, in {type(model).__name__} it is {tuple(parameter.shape)} in "
                f"{parameter.dtype}; give what an edit of this very model returned"
            )
    before = edited(model)
    among = not before.edits or _all_known(model, parameters, originals, before)
    with defer_interrupts(), default_modes(model), torch.no_grad():
        for name, value in originals.items():
            write_tensor(model, name, parameters[name], value)
        torch.clear_autocast_cache()
    _warn_of_others(before, edited(model), among)


def _all_known(
    model: nn.Module, parameters: Mapping[str, Tensor], originals: Mapping[str, Tensor], before: Edited
) -> bool:
    """Whether all rows in which the weights differ from originals are rows of known edits."""
    for name, value in originals.items():
        now = stored_tensor(model, name, parameters[name])
        differs = now != value.to(now.device)
        module, _, key = name.rpartition(".")
        if key == "weight" and module in before.originals:
            differs = rows(model.get_submodule(module), differs).any(1)
            differs[before.originals[module][0].to(differs.device)] = False
        if differs.any():
            return False
    return True


def _warn_of_others(before: Edited, after: Edited, among: bool) -> None:
    """Says which edits `restore` has taken back beside its own, wholly or in part.

    Its own is one of the known edits only if all rows that it changed are theirs (``among``). If they are not, another
    edit is involved, its own or a later one, and which of the two cannot be told.
    """
    if after.lost:
        gone = before.edits  # which of them is its own is not known
        if among and len(gone) < 2:
            return
    else:
        gone = before.edits[len(after.edits) + among :]  # its own is the first of those that are gone
    if not gone:
        return
    named = [
        f"{known.digest[:12]} ({'; '.join(edit.facts[:2])})" if (edit := known.resolve()) else known.digest[:12]
        for known in gone
    ]
    logger.warning(
        "restore: the originals are whole matrices from before an earlier edit: %s %s%s. Restore the last edit first; "
        "KNEEdit.take_back or a store (EditStore) take back one of several and leave the others",
        "parts may be gone of" if after.lost else "gone with it are the later edits",
        ", ".join(named),
        "" if among else ", and rows of an edit that is no KNEEdit; the restored one is one of these",
    )
