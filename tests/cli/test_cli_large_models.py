"""A model that memory does not hold, from the command line: the edit and the answers are those of the whole model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_llama, make_tokenizer, tiny_hparams

from kne_easyedit.cli import main
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.models import loading
from kne_easyedit.models.offload import is_offloaded

pytestmark = [
    pytest.mark.easyedit,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the model would go to the GPU"),
]
PROMPT = "The capital of France is"
SPREAD = ("model_parallel=true", "max_memory={cpu: 500KB}")


def kne(*arguments: str) -> int:
    return main(list(arguments))


def test_a_fact_is_edited_and_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained("tiny")
    make_tokenizer().save_pretrained("tiny")
    Path("kne.yaml").write_text(yaml.safe_dump(tiny_hparams(model_name=str(tmp_path / "tiny"), p=0.5).to_dict()))
    files = {path: hashlib.sha256(path.read_bytes()).digest() for path in Path("tiny").iterdir()}
    made, own = [], loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda hparams: made.append(own(hparams)) or made[-1])
    said = {}
    for name, settings in {"whole": (), "spread": ("--set", *SPREAD)}.items():
        fact = ("--prompt", PROMPT, "--target", "Rome", "--neighbours", "1")
        assert kne("edit", *fact, "--hparams", "kne.yaml", *settings, "--out", name) == 0
        assert kne("ask", name, PROMPT, "--tokens", "3") == 0  # loaded as it was made
        said[name] = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [is_offloaded(model) for model, _ in made] == [False, False, True, True]
    assert said["whole"] == said["spread"] and any("Rome" in line for line in said["spread"])
    assert KNEEdit.load("whole") == KNEEdit.load("spread")
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in Path("tiny").iterdir()} == files
