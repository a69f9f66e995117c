"""A folder of edits with an order and a switch for each.

``store.json`` lists them; ``edits/ID`` holds one each. The list is replaced in one step, after an edit's folder is
there and before it is removed: a store that is killed at any moment is in the state before or after.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from kne_easyedit._util.files import exclusive_lock
from kne_easyedit._util.messages import require_one_of, shorten
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.editing.row_edit import Answer
from kne_easyedit.editing.row_training import measured_answers
from kne_easyedit.edits.listing import LIST_FILE, Content, Listed, checked_id, read_list, write_list
from kne_easyedit.edits.stack import EditStack

logger = logging.getLogger(__name__)

EDITS_FOLDER = "edits"


@dataclass(frozen=True)
class Entry:
    """An edit of a store."""

    id: str
    on: bool
    order: int
    """Its place, from 0: active edits are added in this order."""
    facts: tuple[str, ...]
    """Each as ``prompt -> new answer``."""
    digest: str
    trained_on: tuple[str, ...]
    """The edits on top of which it was trained: their ids, or the start of their digests if the store has not got them.
    """
    missing: tuple[str, ...]
    """Those of them that are not active before it: its answers may have changed (`EditStore.check`)."""


@dataclass(frozen=True)
class Checked:
    """What an active edit of a store is worth now."""

    entry: Entry
    trained: tuple[Answer, ...]
    """The answers after training."""
    now: tuple[Answer, ...]
    """The same with all active edits of the store."""
    shared: Mapping[str, int]
    """Id of another active edit -> how many rows both change."""

    @property
    def lost(self) -> tuple[Answer, ...]:
        """The answers as they are now of those facts that training reached, and that greedy decoding misses now."""
        return tuple(now for before, now in zip(self.trained, self.now) if before.greedy and not now.greedy)


class EditStore:
    """Edits of one base model in a folder, each switched on or off.

    The weights are a function of the base and the active edits alone: rows without edits plus the active deltas, added
    in order in the deltas' precision and rounded once. So taking one back is exact, after any history. The model's own
    files are never touched. Several processes may use a store; each change is atomic.

    Args:
        folder: The store; it may not exist yet.

    Raises:
        ValueError: The folder is something else, or its list is damaged or of a later version.
        OSError: It cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        self._loaded: dict[str, KNEEdit] = {}
        if self.folder.exists() and not (self.folder / LIST_FILE).exists():
            odd = [p.name for p in self.folder.iterdir() if p.name != EDITS_FOLDER and not p.name.startswith(".")]
            if odd:
                raise ValueError(f"store: {self.folder} is no store of edits (no {LIST_FILE}, but {odd[0]})")
        read_list(self.folder)

    def list(self) -> tuple[Entry, ...]:
        """All edits, in their order."""
        listed = read_list(self.folder).edits
        ids = {one.digest: one.id for one in listed}
        active: set[str] = set()
        entries = []
        for order, one in enumerate(listed):
            names = {digest: ids.get(digest, digest[:12]) for digest in one.trained_on}
            missing = tuple(name for digest, name in names.items() if digest not in active)
            entries.append(Entry(one.id, one.on, order, one.facts, one.digest, tuple(names.values()), missing))
            if one.on:
                active.add(one.digest)
        return tuple(entries)

    def add(self, edit: KNEEdit, name: str | None = None) -> str:
        """Stores an edit, switched on, after all others.

        Args:
            edit: The edit.
            name: Its id: letters, digits, ``_``, ``-`` and ``.``; None: the start of its digest.

        Returns:
            Its id. An edit that the store has already stays as it is.

        Raises:
            ValueError: The name cannot be used or is taken, or the edit is of another base than the others. Nothing was
                changed.
            OSError: The store cannot be written.
        """
        with self._changing() as content:
            for one in content.edits:
                if one.digest == edit.digest:
                    if name not in (None, one.id):
                        raise ValueError(f"store: {self.folder} has this edit already, as {one.id!r}")
                    return one.id
            new = checked_id(edit.digest[:12] if name is None else name)
            if taken := [one.id for one in content.edits if one.id.casefold() == new.casefold()]:
                raise ValueError(f"store: name: {taken[0]!r} is taken in {self.folder}; choose another name")
            if content.base is not None and (reason := edit.base.conflict(content.base)):
                raise ValueError(
                    f"store: the edit was trained on {edit.base.label}, those of {self.folder} on "
                    f"{content.base.label}: {reason}. Keep edits of another base in another store"
                )
            base = content.base or edit.base
            base = replace(base, modules={**edit.base.modules, **base.modules})
            known = {one.digest for one in content.edits}
            if strange := [digest[:12] for digest in edit.trained_on if digest not in known]:
                logger.warning(
                    "store: %s was trained on top of edits that %s has not got (%s): its answers may differ",
                    new,
                    self.folder,
                    ", ".join(strange),
                )
            place = self.folder / EDITS_FOLDER / new
            if place.exists():  # of a process that was killed before it listed the edit
                shutil.rmtree(place)
            edit.save(place)
            listed = Listed(new, True, edit.digest, edit.facts, edit.trained_on)
            write_list(self.folder, Content((*content.edits, listed), base))
        return new

    def on(self, id: str) -> None:
        """Switches an edit on. Raises ValueError if the store has not got it."""
        self._switch(id, True)

    def off(self, id: str) -> tuple[Entry, ...]:
        """Switches an edit off.

        Args:
            id: The edit.

        Returns:
            The active edits that were trained on top of it: `check` measures what they are worth without it.

        Raises:
            ValueError: The store has not got it.
            OSError: The store cannot be written.
        """
        return self._switch(id, False)

    def reorder(self, ids: Sequence[str]) -> None:
        """Changes the order.

        Args:
            ids: All ids of the store, each once, in their new order.

        Raises:
            ValueError: They are not. Nothing was changed.
            OSError: The store cannot be written.
        """
        with self._changing() as content:
            by_id = {one.id: one for one in content.edits}
            for id in ids:
                require_one_of("id", id, by_id)
            if len(ids) != len(by_id) or len(set(ids)) != len(ids):
                raise ValueError(
                    f"store: ids: {shorten(list(ids))} must be all ids of the store, each once: {list(by_id)}"
                )
            write_list(self.folder, replace(content, edits=tuple(by_id[id] for id in ids)))

    def remove(self, id: str) -> tuple[Entry, ...]:
        """Removes an edit and its files.

        Args:
            id: The edit.

        Returns:
            The active edits that were trained on top of it.

        Raises:
            ValueError: The store has not got it.
            OSError: The store cannot be written.
        """
        with self._changing() as content:
            require_one_of("id", id, [one.id for one in content.edits])
            before = self.list()
            write_list(self.folder, replace(content, edits=tuple(one for one in content.edits if one.id != id)))
            shutil.rmtree(self.folder / EDITS_FOLDER / id, ignore_errors=True)  # what is left is not listed
        return self._worse(before)

    def edit(self, id: str) -> KNEEdit:
        """One edit, read and checked.

        Raises:
            ValueError: The store has not got it, or its files are damaged or another edit's.
            OSError: They are missing, or cannot be read.
        """
        found = {one.id: one for one in read_list(self.folder).edits}
        require_one_of("id", id, found)
        return self._load(found[id])

    def active(self) -> EditStack:
        """The edits that are on, in their order.

        Raises:
            ValueError: One is damaged; the message names it.
            OSError: One is missing or cannot be read.
        """
        return self._stack(lambda one: one.on)

    def without(self, id: str) -> EditStack:
        """The active edits but one.

        Args:
            id: The edit to leave out.

        Raises:
            ValueError: The store has not got it, or as `active`.
            OSError: As `active`.
        """
        require_one_of("id", id, [one.id for one in read_list(self.folder).edits])
        return self._stack(lambda one: one.on and one.id != id)

    def apply(self, model: nn.Module, *, force: bool = False) -> None:
        """Makes the weights the base plus the active edits, in place: `EditStack.apply`."""
        self.active().apply(model, force=force)

    def applied(self, model: nn.Module, *, force: bool = False) -> AbstractContextManager[nn.Module]:
        """Inside, the model has exactly the active edits: `EditStack.applied`."""
        return self.active().applied(model, force=force)

    def merge_into(
        self, model_folder: str | os.PathLike[str], out_folder: str | os.PathLike[str], *, force: bool = False
    ) -> None:
        """Writes a full model with the active edits merged: `EditStack.merge_into`."""
        self.active().merge_into(model_folder, out_folder, force=force)

    def check(self, model: nn.Module, *, force: bool = False) -> tuple[Checked, ...]:
        """Measures every active edit's answers with all active edits applied; the model is left as it is.

        Args:
            model: The base, with or without edits of the store.
            force: As for `apply`.

        Returns:
            One for each active edit, in their order.

        Raises:
            ValueError: As `apply`.
        """
        entries = [entry for entry in self.list() if entry.on]
        edits = [self.edit(entry.id) for entry in entries]
        with EditStack(tuple(edits)).applied(model, force=force):
            now = [measured_answers(model, [answer.fact for answer in edit.answers]) for edit in edits]
        found = []
        for entry, edit, answers in zip(entries, edits, now):
            pairs = [(other.id, edit.shared_rows(one)) for other, one in zip(entries, edits) if other.id != entry.id]
            found.append(Checked(entry, edit.answers, answers, {id: count for id, count in pairs if count}))
        return tuple(found)

    def _stack(self, wanted: Callable[[Listed], bool]) -> EditStack:
        return EditStack(tuple(self._load(one) for one in read_list(self.folder).edits if wanted(one)))

    def _load(self, listed: Listed) -> KNEEdit:
        edit = self._loaded.get(listed.digest)
        if edit is None:
            try:
                edit = KNEEdit.load(self.folder / EDITS_FOLDER / listed.id)
            except (OSError, ValueError) as error:
                kind = OSError if isinstance(error, OSError) else ValueError
                raise kind(f"store: {listed.id} of {self.folder}: {error}; switch it off, or remove it") from error
            if edit.digest != listed.digest:
                raise ValueError(f"store: {listed.id} of {self.folder} is another edit than was added; remove it")
            self._loaded[listed.digest] = edit
        return edit

    def _switch(self, id: str, on: bool) -> tuple[Entry, ...]:
        with self._changing() as content:
            require_one_of("id", id, [one.id for one in content.edits])
            before = self.list()
            edits = tuple(replace(one, on=on) if one.id == id else one for one in content.edits)
            if edits != content.edits:
                write_list(self.folder, replace(content, edits=edits))
        return self._worse(before)

    def _worse(self, before: Sequence[Entry]) -> tuple[Entry, ...]:
        """Active edits that lack more of what they were trained on than before; said in the log."""
        lacked = {entry.id: set(entry.missing) for entry in before}
        found = tuple(entry for entry in self.list() if entry.on and set(entry.missing) - lacked[entry.id])
        for entry in found:
            logger.warning(
                "store: %s was trained on top of %s, which is no longer active before it; EditStore.check(model) (kne "
                "edits check) measures what it is worth now",
                entry.id,
                ", ".join(sorted(set(entry.missing) - lacked[entry.id])),
            )
        return found

    @contextmanager
    def _changing(self) -> Iterator[Content]:
        """The list as it is now, while no other process changes it."""
        with exclusive_lock(self.folder, wait=True):
            yield read_list(self.folder)
