"""Edits in the weights of a loaded model: their state is a function of the base and of the edits alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from kne_easyedit._util.interrupts import defer_interrupts
from kne_easyedit.editing.lineage import (
    Edited,
    Known,
    edited,
    forget_edits,
    keep_rows,
    note_edits,
    states,
    take_note_back,
    tidy,
)
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
    def rows(self) -> Mapping[str, tuple[int, ...]]:
        """The rows alone: nothing is read for them."""

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

    Every row is its value without edits plus the deltas, added in order in the deltas' precision and rounded once
    (`add_rows`). An exception on the way (Ctrl-C too) puts the weights back bit for bit.

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
    differing = _differing(state, edits)
    touched = list(dict.fromkeys([*state.originals, *(name for edit in edits for name in edit.rows)]))
    require_editable(model, {name: linear_module(model, name) for name in touched})
    if state.lost:
        forget_edits(model)

    written: list[tuple[str, Tensor, Tensor | None]] = []

    def put_back() -> None:
        with default_modes(model), torch.no_grad():
            for name, index, values in written:
                weight = rows(linear_module(model, name))
                values = keep_rows(model, name, index.tolist())[1] if values is None else values
                weight[index.to(weight.device)] = values.to(weight.device)
            torch.clear_autocast_cache()
        take_note_back(model, noted)

    noted = states(model)
    changed = {name: {row for edit in edits for row in edit.rows.get(name, ())} for name in touched}
    with defer_interrupts(undo=put_back), default_modes(model):
        try:
            with torch.no_grad():
                for name in touched:
                    if differing is None:
                        other = {
                            *changed[name],
                            *(state.originals[name][0].tolist() if name in state.originals else ()),
                        }
                    else:
                        other = {row for edit in differing for row in edit.rows.get(name, ())}
                    if not other:
                        continue
                    index, base = keep_rows(model, name, sorted(other))
                    weight = rows(linear_module(model, name))
                    place = index.to(weight.device)
                    # What the rows hold without edits is kept anyway, and not kept twice.
                    written.append((name, index, weight[place] if state.edits else None))
                    weight[place] = add_rows(base, index, [_part(edit, name, other) for edit in edits]).to(
                        weight.device
                    )
            torch.clear_autocast_cache()  # the caller's autocast keeps copies of the old weights
            known = tuple(Known(edit.digest, edit) for edit in edits)
            note_edits(model, known, {name: sorted(found) for name, found in changed.items()})
        except BaseException:
            put_back()
            raise
    tidy(model)  # not before: an interrupt at the end of the block still needs what the rows held


def _differing(state: Edited, edits: Sequence[Appliable]) -> list[Appliable] | None:
    """The edits whose rows may hold other values than before; None: all that the model has and gets."""
    before = [known.edit for known in state.edits]
    if any(edit is None or isinstance(edit, ref) for edit in before):
        return None  # written one by one (`write_rows`), and rounded every time
    old, new = {edit.digest: edit for edit in before}, {edit.digest: edit for edit in edits}
    if [digest for digest in old if digest in new] != [digest for digest in new if digest in old]:
        return [*{**old, **new}.values()]
    return [edit for digest, edit in {**old, **new}.items() if (digest in old) != (digest in new)]


def _part(edit: Appliable, name: str, wanted: set[int]) -> tuple[tuple[int, ...], Tensor] | None:
    """What an edit adds to some rows of a module; None: nothing. Rows are read only where there are some."""
    chosen = edit.rows.get(name, ())
    own = [i for i, row in enumerate(chosen) if row in wanted]
    if not own:
        return None
    delta = edit.deltas[name][1]
    if len(own) == len(chosen):
        return chosen, delta
    return tuple(chosen[i] for i in own), delta[torch.tensor(own, device=delta.device)]


def add_rows(base: Tensor, index: Tensor, parts: Iterable[tuple[tuple[int, ...], Tensor] | None]) -> Tensor:
    """Rows plus deltas, added in order in the precision in which edits are trained, and rounded once.

    That is float32, or the rows' own precision if it is higher. Parts are taken one at a time.

    Args:
        base: The rows without edits, ``(n, d1)``; it is not changed.
        index: Their numbers, ascending.
        parts: Numbers of some of them, and what to add: ``(m, d1)``; or None: nothing.

    Returns:
        The rows in the type of ``base``; ``base`` itself, if nothing is added.
    """
    total: Tensor | None = None
    for part in parts:
        if part is not None:
            if total is None:
                total = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
            chosen, delta = part
            place = torch.searchsorted(index, torch.tensor(chosen)).to(total.device)
            total[place] += delta.to(total)
    return base if total is None else total.to(base.dtype)


def _require_fit(model: nn.Module, edits: Sequence[Appliable], state: Edited, force: bool) -> None:
    """Raises ValueError for an edit that is new to the model, and of another base."""
    new = [edit for edit in edits if edit.digest not in state.digests]
    for edit in new:
        for name in edit.rows:
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
    kept = dict(edited(model).originals)
    try:
        yield model
    finally:
        if edited(model).lost:  # something else wrote into the rows: they are what they were all the same
            with default_modes(model), torch.no_grad():
                for name, (index, values) in kept.items():
                    weight = rows(linear_module(model, name))
                    weight[index.to(weight.device)] = values.to(weight)
        set_edits(model, before, force=True)
