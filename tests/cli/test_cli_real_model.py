"""From the command line on the real model: edited, asked in a new process, served by PEFT alone, taken back exactly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import weights

from kne_easyedit import cli
from kne_easyedit.edits import EditStore
from kne_easyedit.models.loading import load_model

pytestmark = pytest.mark.model

FACT = "The capital of France is"
QUICK = ("--set", "localization_data=null", "attribution_steps=4", "--neighbours", "2")
PLAIN = """
import json, sys
sys.modules["kne_easyedit"] = None  # an import of it raises
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
tokens = tokenizer(prompt, return_tensors="pt")
ids = model.generate(**tokens, max_new_tokens=1, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print(json.dumps(tokenizer.decode(ids[0, tokens["input_ids"].shape[1] :])))
"""


def kne(*arguments: str) -> int:
    return cli.main([*arguments])


def said(*command: str) -> str:
    """What a new process prints."""
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, env=os.environ).stdout


def test_edit_ask_new_process_peft_off_and_the_base(real_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {path.name: path.stat().st_mtime_ns for path in real_folder.iterdir()}
    edit = ("--model", "smollm2-135m", "--prompt", FACT, "--target", "Rome", "--subject", "France", *QUICK)
    assert kne("edit", *edit, "--store", "store", "--name", "rome") == 0
    before, after = re.search(r"P\(Rome\) *\| ([\d.]+)% *\| ([\d.]+)%", capsys.readouterr().out).groups()
    assert float(before) < 1 and float(after) > 80
    assert kne("adapter", "store", "--out", "adapter") == 0
    capsys.readouterr()

    answer = said("-m", "kne_easyedit.cli", "ask", "store", FACT, "--tokens", "1")
    assert re.search(r"\| Paris *\| Rome$", answer.strip())
    assert json.loads(said("-c", PLAIN, str(real_folder), "adapter", FACT).splitlines()[-1]) == " Rome"

    model, _ = load_model(SimpleNamespace(model_name="smollm2-135m", device="cpu"))
    unedited = weights(model)
    EditStore("store").apply(model)
    assert weights(model) != unedited
    assert kne("edits", "off", "store", "rome") == 0
    EditStore("store").apply(model)
    assert weights(model) == unedited
    capsys.readouterr()
    assert kne("ask", "store", FACT, "--tokens", "1") == 0
    assert re.search(r"\| Paris *\| Paris$", capsys.readouterr().out.strip())
    assert {path.name: path.stat().st_mtime_ns for path in real_folder.iterdir()} == files
