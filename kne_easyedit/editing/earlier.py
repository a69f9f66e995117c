"""Which facts a loaded model was edited with before, so that the next edit can spare them (`spare_edited`).

EasyEdit's editors write weights back by themselves, so what was noted is checked against the weights before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kne_easyedit._util.tensor_files import values_digest
from kne_easyedit.editing.lineage import edited
from kne_easyedit.editing.row_edit import RowEdit
from kne_easyedit.models.weights import weight_of

Request = Mapping[str, Any]


@dataclass(frozen=True)
class _Written:
    requests: tuple[Request, ...]
    rows: Mapping[str, tuple[int, ...]]
    digests: Mapping[str, str]
    """Of what these rows held when the edit was written."""


_WRITTEN: WeakKeyDictionary[nn.Module, list[_Written]] = WeakKeyDictionary()


def note_written(model: nn.Module, requests: Sequence[Request], edit: RowEdit) -> None:
    """Notes that ``edit`` of ``requests`` has just been written into ``model``, after those that it has.

    An edit that changes nothing is not noted: whether it was taken back could not be seen.
    """
    if not any(delta.any() for _, delta in edit.deltas.values()):
        return
    notes = _WRITTEN.setdefault(model, [])
    rows: Mapping[str, tuple[int, ...]] = {name: chosen for name, (chosen, _) in edit.deltas.items()}
    if notes and notes[-1].rows == rows:
        rows = notes[-1].rows  # one ensemble for all edits: its numbers are kept once
    kept = tuple({name: request.get(name) for name in ("prompt", "target_new", "subject")} for request in requests)
    notes.append(_Written(kept, rows, _digests(model, rows)))


def earlier_requests(model: nn.Module, requests: Sequence[Request] = ()) -> list[Request]:
    """The facts that ``model`` was edited with and still has, the last one first; of a prompt its last answer.

    Args:
        model: Any model. Edits that were taken back since are forgotten.
        requests: What is edited now; facts with one of their prompts are left out.
    """
    notes = _WRITTEN.get(model, [])
    while notes and not _is_there(model, notes[-1]):
        notes.pop()
    found = [request for note in notes for request in note.requests]
    # Edits of a store are added up and rounded anew, so that no note is true of them; they are known by themselves.
    for known in edited(model).edits:
        found += getattr(known.resolve(), "requests", ())
    now = {request["prompt"] for request in requests}
    last = {request["prompt"]: request for request in found}
    prompts = dict.fromkeys(request["prompt"] for request in reversed(found))
    return [last[prompt] for prompt in prompts if prompt not in now]


def inherit_notes(copy: nn.Module, model: nn.Module) -> None:
    """Notes that ``copy``, which was copied from ``model``, has the same facts."""
    if model in _WRITTEN:
        _WRITTEN[copy] = list(_WRITTEN[model])


def _is_there(model: nn.Module, note: _Written) -> bool:
    try:
        return _digests(model, note.rows) == note.digests
    except (ValueError, AttributeError, RuntimeError, IndexError):  # a module was exchanged
        return False


def _digests(model: nn.Module, rows: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    return {name: values_digest(weight_of(model, name)[torch.tensor(chosen)]) for name, chosen in rows.items()}
