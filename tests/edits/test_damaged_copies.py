"""An edit that is added to a store again is whole again, whatever the store's own copy has become."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import failing
from test_edit_store import edits_fixture, store_fixture  # noqa: F401  (fixtures)

from kne_easyedit.edits import EditStore
from kne_easyedit.edits.places import keep_whole


@pytest.mark.parametrize("damage", ["rows", "list of rows", "folder"])
def test_added_again_an_edit_is_whole_again(store, edits, llama, damage):
    place = store.folder / "edits" / "b"
    if damage == "folder":
        shutil.rmtree(place)
    elif damage == "rows":
        (place / "rows.safetensors").unlink()
    else:
        (place / "edit.json").write_text("{")
    store.off("b")
    assert EditStore(store.folder).add(edits[1]) == "b" and [entry.id for entry in store.list()] == ["a", "b", "c"]
    assert EditStore(store.folder).active().edits == tuple(edits)
    assert {path.name for path in place.parent.iterdir()} == {"a", "b", "c"}


@pytest.mark.parametrize("call", [1, 2])
def test_nothing_is_lost_when_writing_anew_is_interrupted(store, edits, monkeypatch, call):
    """Between the two renames, too: what is damaged is back, with all that is whole in it."""
    place = store.folder / "edits" / "b"
    (place / "edit.json").write_text("{")
    left = {path.name: path.read_bytes() for path in place.iterdir()}
    monkeypatch.setattr(Path, "rename", failing(Path.rename, call, KeyboardInterrupt()))
    edit = edits[1]
    monkeypatch.setattr(type(edit), "save", lambda self, folder: Path(folder).mkdir())
    with pytest.raises(KeyboardInterrupt):
        keep_whole(place, edit)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == left
    assert {path.name for path in place.parent.iterdir()} == {"a", "b", "c"}


def test_what_cannot_be_written_anew_is_left(store, edits):
    """The edit is the store's own, and its rows are gone."""
    own = store.edit("b")
    (store.folder / "edits" / "b" / "rows.safetensors").unlink()
    left = sorted(path.name for path in (store.folder / "edits").rglob("*"))
    with pytest.raises(OSError):
        EditStore(store.folder).add(own)
    assert sorted(path.name for path in (store.folder / "edits").rglob("*")) == left
