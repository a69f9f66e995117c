"""A folder of edits with an order and a switch for each.

``store.json`` lists them; ``edits/ID`` holds one each. The list is replaced in one step, after an edit's folder is
there and before it is removed: a store that is killed at any moment is in the state before or after.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from kne_easyedit._util.files import exclusive_lock
from kne_easyedit._util.messages import require_one_of, shorten
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.editing.lineage import edited
from kne_easyedit.editing.row_edit import Answer
from kne_easyedit.editing.row_training import measured_answers
from kne_easyedit.edits.listing import LIST_FILE, Content, Listed, checked_id, read_list, write_list
from kne_easyedit.edits.places import discard, keep_whole, lies_at
from kne_easyedit.edits.sizes import shared_counts
from kne_easyedit.edits.stack import EditStack
from kne_easyedit.models.base import Base, base_of
from kne_easyedit.models.targets import is_linear

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
    files are never touched. Several processes may use a store, except on Windows, where nothing keeps two from
    changing it at once; each change is atomic.

    Args:
        folder: The store; it may not exist yet.

    Raises:
        ValueError: The folder is something else, or its list is damaged or of a later version.
        OSError: It cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        self._loaded: dict[tuple[str, str], KNEEdit] = {}
        if self.folder.exists() and not (self.folder / LIST_FILE).exists():
            found = [p.name for p in self.folder.iterdir()]
            odd = [name for name in found if name != EDITS_FOLDER and not name.startswith(".")]
            if odd and LIST_FILE not in found:  # another process may have made it since
                raise ValueError(f"store: {self.folder} is no store of edits (no {LIST_FILE}, but {odd[0]})")
        read_list(self.folder)

    def list(self) -> tuple[Entry, ...]:
        """All edits, in their order."""
        return _entries(read_list(self.folder).edits)

    def add(self, edit: KNEEdit, name: str | None = None) -> str:
        """Stores an edit, switched on, after all others.

        Args:
            edit: The edit.
            name: Its id: letters, digits, ``_``, ``-`` and ``.``; None: the start of its digest.

        Returns:
            Its id. An edit that the store has stays where it is, is switched on, and is whole again if it was damaged.

        Raises:
            ValueError: The name cannot be used or is taken, also by a folder that is not in the list, or the edit is of
                another base than the others. Nothing was changed.
            OSError: The store cannot be written.
        """
        new = checked_id(edit.digest[:12] if name is None else name)
        with self._changing(new=True) as content:
            for one in content.edits:
                if one.digest == edit.digest:
                    if name not in (None, one.id):
                        raise ValueError(f"store: {self.folder} has this edit already, as {one.id!r}")
                    keep_whole(self._place(one.id), edit)
                    self._replace(content, _switched(content.edits, one.id, True))
                    return one.id
            if taken := [one.id for one in content.edits if one.id.casefold() == new.casefold()]:
                raise ValueError(f"store: name: {taken[0]!r} is taken in {self.folder}; choose another name")
            self._require_base(content, edit.base)
            base = (content.base if content.edits else None) or edit.base  # an emptied store takes edits of any base
            base = replace(base, modules={**edit.base.modules, **base.modules})
            known = {one.digest for one in content.edits}
            if strange := [digest[:12] for digest in edit.trained_on if digest not in known]:
                logger.warning(
                    "store: %s was trained on top of edits that %s has not got (%s): its answers may differ",
                    new,
                    self.folder,
                    ", ".join(strange),
                )
            place = self._place(new)
            if not lies_at(place, edit):
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

    def set_active(self, ids: Iterable[str]) -> None:
        """Switches exactly these edits on and all others off, in one step; their order stays.

        Args:
            ids: The edits.

        Raises:
            ValueError: The store has not got one. Nothing was changed.
            OSError: The store cannot be written.
        """
        wanted = {*ids}
        with self._changing() as content:
            for id in sorted(wanted):
                require_one_of("id", id, [one.id for one in content.edits])
            self._replace(content, tuple(replace(one, on=one.id in wanted) for one in content.edits))

    def reorder(self, ids: Sequence[str]) -> tuple[Entry, ...]:
        """Changes the order.

        Args:
            ids: All ids of the store, each once, in their new order.

        Returns:
            The active edits that were trained on top of one that comes after them now.

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
            return self._replace(content, tuple(by_id[id] for id in ids))

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
            place = self._place(id)
            worse = self._replace(content, tuple(one for one in content.edits if one.id != id))
            discard(place)
            for key in [key for key in self._loaded if key[0] == id]:
                del self._loaded[key]
        return worse

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
        for entry, edit, answers, counts in zip(entries, edits, now, shared_counts(edits)):
            shared = {other.id: count for other, count in zip(entries, counts) if count and other.id != entry.id}
            found.append(Checked(entry, edit.answers, answers, shared))
        return tuple(found)

    def require_base(self, model: nn.Module) -> None:
        """Raises ValueError if edits of a model cannot be added, because those of the store are of another one."""
        content = read_list(self.folder)
        known = {name for name, module in model.named_modules() if is_linear(module)}
        names = [name for name in (content.base.modules if content.base else ()) if name in known]
        self._require_base(content, base_of(model, names, edited(model).originals))

    def _require_base(self, content: Content, base: Base) -> None:
        if content.edits and content.base is not None and (reason := base.conflict(content.base)):
            raise ValueError(
                f"store: the edit's base is {base.label}, that of {self.folder} is {content.base.label}: {reason}. "
                f"Keep edits of another base in another store"
            )

    def _stack(self, wanted: Callable[[Listed], bool]) -> EditStack:
        return EditStack(tuple(self._load(one) for one in read_list(self.folder).edits if wanted(one)))

    def _load(self, listed: Listed) -> KNEEdit:
        key = listed.id, listed.digest  # the same edit under another id is in another folder
        edit = self._loaded.get(key)
        if edit is None:
            try:
                edit = KNEEdit.load(self._place(listed.id))
            except (OSError, ValueError) as error:
                kind = OSError if isinstance(error, OSError) else ValueError
                raise kind(f"store: {listed.id} of {self.folder}: {error}; switch it off, or remove it") from error
            if edit.digest != listed.digest:
                raise ValueError(f"store: {listed.id} of {self.folder} is another edit than was added; remove it")
            self._loaded[key] = edit
        return edit

    def _place(self, id: str) -> Path:
        """The folder of an edit. Raises ValueError if it may be elsewhere than in the store."""
        place = self.folder / EDITS_FOLDER / id
        for path in (place.parent, place):
            if path.is_symlink():
                raise ValueError(
                    f"store: {path} is a symbolic link, and a store holds its own files alone; put a folder in its "
                    f"place, or delete the link"
                )
        return place

    def _switch(self, id: str, on: bool) -> tuple[Entry, ...]:
        with self._changing() as content:
            require_one_of("id", id, [one.id for one in content.edits])
            return self._replace(content, _switched(content.edits, id, on))

    def _replace(self, content: Content, edits: tuple[Listed, ...]) -> tuple[Entry, ...]:
        """Writes the list, while it is held, if it is another one.

        Returns:
            Active edits that lack more of what they were trained on than before; said in the log.
        """
        if edits == content.edits:
            return ()
        write_list(self.folder, Content(edits, content.base if edits else None))
        # By digests: the names of what is removed change. And of what was read under the lock: others may change it.
        lacked, ids = _missing(content.edits), {one.digest: one.id for one in content.edits}
        lacks = _missing(edits)
        more = {one.id: lacks[one.digest] - lacked[one.digest] for one in edits if one.on}
        for id, digests in more.items():
            if digests:
                logger.warning(
                    "store: %s was trained on top of %s, which is no longer active before it; EditStore.check(model) "
                    "(kne edits check) measures what it is worth now",
                    id,
                    ", ".join(sorted(ids.get(digest, digest[:12]) for digest in digests)),
                )
        return tuple(entry for entry in _entries(edits) if more.get(entry.id))

    @contextmanager
    def _changing(self, new: bool = False) -> Iterator[Content]:
        """The list as it is now, while no other process changes it; ``new``: the store may not exist yet."""
        if not new and not self.folder.exists():
            yield Content()  # what is refused makes no folder
            return
        with exclusive_lock(self.folder, wait=True):
            yield read_list(self.folder)


def _switched(edits: Sequence[Listed], id: str, on: bool) -> tuple[Listed, ...]:
    return tuple(replace(one, on=on) if one.id == id else one for one in edits)


def _missing(edits: Sequence[Listed]) -> dict[str, set[str]]:
    """Digest -> the digests on top of which the edit was trained, and that are not active before it."""
    active: set[str] = set()
    found = {}
    for one in edits:
        found[one.digest] = {*one.trained_on} - active
        if one.on:
            active.add(one.digest)
    return found


def _entries(edits: Sequence[Listed]) -> tuple[Entry, ...]:
    ids = {one.digest: one.id for one in edits}
    lacks = _missing(edits)
    found = []
    for order, one in enumerate(edits):
        names = {digest: ids.get(digest, digest[:12]) for digest in one.trained_on}
        missing = tuple(name for digest, name in names.items() if digest in lacks[one.digest])
        found.append(Entry(one.id, one.on, order, one.facts, one.digest, tuple(names.values()), missing))
    return tuple(found)
