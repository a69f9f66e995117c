"""How the base of a finished edit is loaded: odd settings, damaged files, code of others."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import pytest
from conftest import make_llama, make_tokenizer
from edits import thing_of

from kne_easyedit import cli
from kne_easyedit.editing.kne_edit import KNEEdit

PROMPT = "The capital of France is"


def kne(*arguments: str) -> int:
    return cli.main([*arguments])


@pytest.fixture(name="tiny")
def tiny_fixture(tmp_path, monkeypatch):
    """A folder with a tiny model and an edit of it."""
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("tiny-model")
    make_tokenizer().save_pretrained("tiny-model")
    settings = {"model_name": str(tmp_path / "tiny-model")}
    replace(thing_of(make_llama()), hparams=settings).save("rome")
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["device=gpu"], "device: 'gpu' must be a GPU's number"),
        (["device=null"], "device: None"),
        (["device=cuda:x"], "device: 'cuda:x'"),
        (["bf16=flase"], "bf16: 'flase' is a str, expected bool"),
        (["max_memory=5", "model_parallel=true"], "max_memory: 5"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_odd_settings_are_named(capsys, settings, message):
    assert kne("ask", "rome", PROMPT, "--set", *settings) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and "--model" not in error


@pytest.mark.usefixtures("tiny")
def test_gpus_that_json_has_made_texts_are_numbers_again(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "kne_easyedit.models.loading.load_model", lambda its: seen.append(its) or (make_llama(), make_tokenizer())
    )
    edit = KNEEdit.load("rome")
    placed = {**edit.hparams, "model_parallel": True, "max_memory": {"0": "20GiB", "cpu": "60GiB"}}
    replace(edit, hparams=placed).save(tmp_path / "spread")
    assert kne("ask", str(tmp_path / "spread"), PROMPT, "--tokens", "1") == 0
    assert seen[0].max_memory == {0: "20GiB", "cpu": "60GiB"}


@pytest.mark.parametrize(
    ("file", "content"),
    [("model.safetensors", b"\x08"), ("tokenizer.json", b"{}"), ("config.json", b"[]")],
)
def test_a_damaged_model_is_one_line(tiny, tmp_path, capsys, file, content):
    shutil.copytree(tiny / "tiny-model", tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_bytes(content)
    assert kne("ask", "rome", PROMPT, "--model", str(tmp_path / "damaged")) == 1
    assert f"model_name: '{tmp_path / 'damaged'}' cannot be loaded: " in capsys.readouterr().err


def test_code_beside_a_model_is_neither_run_nor_offered(tiny, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny / "tiny-model", tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    (tmp_path / "foreign" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    asked = io.StringIO("y\n")
    monkeypatch.setattr("sys.stdin", asked)
    assert kne("ask", "rome", PROMPT, "--model", str(tmp_path / "foreign")) == 1
    assert "cannot be loaded" in capsys.readouterr().err
    assert asked.tell() == 0 and not (tmp_path / "ran").exists()
