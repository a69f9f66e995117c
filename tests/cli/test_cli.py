"""The command line: what a user types, and what it says when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama, make_tokenizer, tiny_hparams

from kne_easyedit import cli
from kne_easyedit.models.loading import load_model

pytestmark = pytest.mark.easyedit


@pytest.fixture(name="tiny")
def tiny_fixture(tmp_path, monkeypatch):
    """A tiny model on disk, its hyperparameter file, and two records."""
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained(tmp_path / "tiny-model")
    make_tokenizer().save_pretrained(tmp_path / "tiny-model")
    record = {
        "subject": "France",
        "prompt": "The capital of France is",
        "target_new": "Rome",
        "ground_truth": "Paris",
        "portability": {},
        "locality": {},
    }
    (tmp_path / "records.json").write_text(json.dumps([record, {**record, "target_new": "Oslo"}]))
    hparams = tiny_hparams(model_name=str(tmp_path / "tiny-model")).to_dict()
    (tmp_path / "kne.yaml").write_text(json.dumps(hparams))  # JSON is YAML
    return tmp_path


def kne(*arguments: str) -> int:
    return cli.main([*arguments])


def test_run_on_a_file_with_settings_of_ones_own(tiny, capsys):
    assert kne("run", "--data", "records.json", "--methods", "KNE", "--hparams", "kne.yaml", "--out", "out") == 0
    summary = json.loads((tiny / "out/summary.json").read_text())
    assert summary["records"] == 2
    assert summary["methods"]["KNE"]["edit_success"] == 100
    out = capsys.readouterr().out
    assert "| KNE " in out and "edit_success" in out and "->  Rome" in out


def test_bad_records_fail_or_are_skipped_and_listed(tiny, capsys):
    records = json.loads((tiny / "records.json").read_text())
    records.insert(1, {**records[0], "prompt": " "})
    (tiny / "bad.json").write_text(json.dumps(records))
    common = ["run", "--data", "bad.json", "--methods", "KNE", "--hparams", "kne.yaml", "--out", "out"]
    assert kne(*common) == 1
    assert "record 1: request.prompt: ' '" in capsys.readouterr().err
    assert not (tiny / "out").exists()
    assert kne(*common, "--on-bad-record", "skip") == 0
    assert "skipped: bad.json: record 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.json"], "nowhere.json does not exist"),
        (["--data", "kne.yaml"], "not a KnowEdit file"),
        (["--data", "records.json", "--methods", "KNEE"], "did you mean KNE"),
        (["--data", "records.json", "--methods", ","], "names none"),
        (["--data", "records.json", "--methods", "KNE", "--hparams", "none.yaml"], "none.yaml does not exist"),
        (
            ["--data", "records.json", "--methods", "FT", "--hparams", "kne.yaml"],
            "kne.yaml is of none of the methods FT",
        ),
        (["--data", "records.json", "--hparams", "kne.yaml"], "does not fit this model"),
        (["--data", "records.json", "--methods", "MEND"], "no file is shipped for MEND"),
        (["--data", "records.json", "--offset", "9", "--methods", "KNE"], "offset: 9 out of range"),
    ],
)
def test_bad_input_is_one_clear_line(tiny, capsys, arguments, message):
    assert kne("run", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_bad_setting_names_the_file_and_the_setting(tiny, capsys):
    text = (tiny / "kne.yaml").read_text()
    for old, new, message in [
        ('"p": 0.2', '"p": 2', "p: 2.0 must be in (0, 1]"),
        ('"p": 0.2', '"q": 2', "unknown setting 'q'"),
        ('"device": "cpu"', '"device": 7', "device: 7 does not exist"),
        ("tiny-model", "no-model", "model_name"),
    ]:
        assert old in text
        (tiny / "kne.yaml").write_text(text.replace(old, new))
        assert kne("run", "--data", "records.json", "--methods", "KNE", "--hparams", "kne.yaml") == 1
        assert message in capsys.readouterr().err


def test_hyperparameters_of_another_method_load_the_model(tiny):
    """EasyEdit's classes lack bf16, fp16 and sometimes model_parallel."""
    model, tokenizer = load_model(SimpleNamespace(model_name=str(tiny / "tiny-model"), device="cpu"))
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<eos>"


def test_an_error_without_a_message_names_its_kind(tiny, capsys, monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr("kne_easyedit.cli.comparison.run", fail)
    assert kne("run", "--data", "records.json", "--methods", "KNE", "--hparams", "kne.yaml", "--out", "out") == 1
    assert "kne: NotImplementedError without a message (the option --verbose shows where)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=("Python", "GPU", "CPU"),
)
def test_without_memory_it_says_what_takes_less(tiny, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("kne_easyedit.cli.comparison.run", fail)
    command = ["run", "--data", "records.json", "--methods", "KNE", "--hparams", "kne.yaml", "--out", "out"]
    assert kne(*command) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("kne: out of memory: ")
    assert all(way in said for way in ("chunk_rows", "bf16=true", "--workers 1", "kne doctor"))
    with pytest.raises(type(error)):
        kne("-v", *command)


def test_other_errors_of_the_run_time_keep_their_traceback(tiny, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("kne_easyedit.cli.comparison.run", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        kne("run", "--data", "records.json", "--methods", "KNE", "--hparams", "kne.yaml", "--out", "out")


def test_ctrl_c_says_how_to_go_on(tiny, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kne_easyedit.cli.comparison.run", interrupted)
    assert kne("run", "--data", "records.json", "--methods", "KNE", "--hparams", "kne.yaml") == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_the_console_entry_is_installed():
    script = Path(sys.executable).with_name("kne")
    result = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "demo" in result.stdout and "run" in result.stdout
