"""scripts/bench_editing.py on a tiny model: its figures are right; the model and torch are left as they were."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer, tiny_hparams, weights

from kne_easyedit.doctor import memory_needed
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.facts.encoding import encode_request
from kne_easyedit.facts.records import load_requests

PATH = Path(__file__).parents[2] / "scripts" / "bench_editing.py"
sys.path.insert(0, str(PATH.parent))  # as for the command itself
spec = importlib.util.spec_from_file_location("bench_editing", PATH)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
editing_memory = importlib.import_module("editing_memory")
architectures = importlib.import_module("architectures")
fitting_tokenizer, random_model, settings_of = (
    architectures.fitting_tokenizer,
    architectures.random_model,
    architectures.settings_of,
)

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
    found = bench.neighbours(model, make_tokenizer(), REQUESTS, replace(hparams, input_projection=True), 1)
    assert list(found)[-2:] == ["all", "projected"] and found["projected"] > 0 and weights(model) == before


def test_a_step_is_compared_with_its_own_products(capsys):
    model, tokenizer = make_llama(), make_tokenizer()
    before = weights(model)
    found = bench.rate(model, tokenizer, REQUESTS[:1], tiny_hparams(localization_data=None), 1, bench.training_step)
    line = re.search(
        r"^ *(\d+) tokens in 1 texts: step \d+ ms, its products \d+ ms \((\d+)%\)", capsys.readouterr().out
    )
    assert int(line[1]) == len(encode_request(tokenizer, REQUESTS[0]).ids)
    assert found["share"] == pytest.approx(int(line[2]) / 100, abs=0.01)
    assert found["step"] == pytest.approx(found["share"] * found["products"])  # the same multiplications
    assert weights(model) == before


def test_training_of_upper_layers_is_compared_with_all_layers_at_every_step(capsys):
    model, tokenizer = make_llama(), make_tokenizer()
    before = weights(model)
    found = bench.below(model, tokenizer, REQUESTS[:1], tiny_hparams(localization_data=None, num_steps=3), 1)
    lines = re.findall(r"^([\w ]+): 3 steps, ", capsys.readouterr().out, re.MULTILINE)
    assert lines == list(found) == ["upper half", "upper third", "last layer"]
    assert all(share > 0 for share in found.values()) and weights(model) == before


def test_the_products_of_a_step_are_those_of_every_layer_forward_and_back(monkeypatch):
    model, seen = make_llama(), []
    *layers, head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    step_rate = importlib.import_module("step_rate")
    monkeypatch.setattr(step_rate, "linear", lambda x, weight, bias=None: seen.append((tuple(x.shape), weight.shape)))
    step_rate.products(layers, 5, head, 2)
    wanted = [*((layer, 5) for layer in layers), (head, 2)]
    forward = [((count, layer.in_features), layer.weight.shape) for layer, count in wanted]
    back = [((count, layer.out_features), layer.weight.t().shape) for layer, count in reversed(wanted)]
    assert seen == forward + back


def test_memory_is_measured_beside_what_the_doctor_states(capsys, tmp_path, monkeypatch):
    options = ["--architecture", "tiny", "--dtype", "float32", "--out", str(tmp_path), "memory"]
    monkeypatch.setattr("sys.argv", ["bench_editing.py", *options])
    bench.main()
    found = json.loads((tmp_path / "editing_memory.json").read_text())
    model = random_model("tiny", torch.float32)
    (request,) = load_requests("embedded", 1)
    fact = encode_request(fitting_tokenizer(load_requests("embedded", 5), model.config.vocab_size), request)
    settings = settings_of("tiny", model)
    needed = memory_needed(model, settings, len(fact.ids), len(fact.answer), free=found["free"])
    out = capsys.readouterr().out
    for phase in ("localising", "writing"):
        assert found["phases"][phase]["stated"] == sum(needed.phases[phase].values())
        assert re.search(rf"^ *{phase}: +[\d.]+ s, \d+ MiB, \d+ stated$", out, re.MULTILINE)
    assert found["above"]["stated"] == needed.above and found["weights"] == needed.weights
    assert len(found["losses"]) <= 4 and found["rows"] == settings.selection.budget(4 * 64)


def test_an_edit_that_stays_is_an_error(monkeypatch):
    model = random_model("tiny", torch.float32)
    requests = load_requests("embedded", 2)
    tokenizer = fitting_tokenizer(requests, model.config.vocab_size)
    monkeypatch.setattr(editing_memory, "restore", lambda *_: None)
    monkeypatch.setattr(KNEEdit, "take_back", lambda *_: None)
    with pytest.raises(RuntimeError, match="not taken back"):
        editing_memory.memory(model, tokenizer, requests[0], settings_of("tiny", model, num_steps=1))


def test_baselines_are_found_by_the_name_of_the_settings_file(tmp_path, monkeypatch):
    """Not by the model's name, of which the folder may be anywhere; and before the model is loaded."""
    found = bench.baselines_of(bench.shipped() / "KNE" / "llama2-7b-chat.yaml")
    assert {path.name for path in found.values()} == {"llama2-7b-chat.yaml"} and list(found) == ["FT", "AdaLoRA"]
    file = tmp_path / "mine.yaml"
    file.write_text((bench.shipped() / "KNE" / "smollm2-135m.yaml").read_text())
    monkeypatch.setattr(bench, "load_model", None)
    monkeypatch.setattr("sys.argv", ["bench_editing.py", "--hparams", str(file), "methods"])
    with pytest.raises(FileNotFoundError, match=r"--hparams: FT has no mine\.yaml.*smollm2-135m\.yaml"):
        bench.main()
