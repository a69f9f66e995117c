"""Which edits a loaded model has, and what their rows held without them.

Whoever writes edits notes it here. What is noted is checked against the weights before it is used: a caller may have
written weights back by itself (EasyEdit does), or anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from kne_easyedit._util.tensor_files import values_digest
from kne_easyedit.models.targets import rows
from kne_easyedit.models.weights import Weight, weight_of

Rows = tuple[Tensor, Tensor]
"""Row numbers, ascending, and values: ``(n,)``, ``(n, d1)``."""


@dataclass(frozen=True)
class Mark:
    """What rows of a module held after an edit was written."""

    index: Tensor
    sha256: str


@dataclass(frozen=True)
class Known:
    """An edit that was written: its digest, and the edit if it is still at hand."""

    digest: str
    edit: Any = None
    """The edit itself, a weak reference to it, or None."""

    def resolve(self) -> Any:
        """The edit, or None if nobody has it any more."""
        return self.edit() if isinstance(self.edit, ref) else self.edit


@dataclass(frozen=True)
class Edited:
    """The edits of a model, as its weights bear out."""

    edits: tuple[Known, ...] = ()
    """In the order in which they were added."""
    originals: Mapping[str, Rows] = field(default_factory=dict)
    """Module name -> the rows that they changed, without them: as long as nothing is written."""
    lost: bool = False
    """Edits were noted, but the weights are neither those with them nor those before: something else changed them."""

    @property
    def digests(self) -> tuple[str, ...]:
        """The edits' digests."""
        return tuple(known.digest for known in self.edits)

    def at_hand(self) -> tuple[Any, ...]:
        """The edits themselves.

        Raises:
            ValueError: Nobody has one any more.
        """
        found = tuple(known.resolve() for known in self.edits)
        for known, edit in zip(self.edits, found):
            if edit is None:
                raise ValueError(
                    f"model: it has the edit {known.digest[:12]}, whose rows are not at hand, so that they cannot be "
                    f"added up with others; restore its originals first, or keep edits (on_trained) or a store of them"
                )
        return found


_State = tuple[tuple[Known, ...], dict[str, Mark]]


@dataclass
class _Lineage:
    originals: dict[str, Rows]
    states: list[_State]
    """The states of the weights, from that without edits to the last one that was written."""


_LINEAGES: WeakKeyDictionary[nn.Module, _Lineage] = WeakKeyDictionary()


def edited(model: nn.Module) -> Edited:
    """The edits that ``model`` has now. States that were undone since are forgotten.

    Args:
        model: Any model; one that nothing was noted of has none.
    """
    lineage = _LINEAGES.get(model)
    if lineage is None:
        return Edited()
    for last in range(len(lineage.states) - 1, -1, -1):
        edits, marks = lineage.states[last]
        if _is_now(model, lineage.originals, marks):
            del lineage.states[last + 1 :]
            if edits:
                return Edited(edits, MappingProxyType(lineage.originals))
            del _LINEAGES[model]
            return Edited()
    return Edited(lost=True)


def keep_rows(model: nn.Module, name: str, chosen: Sequence[int]) -> Rows:
    """Keeps what rows of a module hold without edits; those that are not known yet are taken from the weights.

    Args:
        model: A model after `edited`.
        name: The module.
        chosen: Its rows that are about to be changed.

    Returns:
        The numbers of ``chosen``, ascending, and their values without edits, not to be changed.
    """
    lineage = _LINEAGES.setdefault(model, _Lineage({}, [((), {})]))
    _take(lineage.originals, name, chosen, weight_of(model, name))
    index, values = lineage.originals[name]
    wanted = torch.tensor(sorted(chosen), dtype=torch.long)
    if len(wanted) == len(index):
        return index, values
    return wanted, values[torch.searchsorted(index, wanted).to(values.device)]


def note_edits(model: nn.Module, edits: tuple[Known, ...], changed: Mapping[str, Sequence[int]]) -> None:
    """Notes that the weights are those without edits plus ``edits``, which change the rows ``changed``."""
    lineage = _LINEAGES.setdefault(model, _Lineage({}, []))
    marks = {}
    for name, chosen in changed.items():
        if chosen:
            index = torch.tensor(sorted(chosen), dtype=torch.long)
            marks[name] = Mark(index, values_digest(weight_of(model, name)[index]))
    lineage.states = [((), {}), (edits, marks)] if edits else [((), {})]


def kept_note(model: nn.Module) -> Any:
    """What is noted, for `take_note_back`. Later notes do not change it."""
    lineage = _LINEAGES.get(model)
    return None if lineage is None else _copy(lineage)


def take_note_back(model: nn.Module, noted: Any) -> None:
    """Notes what was noted before (`kept_note`), when the weights are put back."""
    if noted is None:
        _LINEAGES.pop(model, None)
    else:
        _LINEAGES[model] = _copy(noted)


def noted_rows(model: nn.Module) -> Mapping[str, Rows]:
    """Module name -> rows that were changed, as they were without edits; whatever the weights are now."""
    lineage = _LINEAGES.get(model)
    return {} if lineage is None else dict(lineage.originals)


def tidy(model: nn.Module) -> None:
    """Drops rows of `keep_rows` that no edit changes any more, once they are more than the others."""
    lineage = _LINEAGES.get(model)
    if lineage is None or len(lineage.states) > 2:
        return
    marks = lineage.states[-1][1]
    for name, (index, values) in list(lineage.originals.items()):
        mark = marks.get(name)
        if mark is None:
            del lineage.originals[name]
        elif 2 * len(mark.index) < len(index):
            lineage.originals[name] = mark.index, values[torch.searchsorted(index, mark.index).to(values.device)]
    if not lineage.originals:
        del _LINEAGES[model]


def forget_edits(model: nn.Module) -> None:
    """Forgets what was noted: the weights as they are count as those without edits."""
    _LINEAGES.pop(model, None)


def note_one_more(model: nn.Module, before: Edited, edit: Any, originals: Mapping[str, Tensor]) -> None:
    """Notes that ``edit`` was added to the weights as they were.

    Args:
        model: The model.
        before: Its edits before that one.
        edit: With ``digest`` and ``deltas``; it is not kept alive.
        originals: Module name -> its whole weight before that edit.
    """
    lineage = _LINEAGES.get(model) if before.edits else None
    lineage = _Lineage({}, [((), {})]) if lineage is None else lineage
    for name, (chosen, _) in edit.deltas.items():
        _take(lineage.originals, name, chosen, rows(model.get_submodule(name), originals[name]))
    lineage.states.append(((*before.edits, Known(edit.digest, ref(edit))), _marks(model, lineage.originals)))
    _LINEAGES[model] = lineage


def inherit_edits(copy: nn.Module, model: nn.Module) -> None:
    """Notes that ``copy``, which was copied from ``model``, has the same edits."""
    if (lineage := _LINEAGES.get(model)) is not None:
        _LINEAGES[copy] = _copy(lineage)


def _copy(lineage: _Lineage) -> _Lineage:
    return _Lineage(dict(lineage.originals), list(lineage.states))


def _take(known: dict[str, Rows], name: str, chosen: Sequence[int], weight: Tensor | Weight) -> None:
    """Adds those of the rows ``chosen`` of a weight that are not known yet."""
    index, values = known.get(name, (torch.tensor([], dtype=torch.long), None))
    there = set(index.tolist())
    new = torch.tensor(sorted(row for row in chosen if row not in there), dtype=torch.long)
    if not len(new):
        return
    more = weight[new]
    if values is None:
        known[name] = new, more
        return
    order = torch.cat([index, new]).argsort()
    both = torch.cat([values, more.to(values.device)])
    known[name] = torch.cat([index, new])[order], both[order.to(both.device)]


def _marks(model: nn.Module, originals: Mapping[str, Rows]) -> dict[str, Mark]:
    return {name: Mark(index, values_digest(weight_of(model, name)[index])) for name, (index, _) in originals.items()}


def _is_now(model: nn.Module, originals: Mapping[str, Rows], marks: Mapping[str, Mark]) -> bool:
    """Whether the weights are those of a state: marked rows as marked, other rows of ``originals`` as they were."""
    for name, (index, values) in originals.items():
        try:
            found = weight_of(model, name)
            whole, dtype, shape = found.stored, found.dtype, found.shape
        except (ValueError, AttributeError, RuntimeError):  # the module was exchanged
            return False
        if whole.is_meta or len(shape) != 2 or dtype != values.dtype or shape[1] != values.shape[1]:
            return False
        if len(index) and index[-1] >= shape[0]:
            return False
        weight = found.rows_of(whole)  # read once: it may be on disk
        mark = marks.get(name)
        if mark is not None and values_digest(weight[mark.index.to(weight.device)]) != mark.sha256:
            return False
        if mark is None or len(mark.index) < len(index):
            rest = torch.ones(len(index), dtype=torch.bool)
            if mark is not None:
                rest[torch.searchsorted(index, mark.index)] = False
            now = weight[index[rest].to(weight.device)]
            before = values[rest.to(values.device)].to(now.device)
            if not torch.equal(now.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8)):
                return False
    return True
