"""Edits in the weights of a loaded model: their state is a function of the base and of the edits alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from kne_easyedit._util.interrupts import defer_interrupts
from kne_easyedit.editing.earlier import Notes, kept_notes, put_notes_back, renew_notes, still_there
from kne_easyedit.editing.edit_files import require_finite
from kne_easyedit.editing.lineage import (
    Edited,
    Known,
    edited,
    forget_edits,
    keep_rows,
    kept_note,
    note_edits,
    noted_rows,
    take_note_back,
    tidy,
)
from kne_easyedit.models.base import Base, base_of
from kne_easyedit.models.editable import require_bare, require_editable
from kne_easyedit.models.state import default_modes, require_trainable
from kne_easyedit.models.targets import in_features, out_features
from kne_easyedit.models.weights import linear_module, weight_of

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
        ValueError: An edit occurs twice, has values that are not finite, or is of another base; the model cannot be
            edited, or its edited rows were changed by something else. Nothing was changed.
        OSError: A stored edit cannot be read; the weights were put back.
    """
    _set(model, edits, force)


class _Held:
    """What rows of a model hold, and what is noted of it: both can be put back, from memory alone."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._kept: dict[str, tuple[Tensor, Tensor]] | None = None
        self._noted: Any = None
        self._notes: Notes = ()

    def keep(self, touched: Mapping[str, set[int]]) -> None:
        """Keeps rows as they are now: module name -> their numbers."""
        kept = {}
        for name, chosen in touched.items():
            index = torch.tensor(sorted(chosen), dtype=torch.long)
            kept[name] = index, weight_of(self._model, name)[index]
        self._noted, self._notes, self._kept = kept_note(self._model), kept_notes(self._model), kept

    def put_back(self) -> None:
        """Puts them back, and takes back what was written into other rows since; as often as it is called."""
        if self._kept is None:
            return  # nothing was written
        with default_modes(self._model), torch.no_grad():
            for found in (noted_rows(self._model), self._kept):
                for name, (index, values) in found.items():
                    weight_of(self._model, name)[index] = values
            torch.clear_autocast_cache()
        take_note_back(self._model, self._noted)
        put_notes_back(self._model, self._notes, written=True)


def _set(model: nn.Module, edits: Sequence[Appliable], force: bool, held: _Held | None = None) -> None:
    """`set_edits`; ``held`` keeps all rows that earlier edits or these change, once nothing refuses them."""
    require_trainable(model)
    require_bare(model)
    digests = [edit.digest for edit in edits]
    if twice := sorted({one for one in digests if digests.count(one) > 1}):
        raise ValueError(f"edits: {twice[0][:12]} occurs twice; an edit is applied once")
    state = edited(model)
    if state.lost and not (edits and force):
        way_out = ", or give force=True (--force) to take the weights as they are for the base" if edits else ""
        raise ValueError(
            f"model: rows of {type(model).__name__} that edits have changed were changed by something else since they "
            f"were written, so that the base cannot be restored; load the model again{way_out}"
        )
    _require_fit(model, edits, state, force)
    differing = _differing(state, edits)
    touched = list(dict.fromkeys([*state.originals, *(name for edit in edits for name in edit.rows)]))
    require_editable(model, {name: linear_module(model, name) for name in touched})
    changed = {name: {row for edit in edits for row in edit.rows.get(name, ())} for name in touched}
    earlier = {name: set(index.tolist()) for name, (index, _) in state.originals.items()}
    noted, notes, there = kept_note(model), kept_notes(model), still_there(model)
    if held is not None:
        held.keep({name: changed[name] | earlier.get(name, set()) for name in touched})
    if state.lost:
        forget_edits(model)

    written: list[tuple[str, Tensor, Tensor | None]] = []

    def put_back() -> None:
        with default_modes(model), torch.no_grad():
            for name, index, values in written:
                values = keep_rows(model, name, index.tolist())[1] if values is None else values
                weight_of(model, name)[index] = values
            torch.clear_autocast_cache()
        take_note_back(model, noted)
        put_notes_back(model, notes)

    with defer_interrupts(undo=put_back), default_modes(model):
        try:
            with torch.no_grad():
                for name in touched:
                    if differing is None:
                        other = changed[name] | earlier.get(name, set())
                    else:
                        other = {row for edit in differing for row in edit.rows.get(name, ())}
                    if not other:
                        continue
                    index, base = keep_rows(model, name, sorted(other))
                    weight = weight_of(model, name)
                    # What the rows hold without edits is kept anyway, and not kept twice.
                    written.append((name, index, weight[index] if state.edits else None))
                    weight[index] = add_rows(base, index, [_part(edit, name, other) for edit in edits])
            torch.clear_autocast_cache()  # the caller's autocast keeps copies of the old weights
            known = tuple(Known(edit.digest, edit) for edit in edits)
            note_edits(model, known, {name: sorted(found) for name, found in changed.items()})
            renew_notes(model, there, digests, state.lost)
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


def require_base(model: nn.Module, edits: Sequence[Appliable], *, force: bool = False) -> None:
    """Checks that edits are of a model, as `set_edits` does; the model need not be one that can be edited.

    Raises:
        ValueError: One is of another base (with ``force`` a warning), of other shapes, or not finite.
    """
    _require_fit(model, edits, edited(model), force)


def _require_fit(model: nn.Module, edits: Sequence[Appliable], state: Edited, force: bool) -> None:
    """Raises ValueError for an edit that is new to the model, and of another base."""
    new = [edit for edit in edits if edit.digest not in state.digests]
    for edit in new:
        require_finite(edit)
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
                raise ValueError(
                    f"edit: {edit.digest[:12]} ({'; '.join(edit.facts[:2])}) was trained on {edit.base.label}, this "
                    f"model is {found.label}: {reason}{_other_type(model, edit)}. Load that model as it was, without "
                    f"edits, or give force=True (--force) to apply it all the same"
                )
            if reason:
                logger.warning("edit %s is applied to another base: %s", edit.digest[:12], reason)


def _other_type(model: nn.Module, edit: Appliable) -> str:
    """What a message adds if the model is loaded in another number type than the edit was trained in."""
    for name, module in edit.base.modules.items():
        here = str(linear_module(model, name).weight.dtype).removeprefix("torch.")
        if here != module.dtype:
            setting = {"float32": " (--set bf16=false)", "bfloat16": " (--set bf16=true)"}.get(module.dtype, "")
            return (
                f"; or only its numbers are others: it was trained in {module.dtype}, and this model is loaded in "
                f"{here}: load it in {module.dtype}{setting}"
            )
    return ""


@contextmanager
def with_edits(model: nn.Module, edits: Sequence[Appliable], *, force: bool = False) -> Iterator[nn.Module]:
    """Inside, the model has exactly ``edits``; afterwards it has the edits from before, bit for bit.

    A `KNEEdit` that is applied or written inside is taken back as well. Any other edit is not known: of what it has
    changed inside, rows that no `KNEEdit` changes stay, so `restore` it first. What the rows held is kept in memory:
    nothing is read or checked at the end, and neither an error nor Ctrl-C, however often, leaves ``edits`` in there.

    Args:
        model: A loaded model.
        edits: The edits, in their order.
        force: As for `set_edits`.

    Yields:
        ``model``.

    Raises:
        ValueError: As `set_edits`.
    """
    held = _Held(model)
    try:
        _set(model, edits, force, held)
        yield model
    finally:
        _surely(held.put_back)


def _surely(act: Callable[[], None]) -> None:
    """Acts once more for every Ctrl-C that comes before interrupts are deferred; what was raised is raised then."""
    raised: KeyboardInterrupt | None = None
    while True:
        try:
            with defer_interrupts():
                act()
            break
        except KeyboardInterrupt as error:
            raised = error
    if raised is not None:
        raise raised
