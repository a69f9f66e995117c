"""Any history of a store, crashes among it: the weights are those computed from the base and the active edits."""

import random
import shutil

import pytest
import torch
from conftest import LLAMA_DOWN, bits, make_llama, weights
from crashes import killed_at, killed_in_write
from edits import thing_of

from kne_easyedit._util import files
from kne_easyedit.edits import EditStore

EDITS, HISTORIES = 50, 1000
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def base():
    return make_llama(torch.bfloat16)


@pytest.fixture(scope="module")
def edits(base):
    """Many share rows, and each is small against a weight: the order and every rounding count."""
    draw = random.Random(1)
    found = {}
    for seed in range(EDITS):
        rows = tuple(sorted(draw.sample(range(24), draw.randint(1, 8))))
        layers = tuple(sorted(draw.sample(LAYERS, draw.randint(1, 2))))
        found[f"e{seed}"] = thing_of(base, seed, layers=layers, rows=rows, scale=0.1)
    return found


@pytest.fixture(scope="module")
def filled(tmp_path_factory, edits):
    """A store with all edits, without waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda _: None)
        store = EditStore(tmp_path_factory.mktemp("filled") / "store")
        for name, edit in edits.items():
            store.add(edit, name)
    return store.folder


@pytest.fixture
def folder(filled, tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda _: None)
    return shutil.copytree(filled, tmp_path / "store")


def from_scratch(base, edits, active):
    """Module -> bits of its weight with the active edits, without the package's help."""
    found = {}
    for layer in LAYERS:
        name = LLAMA_DOWN.format(layer)
        total = base.get_submodule(name).weight.detach().float()
        for one in active:
            if name in edits[one].deltas:
                rows, delta = edits[one].deltas[name]
                total[list(rows)] += delta
        found[f"{name}.weight"] = bits(total.bfloat16())
    return found


def state(store):
    return [(entry.id, entry.on) for entry in store.list()]


def change(draw, store, before):
    """A random change of a store, and the state after it."""
    id = draw.choice(before)[0]
    kind = draw.choice(("on", "off", "off", "reorder"))
    if kind == "reorder":
        order = [one for one, _ in before]
        order.remove(id)
        order.insert(draw.randrange(EDITS), id)
        return lambda: store.reorder(order), [(one, dict(before)[one]) for one in order]
    after = [(one, kind == "on" if one == id else on) for one, on in before]
    return lambda: getattr(store, kind)(id), after


def test_a_thousand_histories(base, edits, folder):
    draw, model, untouched = random.Random(2), make_llama(torch.bfloat16), weights(base)
    store, died_often, states = EditStore(folder), 0, set()
    now = state(store)

    def opened():
        """Another process's store. Nine times of ten it need not read the edits again, which takes most of the time."""
        other = EditStore(folder)
        if draw.random() < 0.9:
            other._loaded = store._loaded
        return other

    for history in range(HISTORIES):
        for _ in range(draw.randint(1, 3)):
            before = now
            act, now = change(draw, store, before)
            if draw.random() < 0.2:
                with killed_at(draw.randrange(8)) as died:
                    act()
                died_often += bool(died)
                store = opened()
                found = state(store)
                assert found in ([before, now] if died else [now])
                now = found
            else:
                act()
            if draw.random() < 0.1:
                store = opened()
            if draw.random() < 0.1:
                store.apply(model)
        if draw.random() < 0.05:
            model = make_llama(torch.bfloat16)
        store.apply(model)
        assert state(store) == now
        active = [id for id, on in now if on]
        assert weights(model) == {**untouched, **from_scratch(base, edits, active)}, history
        states.add(tuple(active))
    assert died_often > 100 and len(states) > HISTORIES / 2
    for id, on in state(store):
        if on:
            store.off(id)
    store.apply(model)
    assert weights(model) == untouched


ACTIONS = {
    "add": lambda store, edit: store.add(edit, "new"),
    "on": lambda store, edit: store.on("e1"),
    "off": lambda store, edit: store.off("e0"),
    "reorder": lambda store, edit: store.reorder(["e2", "e0", "e1"]),
    "remove": lambda store, edit: store.remove("e0"),
    "set_active": lambda store, edit: store.set_active(["e1", "e2"]),
}


@pytest.mark.parametrize(("killed", "least"), [(killed_at, 4), (killed_in_write, 1)])
@pytest.mark.parametrize("action", ACTIONS)
def test_killed_at_every_moment(tmp_path, base, edits, action, killed, least):
    """Before or after, never between; the edits can be read, and the change can be made then."""
    store = EditStore(tmp_path / "store")
    for name in ("e0", "e1", "e2"):
        store.add(edits[name], name)
    store.off("e1")
    new = thing_of(base, 99, layers=LAYERS)
    known = {**edits, "new": new}
    before = state(store)
    ACTIONS[action](EditStore(shutil.copytree(store.folder, tmp_path / "after")), new)
    after = state(EditStore(tmp_path / "after"))
    assert after != before
    seen, operation, died = set(), 0, [True]
    while died:
        folder = shutil.copytree(store.folder, tmp_path / f"{operation}")
        with killed(operation) as died:
            ACTIONS[action](EditStore(folder), new)
        survivor, model = EditStore(folder), make_llama(torch.bfloat16)
        found = state(survivor)
        assert found in (before, after)
        seen.add(found == after)
        survivor.apply(model)
        active = [id for id, on in found if on]
        assert {n: weights(model)[n] for n in from_scratch(base, known, active)} == from_scratch(base, known, active)
        if found == before:
            ACTIONS[action](survivor, new)
            assert state(survivor) == after
            survivor.apply(model)
        operation += 1
    assert seen == {False, True} and operation >= least
