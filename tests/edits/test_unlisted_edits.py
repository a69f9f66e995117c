"""Edits that lie in a store without being listed: a lost list, a killed process. They may be the only copy."""

from __future__ import annotations

import pytest
from crashes import killed_at
from edits import thing_of

from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.edits import EditStore
from kne_easyedit.edits.listing import LIST_FILE


@pytest.fixture(name="edits")
def edits_fixture(llama):
    return [thing_of(llama, seed, rows=(seed, 5, 9)) for seed in range(3)]


@pytest.fixture(name="store")
def store_fixture(tmp_path, edits):
    store = EditStore(tmp_path / "store")
    for name, edit in zip("abc", edits):
        store.add(edit, name)
    return store


@pytest.mark.parametrize("name", ["a", "other", None])
def test_a_lost_list_is_made_again_from_the_edits_that_lie_there(store, edits, name):
    """What is added is read from the very folder where it is to lie."""
    (store.folder / LIST_FILE).unlink()
    again = EditStore(store.folder)
    found = again.add(KNEEdit.load(store.folder / "edits" / "a"), name)
    assert found == (name or edits[0].digest[:12])
    again.add(KNEEdit.load(store.folder / "edits" / "b"), "b")
    assert [again.edit(id) for id in (found, "b")] == edits[:2]
    assert all(dict(again.edit(id).deltas) for id in (found, "b"))  # the rows, too, can be read


def test_an_edit_that_is_not_in_the_list_is_not_overwritten(store, edits):
    (store.folder / LIST_FILE).unlink()
    again = EditStore(store.folder)
    with pytest.raises(ValueError, match=r"edits.b holds another edit, which is not in the list; add it"):
        again.add(edits[0], "b")
    (store.folder / "edits" / "c" / "edit.json").write_text("{")
    with pytest.raises(ValueError, match=r"edits.c is not in the list, and cannot be read .*choose another name"):
        again.add(edits[0], "c")
    (store.folder / "edits" / "c" / "edit.json").unlink()  # renamed, perhaps: its rows are there
    with pytest.raises(ValueError, match=r"edits.c is not in the list, and cannot be read"):
        again.add(edits[0], "c")
    assert KNEEdit.load(store.folder / "edits" / "b") == edits[1] and again.list() == ()
    assert again.add(edits[1], "b") == "b"  # as the message says


def test_a_removal_that_is_killed_leaves_nothing_under_a_name(store, edits):
    for operation in range(40):
        with killed_at(operation) as died:
            store.remove("c")
        if "c" not in [entry.id for entry in EditStore(store.folder).list()]:
            assert EditStore(store.folder).add(edits[2], "c") == "c"
        if not died:
            break
    assert not died and [entry.id for entry in store.list()] == ["a", "b", "c"]
