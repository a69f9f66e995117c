"""A store of edits: what it lists, what it refuses, what is worth less without what it was trained on."""

import json
import logging
import shutil

import pytest
from conftest import LLAMA_DOWN, fingerprint, make_llama, tiny_hparams, weights
from edits import MANY, REQUESTS, ensemble_of, thing_of

from kne_easyedit.editing.edit import apply_kne_to_model, compute_edit
from kne_easyedit.edits import EditStore, listing
from kne_easyedit.edits import store as store_module
from kne_easyedit.edits.listing import LIST_FILE
from kne_easyedit.edits.sizes import shared_counts


@pytest.fixture(name="edits")
def edits_fixture(llama):
    return [thing_of(llama, seed, rows=(seed, 5, 9)) for seed in range(3)]


@pytest.fixture(name="store")
def store_fixture(tmp_path, edits):
    store = EditStore(tmp_path / "store")
    for name, edit in zip("abc", edits):
        store.add(edit, name)
    return store


def ids(store):
    return [entry.id for entry in store.list()]


def test_shared_rows_of_all_pairs_are_those_of_each_pair(llama):
    kinds = [((0, 2), (2, 3, 11)), ((2, 3), (3, 4)), ((1,), (0,)), ((0, 1, 2, 3), tuple(range(24)))]
    edits = [thing_of(llama, seed, layers=layers, rows=rows) for seed, (layers, rows) in enumerate(kinds)]
    counts = shared_counts(edits)
    assert counts == [[one.shared_rows(other) for other in edits] for one in edits]
    assert counts[0][1] == 1 and counts[1][2] == 0 and shared_counts([]) == []


class TestList:
    def test_a_new_store_is_empty(self, tmp_path, llama):
        before, store = weights(llama), EditStore(tmp_path / "store")
        assert store.list() == ()
        store.apply(llama)
        assert weights(llama) == before and not (tmp_path / "store").exists()

    def test_edits_are_on_in_their_order(self, store, edits):
        entries = store.list()
        assert [entry.id for entry in entries] == ["a", "b", "c"] and all(entry.on for entry in entries)
        assert [entry.order for entry in entries] == [0, 1, 2]
        assert [entry.facts for entry in entries] == [edit.facts for edit in edits]
        assert [store.edit(entry.id) for entry in entries] == edits

    def test_a_name_of_its_own(self, tmp_path, edits):
        assert EditStore(tmp_path / "s").add(edits[0]) == edits[0].digest[:12]

    def test_the_base_of_an_edited_model_is_that_without_edits(self, store, llama):
        store.apply(llama)
        store.require_base(llama)
        with pytest.raises(ValueError, match="base is"):
            store.require_base(make_llama(seed=3))

    def test_another_object_sees_the_same(self, store):
        store.off("b")
        store.reorder(["c", "a", "b"])
        assert EditStore(store.folder).list() == store.list()
        assert [(entry.id, entry.on) for entry in store.list()] == [("c", True), ("a", True), ("b", False)]

    def test_an_edit_twice_is_once(self, store, edits):
        assert store.add(edits[0]) == "a" and ids(store) == ["a", "b", "c"]
        with pytest.raises(ValueError, match="has this edit already, as 'a'"):
            store.add(edits[0], "other")

    def test_an_edit_that_is_off_is_on_when_it_is_added_again(self, store, edits):
        store.off("b")
        assert store.add(edits[1]) == "b" and [(entry.id, entry.on) for entry in store.list()][1] == ("b", True)

    def test_a_model_is_refused_before_anything_is_trained(self, store, llama):
        for id in "abc":
            store.off(id)
        store.require_base(llama)
        with pytest.raises(ValueError, match="another store"):
            store.require_base(make_llama(seed=11))

    def test_the_same_edit_under_another_name(self, store, edits, llama):
        store.apply(llama)
        before = weights(llama)
        store.remove("c")
        store.add(edits[2], "d")
        store.off("d")
        store.apply(llama)
        store.on("d")
        store.apply(llama)
        assert weights(llama) == before and ids(store) == ["a", "b", "d"]
        EditStore(store.folder).remove("d")  # another process's
        EditStore(store.folder).add(edits[2], "e")
        store.apply(make_llama())

    def test_an_emptied_store_takes_another_base(self, store, edits):
        for id in "abc":
            store.remove(id)
        store.add(thing_of(make_llama(seed=11)), "other")
        with pytest.raises(ValueError, match="another store"):  # converse
            store.add(edits[0])

    def test_removed_files_are_gone(self, store):
        store.remove("b")
        assert ids(store) == ["a", "c"]
        assert sorted(path.name for path in (store.folder / "edits").iterdir()) == ["a", "c"]


class TestState:
    def test_the_weights_are_those_of_the_active_edits(self, store, edits, llama):
        for wanted in ("abc", "ac", "", "b"):
            for id in "abc":
                (store.on if id in wanted else store.off)(id)
            store.apply(llama)
            fresh = make_llama()
            for id, edit in zip("abc", edits):
                if id in wanted:
                    edit.apply(fresh)
            assert weights(llama) == weights(fresh), wanted

    def test_exactly_these_in_one_step(self, store, monkeypatch):
        written = []
        monkeypatch.setattr(store_module, "write_list", lambda *given: written.append(1) or listing.write_list(*given))
        for wanted in (["c", "a"], [], iter("b")):
            kept = {*wanted} if isinstance(wanted, list) else {"b"}
            store.set_active(wanted)
            assert {entry.id for entry in store.list() if entry.on} == kept and ids(store) == ["a", "b", "c"]
        assert len(written) == 3
        with pytest.raises(ValueError, match="id: 'aa' must be one of"):
            store.set_active(["c", "aa"])
        assert [entry.on for entry in store.list()] == [False, True, False]

    def test_the_order_counts_in_the_last_bit(self, tmp_path):
        """Converse of a set: sums are rounded."""
        model = make_llama()
        store = EditStore(tmp_path / "s")
        for seed in range(6):
            store.add(thing_of(model, seed, scale=0.7), str(seed))
        store.apply(model)
        before = weights(model)
        store.reorder([str(seed) for seed in reversed(range(6))])
        store.apply(model)
        assert weights(model) != before
        store.reorder([str(seed) for seed in range(6)])
        store.apply(model)
        assert weights(model) == before

    def test_without_one(self, store, llama):
        before = weights(llama)
        with store.without("b").applied(llama):
            inside = weights(llama)
        assert weights(llama) == before != inside
        store.off("b")
        store.apply(llama)
        assert weights(llama) == inside

    def test_other_edits_are_taken_back(self, store, llama):
        thing_of(llama, 77).apply(llama)
        store.apply(llama)
        fresh = make_llama()
        store.apply(fresh)
        assert weights(llama) == weights(fresh)

    def test_applied(self, store, llama):
        before = fingerprint(llama)
        with store.applied(llama):
            assert weights(llama) != before["weights"]
        assert fingerprint(llama) == before


class TestTrainedOnOthers:
    @pytest.fixture
    def taught(self, tmp_path, llama, tokenizer):
        """A store with two edits, the second trained on top of the first."""
        store = EditStore(tmp_path / "taught")
        settings, ensemble = (
            tiny_hparams(num_steps=40),
            ensemble_of(LLAMA_DOWN, rows=MANY),
        )
        for id, one in zip(("first", "second"), (REQUESTS[0], REQUESTS[2])):
            store.add(compute_edit(llama, tokenizer, [one], settings, ensemble), id)
            store.apply(llama)
        return store

    def test_it_says_so(self, taught):
        first, second = taught.list()
        assert first.trained_on == first.missing == second.missing == ()
        assert second.trained_on == ("first",)

    def test_taking_back_what_it_was_trained_on(self, taught, llama, caplog):
        before = weights(llama)
        with_both = taught.check(llama)
        assert [one.lost for one in with_both] == [(), ()] and [one.entry.id for one in with_both] == [
            "first",
            "second",
        ]
        assert with_both[0].shared == {"second": 48} and with_both[1].shared == {"first": 48}
        for one in with_both:
            for now, trained in zip(one.now, one.trained):
                assert now.fact == trained.fact
        assert with_both[1].now[0].loss == pytest.approx(with_both[1].trained[0].loss, rel=1e-3)
        with caplog.at_level(logging.WARNING):
            (worse,) = taught.off("first")
        assert (worse.id, worse.missing) == ("second", ("first",))
        assert "second was trained on top of first" in caplog.text
        (alone,) = taught.check(llama)
        assert alone.entry.missing == ("first",) and alone.shared == {}
        assert alone.now[0].loss != pytest.approx(alone.trained[0].loss, rel=1e-3)
        assert weights(llama) == before, "checking leaves the model as it is"

    def test_taking_back_another_says_nothing(self, taught, caplog):
        """Converse."""
        assert taught.off("second") == () and taught.off("second") == () and caplog.text == ""
        taught.on("second")
        assert taught.remove("first")[0].missing == (taught.list()[0].missing)

    def test_an_order_in_which_it_comes_first(self, taught, caplog):
        (worse,) = taught.reorder(["second", "first"])
        assert worse == taught.list()[0] and worse.missing == ("first",)
        assert "second was trained on top of first" in caplog.text
        caplog.clear()
        assert taught.reorder(["first", "second"]) == () and caplog.text == ""

    def test_switched_off_at_once(self, taught, caplog):
        taught.set_active(["second"])
        assert "second was trained on top of first" in caplog.text

    def test_removing_what_was_off_says_nothing(self, taught, caplog):
        taught.off("first")
        caplog.clear()
        assert taught.remove("first") == () and caplog.text == ""

    def test_what_the_store_has_not_got(self, tmp_path, llama, caplog):
        store = EditStore(tmp_path / "s")
        with caplog.at_level(logging.WARNING):
            store.add(thing_of(llama, trained_on=("5" * 64,)), "a")
        assert "trained on top of edits that" in caplog.text and store.list()[0].missing == ("5" * 12,)

    def test_edits_of_a_sequence_are_kept(self, tmp_path, llama, tokenizer):
        """``apply_kne_to_model`` after another: every edit that it hands out has the same base."""
        store = EditStore(tmp_path / "s")
        for one in REQUESTS:
            settings, ensemble = tiny_hparams(num_steps=2), ensemble_of(LLAMA_DOWN)
            apply_kne_to_model(llama, tokenizer, [one], settings, ensemble=ensemble, on_trained=store.add)
        assert [len(entry.trained_on) for entry in store.list()] == [0, 1, 2]
        assert [entry.missing for entry in store.list()] == [(), (), ()]
        for entry in store.list():
            store.off(entry.id)
        store.apply(llama)
        assert weights(llama) == weights(make_llama())


class TestRefused:
    @pytest.fixture
    def refused(self, store):
        def check(action, message, error=ValueError):
            before = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
            with pytest.raises(error, match=message):
                action(store)
            assert {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()} == before

        return check

    @pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/x", ".x", "x.", "C:\\x", "a b", "a\n", "x" * 65, 7])
    def test_names_that_leave_the_folder(self, refused, llama, name):
        refused(lambda store: store.add(thing_of(llama, 9), name), "name: .* cannot name an edit")

    def test_names_that_differ_in_case_alone(self, refused, llama):
        refused(lambda store: store.add(thing_of(llama, 9), "A"), "name: 'a' is taken")

    def test_another_base(self, refused):
        refused(lambda store: store.add(thing_of(make_llama(seed=11), 9)), "weights of .* differ.*another store")

    @pytest.mark.parametrize("action", ["on", "off", "remove", "edit", "without"])
    def test_a_store_that_is_not_there_is_not_made(self, tmp_path, action):
        with pytest.raises(ValueError, match="id: 'a' must be one of"):
            getattr(EditStore(tmp_path / "none"), action)("a")
        with pytest.raises(ValueError, match="cannot name an edit"):
            EditStore(tmp_path / "none").add(None, "../x")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("linked", ["edits", "edits/b"])
    def test_links_out_of_the_store(self, tmp_path, store, llama, linked):
        outside = tmp_path / "outside"
        (store.folder / linked).rename(outside)
        (store.folder / linked).symlink_to(outside, target_is_directory=True)
        there = sorted(path.relative_to(outside) for path in outside.rglob("*"))
        fresh = EditStore(store.folder)
        acts = [lambda: fresh.remove("b"), lambda: fresh.edit("b"), lambda: fresh.apply(llama)]
        if linked == "edits":  # else the new one has a folder of its own
            acts.append(lambda: fresh.add(thing_of(llama, 9), "new"))
        for act in acts:
            with pytest.raises(ValueError, match="is a symbolic link"):
                act()
        assert sorted(path.relative_to(outside) for path in outside.rglob("*")) == there
        assert [entry.id for entry in fresh.list()] == ["a", "b", "c"]

    @pytest.mark.parametrize("action", ["on", "off", "remove", "edit", "without"])
    def test_ids_that_are_unknown(self, refused, action):
        refused(lambda store: getattr(store, action)("aa"), "id: 'aa' must be one of .*; did you mean 'a'")

    @pytest.mark.parametrize("order", [["a", "b"], ["a", "b", "c", "c"], ["a", "a", "b"]])
    def test_orders_that_are_none(self, refused, order):
        refused(lambda store: store.reorder(order), "must be all ids of the store, each once")

    def test_another_model(self, store):
        model = make_llama(seed=11)
        before = fingerprint(model)
        with pytest.raises(ValueError, match=r"weights of .* differ"):
            store.apply(model)
        assert fingerprint(model) == before

    def test_a_folder_that_is_no_store(self, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "letter.txt").write_text("Dear")
        with pytest.raises(ValueError, match=r"is no store of edits \(no store.json, but letter.txt\)"):
            EditStore(tmp_path / "other")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.update(format="x"), "'format' is not"),
            (lambda c: c.update(schema_version=2), "schema_version: 2, this version reads 1 to 1"),
            (lambda c: c.update(edits={}), "edits: {} is no entry"),
            (lambda c: c["edits"][0].update(id="../../etc"), "name: '../../etc' cannot name an edit"),
            (lambda c: c["edits"][0].update(on=1), "is no entry"),
            (lambda c: c["edits"][0].update(facts=[1]), "is no entry"),
            (lambda c: c["edits"].append(c["edits"][0]), "'a' occurs twice"),
            (lambda c: c["base"].update(modules=[]), "base: modules"),
        ],
    )
    def test_a_list_that_is_damaged(self, store, change, message):
        content = json.loads((store.folder / LIST_FILE).read_text())
        change(content)
        (store.folder / LIST_FILE).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            EditStore(store.folder)

    def test_a_list_that_is_too_long(self, store, monkeypatch):
        size = (store.folder / LIST_FILE).stat().st_size
        monkeypatch.setattr(listing, "LARGEST_LIST", size)
        assert len(store.list()) == 3
        monkeypatch.setattr(listing, "LARGEST_LIST", size - 1)
        with pytest.raises(ValueError, match=r"store.json cannot be used: more than"):
            EditStore(store.folder)

    def test_a_list_that_is_truncated(self, store):
        text = (store.folder / LIST_FILE).read_bytes()
        (store.folder / LIST_FILE).write_bytes(text[:100])
        with pytest.raises(ValueError, match=r"store.json cannot be used: no JSON"):
            EditStore(store.folder)

    def test_an_edit_that_is_damaged_can_be_switched_off(self, store, llama):
        path = store.folder / "edits" / "b" / "rows.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
        store, before = EditStore(store.folder), weights(llama)
        with pytest.raises(
            ValueError, match=r"store: b of .*no complete safetensors file.*switch it off, or remove it"
        ):
            store.apply(llama)
        assert weights(llama) == before
        store.off("b")
        store.apply(llama)
        store.remove("b")
        assert ids(store) == ["a", "c"]

    def test_an_edit_that_was_exchanged(self, store, llama):
        shutil.rmtree(store.folder / "edits" / "b")
        thing_of(llama, 50).save(store.folder / "edits" / "b")
        with pytest.raises(ValueError, match=r"b of .* is another edit than was added"):
            EditStore(store.folder).apply(llama)
