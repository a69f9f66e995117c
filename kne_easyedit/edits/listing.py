"""The list of a store: ``store.json``, checked when it is read, and what lies in the store without being listed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kne_easyedit._util.files import atomic_write, parse_versioned
from kne_easyedit._util.messages import shorten
from kne_easyedit.editing.edit_files import base_from_json
from kne_easyedit.editing.kne_edit import Base

FORMAT = "kne-edit-store"
SCHEMA_VERSION = 1
LIST_FILE = "store.json"
LARGEST_LIST = 2**28
"""Bytes of it at most."""
_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9_-])?")


@dataclass(frozen=True)
class Listed:
    """An edit as the file lists it."""

    id: str
    on: bool
    digest: str
    facts: tuple[str, ...]
    trained_on: tuple[str, ...]


@dataclass(frozen=True)
class Content:
    """The file."""

    edits: tuple[Listed, ...] = ()
    base: Base | None = None
    """Of all edits together: the first one that names a module decides."""


def read_list(folder: Path) -> Content:
    """The list of the store in ``folder``; nothing, if there is none yet.

    Raises:
        ValueError: It is something else, damaged or of a later version; the message names file, field and value.
        OSError: It cannot be read.
    """
    path = folder / LIST_FILE
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_LIST + 1)
    except FileNotFoundError:
        return Content()
    try:
        if len(text) > LARGEST_LIST:
            raise ValueError(f"more than {LARGEST_LIST} bytes, which no store has")
        return _content(parse_versioned(text, FORMAT, SCHEMA_VERSION))
    except ValueError as error:
        raise ValueError(f"store: {path} cannot be used: {error}") from error


def write_list(folder: Path, content: Content) -> None:
    """Replaces the list, in one step."""
    base = None if content.base is None else asdict(content.base)
    edits = [asdict(one) for one in content.edits]
    text = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "base": base, "edits": edits}
    atomic_write(folder / LIST_FILE, json.dumps(text, ensure_ascii=False, indent=1) + "\n")


def checked_id(value: object) -> str:
    """An id is the name of a folder in the store, on any system."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise ValueError(
            f"store: name: {shorten(value)} cannot name an edit; take 1 to 64 letters, digits, '_', '-' or '.', the "
            f"first a letter or digit"
        )
    return value


def _content(found: Mapping[str, Any]) -> Content:
    listed = found.get("edits")
    edits = [_listed(one) for one in (listed if isinstance(listed, list) else [listed])]
    for name in ("id", "digest"):
        names = [getattr(one, name).casefold() for one in edits]
        if len(set(names)) != len(names):
            raise ValueError(f"edits: {max(names, key=names.count)!r} occurs twice")
    return Content(tuple(edits), None if found.get("base") is None else base_from_json(found["base"]))


def _listed(one: Any) -> Listed:
    sound = isinstance(one, dict) and isinstance(one.get("on"), bool) and isinstance(one.get("digest"), str)
    for name in ("facts", "trained_on"):
        sound = sound and isinstance(one.get(name), list) and all(isinstance(text, str) for text in one[name])
    if not sound:
        raise ValueError(f"edits: {shorten(one)} is no entry (id, on, digest, facts, trained_on)")
    return Listed(checked_id(one.get("id")), one["on"], one["digest"], tuple(one["facts"]), tuple(one["trained_on"]))
