"""A model that memory does not hold, from the command line: the edit and the answers are those of the whole model."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_llama, make_tokenizer, tiny_hparams

from kne_easyedit.cli import main
from kne_easyedit.cli.edited import load_base, open_edits
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


def _folder_of_the_edit_is_not_used(edit: Path, caplog) -> bool:
    """Weights would be written to it: whoever made an edit must not choose it."""
    victim, own = edit.with_name("victim"), KNEEdit.load(edit)
    replace(own, hparams={**own.hparams, "offload_folder": str(victim)}).save(edit.with_name("other"))
    model, _ = load_base(open_edits(edit.with_name("other")), argparse.Namespace(model=None, set=[]))
    assert f"offload_folder: the edit was made with {victim}, which is not used here" in caplog.text
    return is_offloaded(model) and not victim.exists()


def test_a_fact_is_edited_and_asked(tmp_path, monkeypatch, capsys, caplog):
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
    assert _folder_of_the_edit_is_not_used(tmp_path / "spread", caplog)
    assert said["whole"] == said["spread"] and any("Rome" in line for line in said["spread"])
    assert KNEEdit.load("whole") == KNEEdit.load("spread")
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in Path("tiny").iterdir()} == files
