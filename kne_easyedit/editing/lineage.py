"""Which edits a loaded model has, and what their rows held without them.

Whoever writes edits notes it here. What is noted is checked against the weights before it is used: a caller may have
written weights back by itself (EasyEdit does), or anything else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from kne_easyedit._util.tensor_files import bytes_of
from kne_easyedit.models.targets import rows

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
    """Module name -> the rows that they changed, without them."""
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


@dataclass
class _Lineage:
    originals: dict[str, Rows]
    states: list[tuple[tuple[Known, ...], dict[str, Mark]]]
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
                return Edited(edits, dict(lineage.originals))
            del _LINEAGES[model]
            return Edited()
    return Edited(lost=True)


def note_edits(model: nn.Module, edits: tuple[Known, ...], originals: Mapping[str, Rows]) -> None:
    """Notes that the weights are those without edits plus ``edits``, and what ``originals`` were without them."""
    if edits:
        _LINEAGES[model] = _Lineage(dict(originals), [((), {}), (edits, _marks(model, originals))])
    else:
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
        index, values = lineage.originals.get(name, (torch.tensor([], dtype=torch.long), None))
        known = set(index.tolist())
        new = torch.tensor([row for row in chosen if row not in known], dtype=torch.long)
        if len(new):
            weight = rows(model.get_submodule(name), originals[name])
            more = weight[new.to(weight.device)]
            both = more if values is None else torch.cat([values, more.to(values.device)])
            order = torch.cat([index, new]).argsort()
            lineage.originals[name] = torch.cat([index, new])[order], both[order.to(both.device)]
    lineage.states.append(((*before.edits, Known(edit.digest, ref(edit))), _marks(model, lineage.originals)))
    _LINEAGES[model] = lineage


def inherit_edits(copy: nn.Module, model: nn.Module) -> None:
    """Notes that ``copy``, which was copied from ``model``, has the same edits."""
    if (lineage := _LINEAGES.get(model)) is not None:
        _LINEAGES[copy] = _Lineage(dict(lineage.originals), list(lineage.states))


def _marks(model: nn.Module, originals: Mapping[str, Rows]) -> dict[str, Mark]:
    return {name: Mark(index, _digest(model.get_submodule(name), index)) for name, (index, _) in originals.items()}


def _digest(module: Any, index: Tensor) -> str:
    weight = rows(module).detach()
    return hashlib.sha256(bytes_of(weight[index.to(weight.device)])).hexdigest()


def _is_now(model: nn.Module, originals: Mapping[str, Rows], marks: Mapping[str, Mark]) -> bool:
    """Whether the weights are those of a state: marked rows as marked, other rows of ``originals`` as they were."""
    for name, (index, values) in originals.items():
        try:
            module: Any = model.get_submodule(name)
            weight = rows(module).detach()
        except (AttributeError, RuntimeError):  # the module was exchanged
            return False
        if weight.is_meta or weight.ndim != 2 or weight.dtype != values.dtype or weight.shape[1] != values.shape[1]:
            return False
        if len(index) and index[-1] >= len(weight):
            return False
        mark = marks.get(name)
        if mark is not None and _digest(module, mark.index) != mark.sha256:
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
