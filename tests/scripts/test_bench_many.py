"""scripts/bench_many.py: what it measures works, on few facts, lines and edits."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_many")


@pytest.mark.parametrize(("what", "number"), [("store", 7), ("report", 60)])
def test_a_measurement(bench, what, number, tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["bench_many.py", "--number", str(number), "--out", str(out), what])
    bench.main()
    found = json.loads(out.read_text())
    if what == "store":
        parts = ("add", "open and list", "apply", "apply without one", "take all back")
        assert found["edits"] == number and all(found[part]["cpu"] >= 0 for part in parts)
    else:
        assert found["lines"] == number and found["report"]["peak_bytes"] > 2**20
    assert "s of the processor" in capsys.readouterr().out


def test_an_edit_that_is_lost_is_an_error(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.EditStore, "list", lambda *_: ())
    with pytest.raises(RuntimeError, match="0 edits of 2"):
        bench.store(tmp_path, 2)


def test_a_command_that_fails_is_an_error(bench, tmp_path):
    with pytest.raises(RuntimeError, match=r"kne report .* ended with 1"):
        bench.child("report", ["report", str(tmp_path)])
