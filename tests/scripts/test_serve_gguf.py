"""scripts/serve_gguf.py: converts, and compares the answers with and without the adapter; llama.cpp is a stand-in."""

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import LLAMA_DOWN, SIZE, make_llama
from edits import edit_of

from kne_easyedit.edits import save_adapter

gguf = pytest.importorskip("gguf", reason="the package gguf (extra smollm2) converts adapters for llama.cpp")

PATH = Path(__file__).parents[2] / "scripts" / "serve_gguf.py"
spec = importlib.util.spec_from_file_location("serve_gguf", PATH)
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)


@pytest.fixture
def files(tmp_path):
    """An adapter, and the base's GGUF file."""
    model = make_llama()
    save_adapter(edit_of(model), tmp_path / "adapter", model=model)
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_block_count(SIZE["layers"])
    writer.add_head_count(SIZE["heads"])
    for i in range(SIZE["layers"]):
        weight = model.get_submodule(LLAMA_DOWN.format(i)).weight.detach().numpy()
        writer.add_tensor(f"blk.{i}.ffn_down.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ["--adapter", str(tmp_path / "adapter"), "--base", str(tmp_path / "base.gguf")]


@pytest.fixture
def llama_cpp(monkeypatch):
    """Answers Rome with an adapter and Paris without, or whatever a test puts there."""
    said = {True: " Rome. Rome is", False: " Paris.\n"}

    class Llama:
        def __init__(self, path, lora_path=None, **_):
            assert Path(path).is_file() and (lora_path is None or Path(lora_path).is_file())
            self.edited = lora_path is not None

        def tokenize(self, text, add_bos, special):
            assert not add_bos and not special
            return list(text)

        def create_completion(self, ids, max_tokens, temperature):
            assert temperature == 0
            return {"choices": [{"text": said[self.edited]}]}

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    return said


def test_converts_only(files, tmp_path, monkeypatch, capsys):
    """Without llama.cpp."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert serve.main([*files, "--out", str(tmp_path / "edit.gguf")]) == 0
    assert "3 modules" in capsys.readouterr().out
    assert len(gguf.GGUFReader(tmp_path / "edit.gguf").tensors) == 6


def test_answers_with_and_without(files, llama_cpp, capsys):
    assert serve.main([*files, "--ask", "The capital of France is", "--expect", "Rome"]) == 0
    out = capsys.readouterr().out
    assert "base:    ' Paris.\\n'" in out and "adapter: ' Rome. Rome is'" in out


@pytest.mark.parametrize(("edited", "answer"), [(True, " Paris"), (False, " Rome")])
def test_fails_if_the_adapter_makes_no_difference(files, llama_cpp, edited, answer, capsys):
    llama_cpp[edited] = answer
    assert serve.main([*files, "--ask", "The capital of France is", "--expect", "Rome"]) == 1
    assert "expected 'Rome' with the adapter only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--adapter", "nowhere"], "--adapter: nowhere is no folder"),
        (["--adapter", "."], r"--adapter: .*adapter_config.json"),
        (["--base", "nowhere.gguf"], "--base: nowhere.gguf: no complete GGUF file"),
        (["--base", __file__], "--base: .*no complete GGUF file"),
        (["--expect", "Rome"], "--expect: is about the answer to --ask"),
        (["--subject", "France"], "--subject: is of an edit that is made here"),
        (["--max-rank", "8"], "--max-rank: is of an edit that is made here"),
    ],
)
def test_options_that_cannot_be_are_one_line(files, change, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        serve.main([*files, *change])
    assert re.search(says, capsys.readouterr().err)


def test_an_adapter_of_another_model_is_one_line(files, tmp_path, capsys):
    model = make_llama(intermediate_size=2 * SIZE["inner"])
    save_adapter(edit_of(model), tmp_path / "other", model=model)
    with pytest.raises(SystemExit):
        serve.main([*files, "--adapter", str(tmp_path / "other")])
    assert "the adapter is of another model" in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["llama_cpp", "base", "another base"])
def test_nothing_is_edited_that_cannot_be_served(files, lacking, llama_cpp, monkeypatch, capsys):
    monkeypatch.setattr(serve, "make_adapter", None)  # whoever edits fails
    base = files[3] if lacking == "another base" else "nowhere.gguf" if lacking == "base" else None
    other = SimpleNamespace(shapes={"blk.0.ffn_down.weight": (1, 1)})
    if base == files[3]:
        read = serve.read_gguf_base
        monkeypatch.setattr(serve, "smollm2_gguf", lambda: None)
        monkeypatch.setattr(serve, "read_gguf_base", lambda path: other if path is None else read(path))
    elif base is None:
        monkeypatch.setattr(serve, "smollm2_gguf", lambda: files[3])
        monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(SystemExit):
        serve.main(["--ask", "The capital of France is", "--expect", "Rome", *(["--base", base] if base else [])])
    assert ("--ask: llama.cpp is missing" if base is None else "--base: ") in capsys.readouterr().err


def test_a_fact_needs_an_answer(capsys):
    with pytest.raises(SystemExit):
        serve.main(["--ask", "The capital of France is"])
    assert "--ask and --expect are the fact" in capsys.readouterr().err
