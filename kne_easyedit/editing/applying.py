"""Edits in the weights of a loaded model: their state is a function of the base and of the edits alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor, nn

from kne_easyedit._util.interrupts import defer_interrupts
from kne_easyedit.editing.lineage import Edited, Known, Rows, edited, note_edits
from kne_easyedit.models.base import Base, base_of, linear_module
from kne_easyedit.models.editable import require_bare, require_editable
from kne_easyedit.models.state import default_modes, require_trainable
from kne_easyedit.models.targets import in_features, out_features, rows

logger = logging.getLogger(__name__)


class Appliable(Protocol):
    """What is applied: a `KNEEdit`."""

    @property
    def deltas(self) -> Mapping[str, tuple[tuple[int, ...], Tensor]]:
        """Module name -> its rows, and what to add to them."""

    @property
    def base(self) -> Base:
        """Fingerprint of the model without edits."""

    @property
    def digest(self) -> str:
        """Its identity."""

    @property
    def facts(self) -> tuple[str, ...]:
        """For messages."""


def set_edits(model: nn.Module, edits: Sequence[Appliable], *, force: bool = False) -> None:
    """Makes the weights those without edits plus ``edits``, in place; other edits are taken back.

    Every row is its value without edits plus the deltas, added in order in the deltas' precision (the weight's, if that
    is higher) and rounded once. An exception on the way (Ctrl-C too) puts the weights back bit for bit.

    Args:
        model: A loaded model.
        edits: The edits, in their order; none: the base.
        force: Apply edits of another base, too, with a warning.

    Raises:
        ValueError: An edit occurs twice, or is of another base; the model cannot be edited, or its edited rows were
            changed by something else. Nothing was changed.
        OSError: A stored edit cannot be read; the weights were put back.
    """
    require_trainable(model)
    require_bare(model)
    digests = [edit.digest for edit in edits]
    if twice := sorted({one for one in digests if digests.count(one) > 1}):
        raise ValueError(f"edits: {twice[0][:12]} occurs twice; an edit is applied once")
    state = edited(model)
    if state.lost and not edits:
        raise ValueError(
            f"model: rows of {type(model).__name__} that edits have changed were changed by something else since, so "
            f"that the base cannot be restored; load the model again"
        )
    _require_fit(model, edits, state, force)
    touched = list(dict.fromkeys([*state.originals, *(name for edit in edits for name in edit.deltas)]))
    require_editable(model, {name: linear_module(model, name) for name in touched})

    written: list[tuple[Tensor, Tensor, Tensor]] = []

    def put_back() -> None:
        with default_modes(model), torch.no_grad():
            for weight, index, values in written:
                weight[index] = values
            torch.clear_autocast_cache()
        note_edits(model, state.edits, state.originals)

    originals: dict[str, Rows] = {}
    with defer_interrupts(undo=put_back), default_modes(model):
        try:
            with torch.no_grad():
                for name in touched:
                    weight = rows(linear_module(model, name))
                    ours = [edit.deltas[name] for edit in edits if name in edit.deltas]
                    changed = sorted({row for chosen, _ in ours for row in chosen})
                    known, before = state.originals.get(name, (torch.tensor([], dtype=torch.long), None))
                    index = torch.tensor(sorted({*changed, *known.tolist()}), dtype=torch.long)
                    place = index.to(weight.device)
                    now = weight[place]
                    base = now if before is None else now.clone()
                    if before is not None:
                        base[torch.searchsorted(index, known).to(base.device)] = before.to(base.device)
                    written.append((weight, place, now))
                    weight[place] = add_rows(base, index, ours)
                    if changed:
                        own = torch.searchsorted(index, torch.tensor(changed))
                        kept = base if len(changed) == len(index) else base[own.to(base.device)]
                        originals[name] = torch.tensor(changed), kept
            torch.clear_autocast_cache()  # the caller's autocast keeps copies of the old weights
            note_edits(model, tuple(Known(edit.digest, edit) for edit in edits), originals)
        except BaseException:
            put_back()
            raise


def add_rows(base: Tensor, index: Tensor, deltas: Sequence[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    """Rows plus deltas, added in order in the deltas' precision (the rows', if that is higher) and rounded once.

    Args:
        base: The rows without edits, ``(n, d1)``; it is not changed.
        index: Their numbers, ascending.
        deltas: Numbers of some of them, and what to add: ``(m, d1)``.

    Returns:
        The rows in the type of ``base``; ``base`` itself, if there are no deltas.
    """
    if not deltas:
        return base
    total = base.to(reduce(torch.promote_types, (delta.dtype for _, delta in deltas), base.dtype), copy=True)
    for chosen, delta in deltas:
        place = torch.searchsorted(index, torch.tensor(chosen)).to(total.device)
        total[place] += delta.to(total.device)
    return total.to(base.dtype)


def _require_fit(model: nn.Module, edits: Sequence[Appliable], state: Edited, force: bool) -> None:
    """Raises ValueError for an edit that is new to the model, and of another base."""
    new = [edit for edit in edits if edit.digest not in state.digests]
    for edit in new:
        for name in edit.deltas:
            module = linear_module(model, name)
            d2, d1 = out_features(module), in_features(module)
            shape = edit.base.modules[name].shape
            if shape != (d2, d1):
                raise ValueError(
                    f"edit: {edit.digest[:12]} ({'; '.join(edit.facts[:2])}) was trained on {edit.base.label}, whose "
                    f"{name} is {shape}; here it is {(d2, d1)}. Load that model"
                )
    # In each number type in which an edit was trained: the same base may be loaded in another.
    kinds = dict.fromkeys(one.dtype for edit in new for one in edit.base.modules.values())
    for kind in kinds:
        names = dict.fromkeys(n for edit in new for n, one in edit.base.modules.items() if one.dtype == kind)
        found = base_of(model, list(names), state.originals, dict.fromkeys(names, kind))
        for edit in new:
            reason = edit.base.conflict(found)
            if reason and not force:
                lost = "; its edited rows were changed by something else since they were written" if state.lost else ""
                raise ValueError(
                    f"edit: {edit.digest[:12]} ({'; '.join(edit.facts[:2])}) was trained on {edit.base.label}, this "
                    f"model is {found.label}: {reason}{lost}. Load that model as it was, without edits, or give "
                    f"force=True (--force) to apply it all the same"
                )
            if reason:
                logger.warning("edit %s is applied to another base: %s", edit.digest[:12], reason)


@contextmanager
def with_edits(model: nn.Module, edits: Sequence[Appliable], *, force: bool = False) -> Iterator[nn.Module]:
    """Inside, the model has exactly ``edits``; afterwards it has the edits from before, bit for bit.

    What is applied inside is taken back as well.

    Args:
        model: A loaded model.
        edits: The edits, in their order.
        force: As for `set_edits`.

    Yields:
        ``model``.

    Raises:
        ValueError: As `set_edits`.
    """
    before = edited(model).at_hand()
    set_edits(model, edits, force=force)
    kept = edited(model).originals
    try:
        yield model
    finally:
        if edited(model).lost:  # something else wrote into the rows: they are what they were all the same
            with default_modes(model), torch.no_grad():
                for name, (index, values) in kept.items():
                    weight = rows(linear_module(model, name))
                    weight[index.to(weight.device)] = values.to(weight)
        set_edits(model, before, force=True)
