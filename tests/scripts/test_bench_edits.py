"""scripts/bench_edits.py: the goals for edits as files, on the real model; and its measures on tiny ones."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer, tiny_hparams, weights

from kne_easyedit import KNEHyperParams, compute_edit
from kne_easyedit._util.settings import replace_settings

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("bench_edits", ROOT / "scripts" / "bench_edits.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

FRANCE = {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France"}


@pytest.mark.slow  # the blocks of docs/serving.md, and tests of adapters on tiny models, have the same for less
def test_the_real_model(smollm2, capsys, monkeypatch):
    """Sizes, answers and logits of what is shipped: bounds that half a rank or one wrong scale would break."""
    monkeypatch.setattr(bench, "FORMS", (("portable", None), ("exact", None), ("portable", 32), ("portable", 1)))
    model, tokenizer = smollm2
    hparams = KNEHyperParams.from_hparams(ROOT / "hparams/KNE/smollm2-135m.yaml")
    edit = compute_edit(model, tokenizer, [FRANCE], replace_settings(hparams, localization_data=None))
    before = weights(model)
    portable, exact, reduced, one = bench.forms(model, tokenizer, edit)
    assert weights(model) == before
    assert exact["share"] <= 10 and reduced["share"] <= 3 and reduced["rank"] == 32
    # Measured: 4.4e-5 for logits up to 23, of which one unit in the last place is 2.7e-6.
    largest = float(re.search(r"logits up to ([\d.]+)", capsys.readouterr().out)[1])
    unit = largest * torch.finfo(torch.float32).eps
    for form in (portable, exact):
        assert form["error"] == 0 and max(form["merged"], form["beside"]) < 256 * unit
    assert portable["probability"] > 0.5 and reduced["probability"] > 0.9 * portable["probability"]
    assert one["error"] > 0.1 and one["beside"] > 4096 * unit  # what is left out shows


def test_ranks_that_a_tiny_edit_has(capsys, monkeypatch):
    monkeypatch.setattr(bench, "FORMS", (("exact", None), ("portable", 1)))
    model, tokenizer = make_llama(), make_tokenizer()
    before = weights(model)
    edit = compute_edit(model, tokenizer, [FRANCE], tiny_hparams(localization_data=None))
    exact, one = bench.forms(model, tokenizer, edit)
    assert weights(model) == before and (one["rank"], one["form"]) == (1, "portable")
    assert exact["error"] == 0 < one["error"] < 1 and one["share"] < exact["share"]
    out = capsys.readouterr().out
    assert len(re.findall(r"^ *(?:exact|portable) ", out, re.MULTILINE)) == 2 and "apply 0." in out


def test_the_probability_is_that_of_the_whole_answer_to_the_edits_own_prompt(capsys, monkeypatch):
    monkeypatch.setattr(bench, "FORMS", (("exact", None),))
    model, tokenizer = make_llama(), make_tokenizer()
    spain = {"prompt": "The capital of Spain is", "target_new": "the Tiber", "subject": "Spain"}
    edit = compute_edit(model, tokenizer, [spain], tiny_hparams(localization_data=None))
    (exact,) = bench.forms(model, tokenizer, edit)
    assert len(edit.answers[0].fact.answer) > 1
    assert exact["probability"] == pytest.approx(edit.answers[0].probability, rel=1e-3)


def test_memory_is_measured_of_each_change_above_the_weights(capsys, monkeypatch):
    """By stand-ins: what a process has freed before is not given back to the system."""

    class Peak:
        bytes = 2**19

        def __init__(self, device):
            assert device.type == "cpu"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    shape = {"layers": 2, "outputs": 64, "inputs": 32}
    bytes_now = iter(range(0, 2**40, 2**20))  # every look finds one MiB more
    monkeypatch.setattr(bench, "resident", lambda: next(bytes_now))
    monkeypatch.setattr(bench, "PeakMemory", Peak)
    assert bench.memory(3, False, **shape) == {"apply": 1.5, "take one back": 2.5, "take all back": 3.5}
    assert "3 edits, 3 rows of their own in 2 modules (64 x 32" in capsys.readouterr().out
    monkeypatch.setattr(bench.EditStore, "off", lambda *_: ())
    with pytest.raises(RuntimeError, match="not taken back"):
        bench.memory(3, True, **shape)
