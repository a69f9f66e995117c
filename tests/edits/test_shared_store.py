"""A store that several use at once: nothing is lost, and nobody is told of an error that was none."""

import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from edits import thing_of

from kne_easyedit.edits import EditStore
from kne_easyedit.edits import store as store_module


@pytest.fixture
def store(tmp_path, llama):
    store = EditStore(tmp_path / "store")
    for seed, name in enumerate("abc"):
        store.add(thing_of(llama, seed, rows=(seed, 5, 9)), name)
    return store


def ids(store):
    return [entry.id for entry in store.list()]


def at_once(*acts):
    """Each has an object and a lock of its own, as two processes have."""
    errors = []

    def run(act):
        try:
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert errors == []


def test_two_at_once_lose_nothing(tmp_path, llama):
    edits = {f"e{seed}": thing_of(llama, seed) for seed in range(16)}

    def add(names):
        for name in names:
            EditStore(tmp_path / "s").add(edits[name], name)

    at_once(lambda: add([*edits][::2]), lambda: add([*edits][1::2]))
    assert sorted(ids(EditStore(tmp_path / "s"))) == sorted(edits)


def test_another_process_makes_the_store_while_one_looks_at_its_folder(tmp_path, llama, monkeypatch):
    folder, exists = tmp_path / "s", Path.exists
    folder.mkdir()

    def not_yet(path, **options):
        if path != folder / "store.json":
            return exists(path, **options)
        monkeypatch.undo()
        EditStore(folder).add(thing_of(llama), "a")
        return False

    monkeypatch.setattr(Path, "exists", not_yet)
    assert ids(EditStore(folder)) == ["a"]


def test_another_process_adds_while_one_is_switched(store, llama, monkeypatch):
    """After the list was written, and before what was said of it: the change is done, and nothing is raised."""
    other, real = EditStore(store.folder), store_module.exclusive_lock

    @contextmanager
    def then_another(*given, **options):
        with real(*given, **options):
            yield
        if threading.current_thread() is threading.main_thread():
            at_once(lambda: other.add(thing_of(llama, 9, trained_on=("5" * 64,)), "new"))

    monkeypatch.setattr(store_module, "exclusive_lock", then_another)
    assert store.off("b") == ()
    assert ids(store) == ["a", "b", "c", "new"]


def test_two_at_once_that_do_everything(tmp_path, llama):
    store = EditStore(tmp_path / "s")
    edits = [thing_of(llama, seed, trained_on=() if seed < 4 else ("5" * 64,)) for seed in range(8)]
    for seed in range(4):
        store.add(edits[seed], f"e{seed}")

    def come_and_go():
        mine = EditStore(tmp_path / "s")
        for seed in (4, 5, 6, 7):
            mine.add(edits[seed], f"e{seed}")
            mine.remove(f"e{seed}")

    def switch():
        mine = EditStore(tmp_path / "s")
        for _ in range(4):
            mine.off("e1")
            mine.on("e1")

    at_once(come_and_go, switch)
    assert [(entry.id, entry.on) for entry in store.list()] == [(f"e{seed}", True) for seed in range(4)]
    assert sorted(path.name for path in (store.folder / "edits").iterdir()) == ["e0", "e1", "e2", "e3"]
