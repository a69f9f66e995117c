"""An edit that was trained is kept: what would lose it is refused before the model is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer
from test_cli_edit import FACT, in_its_folder, kne, tiny_fixture  # noqa: F401  (fixtures)

from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.edits import EditStore


@pytest.mark.parametrize("place", [".", "empty"])
def test_an_empty_folder_is_filled(tiny, tmp_path, monkeypatch, place):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / ("empty" if place == "." else ""))
    command = ("edit", *FACT, "--subject", "France", "--hparams", str(tiny / "kne.yaml"), "--neighbours", "0")
    assert kne(*command, "--out", place) == 0
    assert KNEEdit.load(tmp_path / "empty") == KNEEdit.load(tiny / "rome")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"edit.json", "rows.safetensors"}


def test_where_nothing_can_be_written_is_said_before_the_model_is_loaded(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kne_easyedit.cli.common.os.access", lambda path, _: Path(path) != tmp_path)
    monkeypatch.setattr("kne_easyedit.models.loading.load_model", lambda _: pytest.fail("loaded"))
    assert kne("edit", *FACT, "--hparams", "kne.yaml", "--out", str(tmp_path / "new")) == 1
    assert f"--out: nothing can be written into {tmp_path}" in capsys.readouterr().err


def test_a_store_of_another_base_is_refused_before_anything_is_localised(tiny, tmp_path, monkeypatch, capsys):
    assert kne("edits", "add", str(tmp_path / "store"), "rome", "--name", "rome") == 0
    assert kne("edits", "off", str(tmp_path / "store"), "rome") == 0
    make_llama(seed=5).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    for name in ("on_top.find_ensemble", "store.EditStore.apply"):
        monkeypatch.setattr(f"kne_easyedit.edits.{name}", lambda *_: pytest.fail("too late"))
    command = ("edit", *FACT, "--hparams", "kne.yaml", "--model", str(tmp_path / "other"), "--neighbours", "0")
    assert kne(*command, "--store", str(tmp_path / "store")) == 1
    assert "Keep edits of another base in another store" in capsys.readouterr().err


def test_a_name_that_lies_there_unlisted_is_refused_before_the_model_is_loaded(tiny, tmp_path, monkeypatch, capsys):
    store = tmp_path / "store"
    assert kne("edits", "add", str(store), "rome", "--name", "rome") == 0
    (store / "store.json").unlink()
    monkeypatch.setattr("kne_easyedit.models.loading.load_model", lambda _: pytest.fail("loaded"))
    assert kne("edit", *FACT, "--hparams", "kne.yaml", "--store", str(store), "--name", "ROME") == 1
    advice = re.search(r"\((kne edits add .*?)\)", capsys.readouterr().err)[1]
    assert kne(*advice.split()[1:]) == 0 and [one.id for one in EditStore(store).list()] == ["rome"]


def test_an_edit_that_a_store_has_switched_off_is_on_when_it_is_made_again(tiny, tmp_path, capsys):
    command = ("edit", *FACT, "--hparams", "kne.yaml", "--neighbours", "0", "--store", str(tmp_path / "store"))
    assert kne(*command, "--name", "rome") == 0
    assert kne("edits", "off", str(tmp_path / "store"), "rome") == 0
    capsys.readouterr()
    assert kne(*command) == 0
    before, after = re.search(r"P\(Rome\) *\| ([\d.]+)% *\| ([\d.]+)%", capsys.readouterr().out).groups()
    assert float(before) < 50 < float(after)
