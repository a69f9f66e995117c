"""scripts/bench_editing.py on a tiny model: its figures are right; the model and torch are left as they were."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer, tiny_hparams, weights

PATH = Path(__file__).parents[2] / "scripts" / "bench_editing.py"
spec = importlib.util.spec_from_file_location("bench_editing", PATH)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

REQUESTS = [
    {"prompt": f"The capital of {country} is", "target_new": city, "subject": country, "ground_truth": None}
    for country, city in (("France", "Rome"), ("Spain", "Oslo"))
]


@pytest.mark.parametrize(
    ("measure", "line", "closing"),
    [
        (bench.step, r"^ *(\d+) tokens: KNE +[\d.]+ ms, plain +[\d.]+ ms, ratio ([\d.]+)$", r"median ratio ([\d.]+)$"),
        (
            bench.profile,
            r"steps: forward +([\d.]+)%, backward +([\d.]+)%, .* all outside +([\d.]+)%$",
            r"median outside forward and backward ([\d.]+)%$",
        ),
    ],
    ids=("step", "profile"),
)
def test_a_measurement_has_a_line_a_fact_and_a_median(measure, line, closing, capsys):
    model, grad = make_llama(), torch.autograd.grad
    before = weights(model)
    measure(model, make_tokenizer(), REQUESTS, tiny_hparams(localization_data=None), 1)
    out = capsys.readouterr().out
    found = re.findall(line, out, re.MULTILINE)
    assert len(found) == len(REQUESTS)
    last = [float(values[-1]) for values in found]
    assert float(re.search(closing, out)[1]) == pytest.approx(sum(last) / 2, abs=0.1)  # the median of two
    if measure is bench.profile:
        for forward, backward, outside in found:
            assert float(forward) + float(backward) + float(outside) == pytest.approx(100, abs=0.2)
            assert float(forward) > 0 and float(backward) > 0
    assert weights(model) == before
    assert torch.autograd.grad is grad and "forward" not in vars(model)


def test_steps_with_neighbours_are_multiples_of_one_without(capsys, tmp_path):
    subjects = ("Peru", "Italy", "Oslo", "Madrid", "Lima")
    facts = [{"prompt": f"The capital of {s} is", "target_new": "Latin", "subject": s} for s in subjects]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    hparams = tiny_hparams(neighbour_data=str(tmp_path / "facts.json"), neighbour_relation_size=2, neighbour_tokens=2)
    model = make_llama()
    before = weights(model)
    bench.neighbours(model, make_tokenizer(), REQUESTS, hparams, 1)
    out = capsys.readouterr().out
    found = re.findall(r"as a multiple: 1 ([\d.]+), .* all ([\d.]+); to prepare them ([\d.]+)$", out, re.MULTILINE)
    assert len(found) == len(REQUESTS) and all(float(value) > 0 for values in found for value in values)
    assert re.search(r"^median 1 [\d.]+, .* all [\d.]+$", out, re.MULTILINE) and weights(model) == before


def test_memory_for_seven_billion_parameters_is_that_of_the_doctor(capsys):
    bench.memory()
    rows = dict(
        re.findall(r"^(\w+): ([\d.]+) GiB above the weights \(weights [\d.]+", capsys.readouterr().out, re.MULTILINE)
    )
    assert set(rows) == {"float32", "bfloat16"}
    # The output head's gradientless logits and the rows with AdamW's moments: below a full fine-tuning's by far.
    assert 0 < float(rows["bfloat16"]) < float(rows["float32"]) < 4 * 6.7
