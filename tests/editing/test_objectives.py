"""The options beyond the paper: scores scaled by layer, a divergence penalty. Off, they change nothing."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import FACTS, LLAMA_DOWN, fingerprint, make_llama, make_tokenizer, tiny_hparams, weights
from pytest import approx

from kne_easyedit import apply_kne_to_model, restore, select_ensemble
from kne_easyedit.editing.objectives import Divergence, unrelated_prompts

PROMPTS = [prompt for prompt, _ in FACTS]
REQUEST = {"prompt": "The capital of Spain is", "target_new": "Oslo", "subject": "Spain"}


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(
        json.dumps(
            [{"prompt": p, "target_new": t, "subject": p.split()[0]} for p, t in [*FACTS, (REQUEST["prompt"], "Oslo")]]
        )
    )
    return str(path)


def test_the_divergence_of_an_unchanged_model_is_zero_and_of_a_changed_one_is_that_of_its_definition(double_precision):
    model, tokenizer = make_llama(dtype=torch.float64), make_tokenizer()
    divergence = Divergence(model, tokenizer, PROMPTS)
    assert divergence.now(model).item() == approx(0, abs=1e-12)
    with torch.no_grad():
        before = [model(torch.tensor([tokenizer(p)["input_ids"]])).logits[0, -1].softmax(-1) for p in PROMPTS]
        model.get_submodule(LLAMA_DOWN.format(1)).weight.mul_(1.5)
        after = [model(torch.tensor([tokenizer(p)["input_ids"]])).logits[0, -1].softmax(-1) for p in PROMPTS]
    literal = sum((b * (b / a).log()).sum().item() for b, a in zip(before, after)) / len(PROMPTS)
    assert literal > 1e-3
    assert divergence.now(model).item() == approx(literal, rel=1e-9)


def edited(prompts_file, **settings) -> tuple[float, dict]:
    """The divergence on unrelated prompts that an edit leaves, and its weights."""
    model, tokenizer = make_llama(), make_tokenizer()
    hparams = tiny_hparams(stop_loss=0.05, lr=0.02, **settings)
    divergence = Divergence(model, tokenizer, PROMPTS)
    before = fingerprint(model)
    _, originals = apply_kne_to_model(model, tokenizer, [REQUEST], hparams, return_orig_weights=True)
    found = divergence.now(model).item(), weights(model)
    restore(model, originals)
    assert fingerprint(model) == before
    return found


def test_the_penalty_keeps_unrelated_prompts_nearer_to_what_they_were(prompts_file):
    without, _ = edited(prompts_file)
    with_penalty, _ = edited(prompts_file, kl_weight=5.0, kl_data=prompts_file)
    assert 0 < with_penalty < 0.7 * without


def test_a_weight_of_zero_changes_nothing(prompts_file):
    assert edited(prompts_file) == edited(prompts_file, kl_weight=0.0, kl_data=prompts_file)


def test_unrelated_prompts_are_not_those_that_are_edited(prompts_file):
    hparams = tiny_hparams(kl_weight=1.0, kl_data=prompts_file, kl_size=8)
    assert unrelated_prompts(hparams, [REQUEST["prompt"]]) == PROMPTS
    hparams.kl_size = 2
    assert unrelated_prompts(hparams, [PROMPTS[0]]) == [PROMPTS[1], PROMPTS[2]]
    with pytest.raises(ValueError, match="kl_data: .* holds no prompt beside"):
        unrelated_prompts(hparams, [*PROMPTS, REQUEST["prompt"]])


def scores() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 25, generator=generator).abs() * torch.tensor([100.0, 1.0, 0.1, 10.0])[:, None]


def test_scaled_scores_spread_the_ensemble_over_the_layers():
    plain = select_ensemble(scores(), 0.2, target_module=LLAMA_DOWN)
    scaled = select_ensemble(scores(), 0.2, target_module=LLAMA_DOWN, scale="layer")
    assert plain.counts()[LLAMA_DOWN][1] == plain.counts()[LLAMA_DOWN][2] == 0
    assert min(scaled.counts()[LLAMA_DOWN].values()) >= 1
    assert plain.size == scaled.size == 20


def test_a_layers_scale_does_not_matter_to_scaled_scores():
    factors = torch.tensor([3.0, 50.0, 0.01, 1.0])[:, None]
    one = select_ensemble(scores(), 0.2, target_module=LLAMA_DOWN, scale="layer")
    other = select_ensemble(scores() * factors, 0.2, target_module=LLAMA_DOWN, scale="layer")
    assert one.members() == other.members()
    assert (
        select_ensemble(scores() * factors, 0.2, target_module=LLAMA_DOWN).members()
        != select_ensemble(scores(), 0.2, target_module=LLAMA_DOWN).members()
    )


def test_a_layer_without_a_positive_score_stays_empty():
    values = scores()
    values[1] = -values[1]
    found = select_ensemble(values, 0.9, target_module=LLAMA_DOWN, scale="layer")
    assert found.counts()[LLAMA_DOWN][1] == 0


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale: 'module' must be one of"):
        select_ensemble(scores(), 0.2, target_module=LLAMA_DOWN, scale="module")
