"""Which facts a loaded model was edited with before, so that the next edit can spare them (`spare_edited`).

EasyEdit's editors write weights back by themselves, so what was noted is checked against the weights before it is used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kne_easyedit._util.tensor_files import bytes_of
from kne_easyedit.editing.lineage import Known, edited
from kne_easyedit.editing.row_edit import RowEdit
from kne_easyedit.facts.encoding import SEPARATOR, Fact, Tokenizer, natural
from kne_easyedit.localization.data import encode_facts
from kne_easyedit.localization.settings import ReadSettings
from kne_easyedit.models.weights import weight_of

logger = logging.getLogger(__name__)

Request = Mapping[str, Any]
Rows = Mapping[str, tuple[int, ...]]
"""Module name -> row numbers."""


class _Form(NamedTuple):
    """How a fact was read when it was edited: the settings of `encode_facts`."""

    use_chat_template: bool
    separator: str


@dataclass(frozen=True)
class _Written:
    requests: tuple[Request, ...]
    form: _Form
    rows: Rows
    digests: Mapping[str, Tensor]
    """Module name -> of what each of these rows held when the edit was written, or when others were last set."""
    edit: str | None
    """Digest of the edit, if it is one that can be taken back by itself (`KNEEdit`)."""


Notes = tuple[_Written, ...]

_WRITTEN: WeakKeyDictionary[nn.Module, Notes] = WeakKeyDictionary()


def noting(model: nn.Module, requests: Sequence[Request], edit: RowEdit, hparams: ReadSettings) -> Callable[[], None]:
    """What is to be called as soon as ``edit`` of ``requests`` has been written: it notes that ``model`` has it.

    Called before it is written, for edits that were taken back until then can be told now, and are forgotten. An edit
    that changes nothing is not noted: whether it was taken back could not be seen. Edits that were applied by
    themselves (`set_edits`) are noted, too: beneath one that was not they are not known any more.
    """
    before = still_there(model)
    noted = {note.edit for note in before}
    applied = [known.resolve() for known in edited(model).edits if known.digest not in noted and _requests_of(known)]

    def note() -> None:
        if not any(delta.any() for _, delta in edit.deltas.values()):
            return
        rows: Rows = {name: chosen for name, (chosen, _) in edit.deltas.items()}
        if before and before[-1].rows == rows:
            rows = before[-1].rows  # one ensemble for all edits: its numbers are kept once
        beneath = [
            _Written(_kept(one.requests), _form_of(one), one.rows, _digests(model, one.rows), one.digest)
            for one in applied
        ]
        form = _Form(hparams.use_chat_template, hparams.separator)
        written = _Written(_kept(requests), form, rows, _digests(model, rows), getattr(edit, "digest", None))
        _WRITTEN[model] = (*before, *beneath, written)

    return note


def _kept(requests: Sequence[Request]) -> tuple[Request, ...]:
    return tuple({name: request.get(name) for name in ("prompt", "target_new", "subject")} for request in requests)


def _requests_of(known: Known) -> Sequence[Request]:
    return getattr(known.resolve(), "requests", ())


def _form_of(edit: Any) -> _Form:
    settings = getattr(edit, "hparams", {})
    return _Form(settings.get("use_chat_template", False), settings.get("separator", SEPARATOR))


def earlier_requests(model: nn.Module, requests: Sequence[Request] = ()) -> list[Request]:
    """The facts that ``model`` was edited with and still has, the last one first; of a prompt its last answer.

    Args:
        model: Any model. Edits that were taken back since are left out, whichever they are.
        requests: What is edited now; facts with one of their prompts are left out. Blanks at the end of a prompt make
            no other one, as the model does not read them.
    """
    return [request for request, _ in _earlier(model, requests)]


def earlier_facts(model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Request] = ()) -> list[Fact]:
    """`earlier_requests` as facts, each with the separator and the template with which it was edited.

    One that cannot be encoded is left out; the log says so.
    """
    found: list[Fact] = []
    for request, form in _earlier(model, requests):
        try:
            found += encode_facts(model, tokenizer, [request], form)
        except ValueError as error:  # noqa: PERF203  (one that fails must not take the others along)
            logger.warning("spare_edited: an earlier fact is not spared: %s", error)
    return found


def _earlier(model: nn.Module, requests: Sequence[Request]) -> list[tuple[Request, _Form]]:
    there = still_there(model)
    found = [(request, note.form) for note in there for request in note.requests]
    # Edits of a store are added up and rounded anew; those that are in no note are known by themselves.
    noted = {note.edit for note in there}
    applied = [known for known in edited(model).edits if known.digest not in noted]
    found += [(one, _form_of(known.resolve())) for known in applied for one in _requests_of(known)]
    now = {natural(request["prompt"]) for request in requests}
    last = {natural(one[0]["prompt"]): one for one in found}
    prompts = dict.fromkeys(natural(request["prompt"]) for request, _ in reversed(found))
    return [last[prompt] for prompt in prompts if prompt not in now]


def renew_notes(model: nn.Module, there: Notes, applied: Container[str], lost: bool = False) -> None:
    """Notes anew what rows hold of edits that ``model`` still has, after `set_edits` has written other ones.

    Args:
        model: The model, as it is now.
        there: What was `still_there` before.
        applied: Digests of the edits that it has now: others that could be taken back by themselves have been.
        lost: The weights were taken as they were for those without edits: nothing was taken back, and it cannot be.
    """
    renewed = []
    for note in there:
        if note.edit is None or note.edit in applied or lost:
            edit = note.edit if note.edit in applied else None
            renewed.append(replace(note, digests=_digests(model, note.rows), edit=edit))
    put_notes_back(model, tuple(renewed))


def kept_notes(model: nn.Module) -> Notes:
    """What is noted, for `put_notes_back`."""
    return _WRITTEN.get(model, ())


def put_notes_back(model: nn.Module, notes: Notes, written: bool = False) -> None:
    """Notes what was noted before, when the weights are put back.

    With ``written`` also what was noted since of edits that were written meanwhile: they may be in other rows.
    """
    if written:
        known = {id(note.requests) for note in notes}
        notes = (*notes, *(note for note in kept_notes(model) if note.edit is None and id(note.requests) not in known))
    if notes or model in _WRITTEN:
        _WRITTEN[model] = notes


def inherit_notes(copy: nn.Module, model: nn.Module) -> None:
    """Notes that ``copy``, which was copied from ``model``, has the same facts."""
    if model in _WRITTEN:
        _WRITTEN[copy] = _WRITTEN[model]


def still_there(model: nn.Module) -> Notes:
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
