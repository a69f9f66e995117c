"""Which facts a loaded model was edited with before, so that the next edit can spare them (`spare_edited`).

EasyEdit's editors write weights back by themselves, so what was noted is checked against the weights before it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kne_easyedit._util.tensor_files import bytes_of
from kne_easyedit.editing.lineage import edited
from kne_easyedit.editing.row_edit import RowEdit
from kne_easyedit.facts.encoding import natural
from kne_easyedit.models.weights import weight_of

Request = Mapping[str, Any]
Rows = Mapping[str, tuple[int, ...]]
"""Module name -> row numbers."""


@dataclass(frozen=True)
class _Written:
    requests: tuple[Request, ...]
    rows: Rows
    digests: Mapping[str, Tensor]
    """Module name -> of what each of these rows held when the edit was written."""


_WRITTEN: WeakKeyDictionary[nn.Module, tuple[_Written, ...]] = WeakKeyDictionary()


def noting(model: nn.Module, requests: Sequence[Request], edit: RowEdit) -> Callable[[], None]:
    """What is to be called as soon as ``edit`` of ``requests`` has been written: it notes that ``model`` has it.

    Called before it is written, for edits that were taken back until then can be told now, and are forgotten. An edit
    that changes nothing is not noted: whether it was taken back could not be seen.
    """
    before = _still_there(model)

    def note() -> None:
        if not any(delta.any() for _, delta in edit.deltas.values()):
            return
        rows: Rows = {name: chosen for name, (chosen, _) in edit.deltas.items()}
        if before and before[-1].rows == rows:
            rows = before[-1].rows  # one ensemble for all edits: its numbers are kept once
        kept = tuple({name: request.get(name) for name in ("prompt", "target_new", "subject")} for request in requests)
        _WRITTEN[model] = (*before, _Written(kept, rows, _digests(model, rows)))

    return note


def earlier_requests(model: nn.Module, requests: Sequence[Request] = ()) -> list[Request]:
    """The facts that ``model`` was edited with and still has, the last one first; of a prompt its last answer.

    Args:
        model: Any model. Edits that were taken back since are left out, whichever they are.
        requests: What is edited now; facts with one of their prompts are left out. Blanks at the end of a prompt make
            no other one, as the model does not read them.
    """
    found = [request for note in _still_there(model) for request in note.requests]
    # Edits of a store are added up and rounded anew, so that no note is true of them; they are known by themselves.
    for known in edited(model).edits:
        found += getattr(known.resolve(), "requests", ())
    now = {natural(request["prompt"]) for request in requests}
    last = {natural(request["prompt"]): request for request in found}
    prompts = dict.fromkeys(natural(request["prompt"]) for request in reversed(found))
    return [last[prompt] for prompt in prompts if prompt not in now]


def inherit_notes(copy: nn.Module, model: nn.Module) -> None:
    """Notes that ``copy``, which was copied from ``model``, has the same facts."""
    if model in _WRITTEN:
        _WRITTEN[copy] = _WRITTEN[model]


def _still_there(model: nn.Module) -> tuple[_Written, ...]:
    """The notes that are true of the weights: each of an edit's rows holds what it wrote, or what one after it did."""
    found: list[_Written] = []
    covered: dict[str, set[int]] = {}
    for note in reversed(_WRITTEN.get(model, ())):
        if any(note.rows is one.rows for one in found) or _is_there(model, note, covered):
            found.append(note)
            for name, chosen in note.rows.items():
                covered.setdefault(name, set()).update(chosen)
    return tuple(reversed(found))


def _is_there(model: nn.Module, note: _Written, covered: Mapping[str, Container[int]]) -> bool:
    open_places = {
        name: [place for place, row in enumerate(chosen) if row not in covered.get(name, ())]
        for name, chosen in note.rows.items()
    }
    rows = {name: tuple(note.rows[name][place] for place in places) for name, places in open_places.items() if places}
    try:
        now = _digests(model, rows)
    except (ValueError, AttributeError, RuntimeError, IndexError):  # a module was exchanged
        return False
    return all(torch.equal(now[name], note.digests[name][open_places[name]]) for name in rows)


def _digests(model: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """Module name -> of each row 64 bits of a digest of its values, ``(n,)``."""
    return {name: _row_digests(weight_of(model, name)[torch.tensor(chosen)]) for name, chosen in rows.items()}


def _row_digests(values: Tensor) -> Tensor:
    digests = (hashlib.blake2b(bytes_of(row), digest_size=8).digest() for row in values.cpu())
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.long)
