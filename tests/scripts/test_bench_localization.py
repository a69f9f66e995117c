"""scripts/bench_localization.py: it selects as localising does, and its figures come out for a tiny model."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import LLAMA_DOWN, all_layers, make_llama, tiny_hparams
from localizing import REQUESTS

from kne_easyedit.localization.localizer import Localization

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_localization")


@pytest.mark.parametrize("changes", [{}, {"score_scale": "layer", "aggregation": "mean"}, {"layers": [1, 2]}], ids=str)
def test_selects_under_the_settings_rules(bench, llama, tokenizer, changes):
    hparams = tiny_hparams(**changes)
    found = Localization(llama, tokenizer, REQUESTS, hparams)
    scores = [one.values[LLAMA_DOWN] for one in found.scores()]
    ensemble = bench.selected(scores, hparams.selection, found.targets[0])
    expected = replace(found.ensemble(), seconds=None, facts=None)
    assert ensemble == expected
    other = replace(hparams.selection, p=0.5)
    assert bench.selected(scores, other, found.targets[0]).neurons != expected.neurons, "converse"


@pytest.mark.parametrize("command", ["quadrature", "precision", "single"])
def test_commands(bench, tokenizer, monkeypatch, command, capsys):
    hparams = tiny_hparams()

    def load(options):
        return make_llama().requires_grad_(False), tokenizer, hparams

    monkeypatch.setattr(bench, "load", load)
    monkeypatch.setattr(bench, "load_requests", lambda data, size: REQUESTS[:size])
    monkeypatch.setattr(bench, "product_rate", lambda *arguments: 1e9)
    options = argparse.Namespace(
        module=None, data="embedded", size=2, types=["bfloat16"], kn=False, literal_layers=2, repeats=1
    )
    figures = getattr(bench, command)(options)
    assert figures["model"] == "tiny" and capsys.readouterr().out
    if command == "single":
        assert all(fact["relative_difference"] < 1e-4 for fact in figures["facts"])
    else:
        assert figures["facts"] == 2
    if command == "quadrature":
        assert figures["sums"]["gauss-legendre 10"]["overlap"] == 1


def test_needed_multiplications_grow_with_the_steps(bench, llama, facts):
    few, many = (bench.multiplications(llama, all_layers(llama), facts[:1], steps) for steps in (4, 8))
    assert 0 < few < many < 2.5 * few
