"""An edit in a folder: what is written comes back, and whatever is not that is refused."""

import hashlib
import json
import pickle
import shutil
import struct
from copy import deepcopy

import pytest
import torch
from conftest import GPT2_DOWN, LLAMA_DOWN, fingerprint, make_gpt2, make_llama, tiny_hparams, weights
from crashes import killed_at, killed_in_write
from edits import REQUEST, ensemble_of, thing_of
from safetensors.torch import load_file, save_file

from kne_easyedit._util.tensor_files import texts
from kne_easyedit.editing import edit_files
from kne_easyedit.editing.edit import compute_edit
from kne_easyedit.editing.edit_files import JSON_FILE, ROWS_FILE
from kne_easyedit.editing.kne_edit import KNEEdit

DOWN = LLAMA_DOWN.format(0)


@pytest.fixture
def saved(tmp_path, llama):
    thing_of(llama).save(tmp_path / "edit")
    return tmp_path / "edit"


class TestRoundTrip:
    @pytest.mark.parametrize(("make", "template"), [(make_llama, LLAMA_DOWN), (make_gpt2, GPT2_DOWN)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_a_reloaded_edit_writes_the_same_bits(self, tmp_path, make, template, dtype):
        model, other = make(dtype), make(dtype)
        edit = thing_of(model, template=template)
        edit.save(tmp_path / "edit")
        loaded = KNEEdit.load(tmp_path / "edit")
        assert loaded == edit
        edit.apply(model)
        loaded.apply(other)
        assert weights(other) == weights(model)
        edit.take_back(other)
        assert weights(other) == weights(make(dtype))

    def test_half_a_character_in_a_field_that_is_not_read(self, tmp_path, llama, tokenizer):
        """A file of results of others may have it; the edit is trained by then."""
        asked = {**REQUEST, "ground_truth": "Paris \ud83d", "note": "caf\u00e9"}
        edit = compute_edit(llama, tokenizer, [asked], tiny_hparams(num_steps=1), ensemble_of(LLAMA_DOWN))
        edit.save(tmp_path / "edit")
        assert KNEEdit.load(tmp_path / "edit").requests == edit.requests == (asked,)

    def test_every_field_comes_back(self, tmp_path, llama, tokenizer):
        hparams = tiny_hparams(num_steps=2)
        asked = {**REQUEST, "locality": {"other": [{"prompt": "The", "ground_truth": ("a", 1.5)}]}}
        edit = compute_edit(llama, tokenizer, [asked], hparams, ensemble_of(LLAMA_DOWN))
        edit.save(tmp_path / "edit")
        loaded = KNEEdit.load(tmp_path / "edit")
        for name in (
            "losses",
            "answers",
            "requests",
            "base",
            "scaling",
            "ensemble",
            "hparams",
            "versions",
            "trained_on",
        ):
            assert getattr(loaded, name) == getattr(edit, name), name
        assert {n: rows for n, (rows, _) in loaded.deltas.items()} == {n: rows for n, (rows, _) in edit.deltas.items()}
        assert loaded.digest == edit.digest

    def test_secrets_are_not_written(self, tmp_path, llama, tokenizer):
        hparams = tiny_hparams(num_steps=1)
        hparams.api_key = "sk-secret"
        compute_edit(llama, tokenizer, [REQUEST], hparams, ensemble_of(LLAMA_DOWN)).save(tmp_path / "edit")
        assert "sk-secret" not in (tmp_path / "edit" / JSON_FILE).read_text()

    def test_any_reader_of_safetensors_reads_the_rows(self, saved, llama):
        edit = thing_of(llama)
        found = load_file(saved / ROWS_FILE)
        assert found.keys() == edit.deltas.keys()
        assert all(torch.equal(found[name], delta) for name, (_, delta) in edit.deltas.items())

    def test_rows_are_not_kept_in_memory(self, saved):
        loaded = KNEEdit.load(saved)
        assert loaded.deltas[DOWN][1].data_ptr() != loaded.deltas[DOWN][1].data_ptr()
        assert deepcopy(loaded) == loaded

    def test_rows_are_read_once(self, saved, monkeypatch):
        read, real = [], edit_files.read_tensor
        monkeypatch.setattr(edit_files, "read_tensor", lambda *given: read.append(1) or real(*given))
        KNEEdit.load(saved)
        assert len(read) == 2  # modules

    def test_a_loaded_edit_is_saved_again(self, saved, tmp_path):
        KNEEdit.load(saved).save(tmp_path / "again")
        for name in (JSON_FILE, ROWS_FILE):
            assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()

    def test_an_older_minor_field_does_not_matter(self, saved):
        """Fields that a later version adds without another schema_version are left alone."""
        content = json.loads((saved / JSON_FILE).read_text())
        (saved / JSON_FILE).write_text(json.dumps({**content, "note": "of a later version"}))
        KNEEdit.load(saved)


class TestSaving:
    def test_a_folder_that_holds_something_is_kept(self, saved, llama):
        before = {path.name: path.read_bytes() for path in saved.iterdir()}
        with pytest.raises(FileExistsError, match="exists already; choose another folder"):
            thing_of(llama, 1).save(saved)
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before

    def test_another_process_is_faster(self, tmp_path, llama, monkeypatch):
        """What is lost is said to be lost."""
        one, two, real = thing_of(llama, 1), thing_of(llama, 2), edit_files.write_tensors
        folder = tmp_path / "edit"

        def then_another(*given):
            real(*given)
            monkeypatch.undo()
            one.save(folder)

        monkeypatch.setattr(edit_files, "write_tensors", then_another)
        with pytest.raises(FileExistsError, match="choose another folder"):
            two.save(folder)
        assert KNEEdit.load(folder) == one

    def test_an_empty_folder_is_filled(self, tmp_path, llama):
        (tmp_path / "edit").mkdir()
        thing_of(llama).save(tmp_path / "edit")
        KNEEdit.load(tmp_path / "edit")

    @pytest.mark.parametrize(("killed", "least"), [(killed_at, 5), (killed_in_write, 2)])
    def test_killed_at_any_moment_it_is_whole_or_not_there(self, tmp_path, llama, killed, least):
        edit, there, operation = thing_of(llama), False, 0
        while True:
            folder = tmp_path / f"{operation}" / "edit"
            with killed(operation) as died:
                edit.save(folder)
            there = folder.exists()
            if there:
                assert KNEEdit.load(folder) == edit
            if not died:
                break
            operation += 1
        assert there and operation >= least


def _changed(*path, value=None, drop=False):
    def change(folder):
        content = json.loads((folder / JSON_FILE).read_text())
        place = content
        for part in path[:-1]:
            place = place[part]
        if drop:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        (folder / JSON_FILE).write_text(json.dumps(content))

    return change


def _rows(change, keep=True):
    def rewrite(folder):
        found, said = load_file(folder / ROWS_FILE), texts(folder / ROWS_FILE)
        change(found)
        save_file(found, folder / ROWS_FILE, said if keep else None)

    return rewrite


def _not_finite(value):
    def change(folder):
        found = load_file(folder / ROWS_FILE)
        found[DOWN][1, 3] = value
        save_file(found, folder / ROWS_FILE)
        content = json.loads((folder / JSON_FILE).read_text())
        content["modules"][DOWN]["sha256"] = hashlib.sha256(found[DOWN].numpy().tobytes()).hexdigest()
        (folder / JSON_FILE).write_text(json.dumps(content))

    return change


def _cut(name, keep):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return change


def _write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


MODULES = ("modules", DOWN)
BAD = {
    "the folder is missing": (lambda folder: shutil.rmtree(folder), "does not exist"),
    "no rows": (lambda folder: (folder / ROWS_FILE).unlink(), "rows.safetensors is missing"),
    "no JSON": (lambda folder: (folder / JSON_FILE).unlink(), "edit.json is missing"),
    "JSON truncated": (_cut(JSON_FILE, 0.5), "edit.json cannot be used: no JSON"),
    "JSON empty": (_cut(JSON_FILE, 0), "no JSON"),
    "JSON of bytes": (_write(JSON_FILE, b"\xff\xfe\x00"), "no UTF-8"),
    "JSON nested": (_write(JSON_FILE, b"[" * 100_000), "no JSON"),
    "JSON of something else": (_write(JSON_FILE, b'{"format": "kne-ensemble-1"}'), "'format' is not 'kne-edit'"),
    "a list": (_write(JSON_FILE, b"[]"), "'format' is not 'kne-edit'"),
    "a pickle for JSON": (_write(JSON_FILE, pickle.dumps({"a": 1})), "no UTF-8|no JSON"),
    "a later version": (_changed("schema_version", value=2), "schema_version: 2, this version reads 1 to 1"),
    "no version": (_changed("schema_version", drop=True), "schema_version: None"),
    "a true version": (_changed("schema_version", value=True), "schema_version: True"),
    "rows truncated": (_cut(ROWS_FILE, 0.7), "no complete safetensors file"),
    "rows' header truncated": (_cut(ROWS_FILE, 0.01), "no complete safetensors file"),
    "rows empty": (_cut(ROWS_FILE, 0), "no complete safetensors file"),
    "a pickle for rows": (_write(ROWS_FILE, pickle.dumps([1] * 100)), "no complete safetensors file"),
    "a huge header": (_write(ROWS_FILE, struct.pack("<Q", 2**60) + b"{}"), "no complete safetensors file"),
    "a NaN": (_not_finite(float("nan")), "not finite"),
    "an infinity": (_not_finite(float("inf")), "not finite"),
    "another value": (_rows(lambda found: found[DOWN].add_(1e-3)), "is not what was written"),
    "a tensor more": (_rows(lambda found: found.update(x=torch.ones(1))), "holds 3 tensors, expected these 2"),
    "a tensor less": (_rows(lambda found: found.pop(DOWN)), "holds 1 tensors, expected these 2"),
    "a tensor of half precision": (
        _rows(lambda found: found.update({DOWN: found[DOWN].half()})),
        r"in F16 in rows.safetensors, expected \[3, 40\] in float32",
    ),
    "a tensor of integers": (_rows(lambda found: found.update({DOWN: found[DOWN].int()})), "in I32"),
    "a tensor of another shape": (_rows(lambda found: found.update({DOWN: found[DOWN][:2].clone()})), r"\[2, 40\]"),
    "rows beyond the module": (_changed(*MODULES, "rows", value=[2, 3, 24]), r"\[2, 24\] is not .* in \[0, 24\)"),
    "a list for a number type": (_changed(*MODULES, "dtype", value=[]), rf"{DOWN}: dtype: \[\] is not one of"),
    "a scaling that no number holds": (_changed(*MODULES, "scaling", value=10**400), "scaling: 1000.* is not a finite"),
    "a loss that no number holds": (_changed("losses", value=[10**400]), "losses: .* is not a list of finite numbers"),
    "negative rows": (_changed(*MODULES, "rows", value=[-1, 3, 11]), r"\[-1, 11\] is not ascending"),
    "rows twice": (_changed(*MODULES, "rows", value=[3, 3, 11]), "is not ascending, distinct"),
    "rows as texts": (_changed(*MODULES, "rows", value=["2", "3", "11"]), "is not a list of rows' numbers"),
    "rows as truths": (_changed(*MODULES, "rows", value=[False, True, 11]), "is not a list of rows' numbers"),
    "another name of the base": (_changed("base", "name", value="evil"), "base: its content is not what was written"),
    "another architecture": (_changed("base", "architecture", value="X"), "base: its content is not what was written"),
    "another setting": (
        _changed("hparams", "model_name", value="evil"),
        "hparams: its content is not what was written",
    ),
    "another scale": (_changed(*MODULES, "scaling", value=2.0), "modules: its content is not what was written"),
    "other versions": (_changed("versions", "torch", value="0"), "versions: its content is not what was written"),
    "rows without texts": (_rows(lambda found: None, keep=False), "kne_fields: None is not a mapping"),
    "other rows": (_changed(*MODULES, "rows", value=[2, 3, 12]), "its content is not what was written"),
    "a name that leaves the folder": (
        _changed("modules", value={"../../x": {}}),
        "modules: '../../x' is not a module's name",
    ),
    "an absolute name": (_changed("modules", value={"/x": {}}), "modules: '/x' is not a module's name"),
    "a module without a base": (_changed("base", "modules", DOWN, drop=True), "is not described in 'base'"),
    "a base of another shape": (_changed("base", "modules", DOWN, "shape", value=[24, 41]), "shape"),
    "a shape that is none": (_changed("base", "modules", DOWN, "shape", value="24"), "'24' is not two sizes"),
    "a number type that is none": (_changed(*MODULES, "dtype", value="int64"), "dtype: 'int64' is not one of"),
    "a digest that is none": (_changed(*MODULES, "sha256", value="0" * 63), "sha256"),
    "an infinite loss": (_changed("losses", value=[1.0, float("inf")]), "losses: .* is not a list of finite numbers"),
    "no losses": (_changed("losses", value=[]), "losses"),
    "another loss": (_changed("losses", value=[1.0, 0.0]), "its content is not what was written"),
    "another fact": (_changed("requests", value=[{"prompt": "x", "target_new": "y"}]), "is not what was written"),
    "an answer that is none": (
        _changed("requests", value=[{"prompt": "x", "target_new": ["Rome"]}]),
        r"requests.target_new: \['Rome'\] is not a text",
    ),
    "a request without a prompt": (_changed("requests", value=[{}]), "requests: {} is not a request with a prompt"),
    "requests that are none": (_changed("requests", value="x"), "requests: 'x' is not a list"),
    "answers that are none": (_changed("answers", value=[{"fact": {}}]), "answers: prompt"),
    "an ensemble that is none": (_changed("ensemble", value={"neurons": {}}), "'format' is missing"),
    "no settings": (_changed("hparams", drop=True), "hparams: None is not a mapping"),
    "modules that are none": (_changed("modules", value=[]), "modules: .* is not a mapping"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(saved, case):
    change, message = BAD[case]
    KNEEdit.load(saved)  # converse
    change(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        KNEEdit.load(saved)
    assert "edit: " in str(caught.value) and str(saved) in str(caught.value)


def test_a_file_that_changes_after_loading(saved, llama):
    """What is written is what was checked."""
    before, edit = fingerprint(llama), KNEEdit.load(saved)
    _rows(lambda found: found[LLAMA_DOWN.format(2)].add_(1e-3))(saved)
    with pytest.raises(ValueError, match="is not what was written"):
        edit.apply(llama)
    assert fingerprint(llama) == before
    shutil.rmtree(saved)
    with pytest.raises(OSError, match=ROWS_FILE.replace(".", r"\.")):
        edit.apply(llama)
    assert fingerprint(llama) == before


def test_nothing_but_the_two_files_is_read(saved, monkeypatch):
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(object()))
    for module in (pickle, torch):
        monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    KNEEdit.load(saved)
