"""Edits of 8-bit and 4-bit bases from the command line: trained, asked, shown, saved as an adapter, never merged."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import make_llama, make_tokenizer, tiny_hparams

from kne_easyedit.cli import main
from kne_easyedit.editing.kne_edit import KNEEdit

pytestmark = [
    pytest.mark.easyedit,
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
]
PROMPT = "The capital of France is"
FACT = ("--prompt", PROMPT, "--target", "Rome", "--neighbours", "0")


def kne(*arguments: str) -> int:
    return main(list(arguments))


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained("tiny")  # bitsandbytes packs 32 rows at a time
    make_tokenizer().save_pretrained("tiny")
    settings = tiny_hparams(model_name=str(tmp_path / "tiny"), p=0.5).to_dict()
    Path("kne.yaml").write_text(yaml.safe_dump(settings))


def answers(out: str) -> list[str]:
    """What the model says before and after."""
    return [cell.strip() for cell in re.findall(r"^ *\|(.*)\|(.*)$", out, re.MULTILINE)[1]]


@pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_from_the_fact_to_the_adapter(bits, capsys):
    assert kne("edit", *FACT, "--hparams", "kne.yaml", "--load-in", bits, "--out", "edit") == 0
    out = capsys.readouterr().out
    before, after = re.search(r"P\(Rome\) *\| ([\d.]+)% *\| ([\d.]+)%", out).groups()
    assert float(before) < 50 < float(after)
    assert "The base is quantised: the edit is kept beside it" in out
    edit = KNEEdit.load("edit")
    assert edit.hparams["load_in"] == bits and edit.answers[0].greedy
    assert {module.dtype for module in edit.base.modules.values()} == {"uint8" if bits == "4bit" else "int8"}

    assert kne("ask", "edit", PROMPT, "--tokens", "2") == 0  # loaded as it was made
    was, now = answers(capsys.readouterr().out)
    assert now.startswith("Rome") and not was.startswith("Rome")
    assert kne("show", "edit") == 0
    assert "in all" in capsys.readouterr().out
    assert kne("adapter", "edit", "--out", "adapter", "--max-rank", "16") == 0
    assert json.loads(Path("adapter/adapter_config.json").read_text())["r"] == 16

    assert kne("merge", "edit", "tiny", "--out", "merged") == 1
    assert "was trained on quantised weights" in capsys.readouterr().err and not Path("merged").exists()
    assert kne("ask", "edit", PROMPT, "--set", "load_in=null") == 1  # over other weights than it was trained on
    assert "was trained on" in capsys.readouterr().err


def test_no_edit_on_top_of_others(capsys):
    assert kne("edit", *FACT, "--hparams", "kne.yaml", "--load-in", "4bit", "--store", "store") == 1
    error = capsys.readouterr().err
    assert "--store: nothing can be added to a quantised base" in error and len(error.splitlines()) == 1
    assert not Path("store").exists()


def test_an_unquantised_base_is_edited_in_place(capsys):
    """Converse: and its edit is not taken for one of the quantised base."""
    assert kne("edit", *FACT, "--hparams", "kne.yaml", "--out", "edit") == 0
    assert "quantised" not in capsys.readouterr().out
    assert kne("ask", "edit", PROMPT, "--set", "load_in=4bit") == 1
    assert "was trained on" in capsys.readouterr().err
