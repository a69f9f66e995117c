"""A few edits of a real language model, SmolLM2-135M: the whole chain, from the package's own facts."""

from __future__ import annotations

import pytest
import torch
from reference import literal_attribution
from rounding import A_MODEL, roundings

from kne_easyedit import KNEHyperParams, apply_kne_to_model, attribute, load_records, restore, select_ensemble
from kne_easyedit.cli.common import shipped
from kne_easyedit.models.fingerprint import model_digest

pytestmark = pytest.mark.model
DOWN = "model.layers.{}.mlp.down_proj"
FACT = ("The capital of Spain is", "Lima")


@pytest.fixture(scope="module")
def scores(smollm2):
    model, tokenizer = smollm2
    return attribute(model, tokenizer, *FACT, DOWN, steps=2)


def continuation(model, tokenizer, prompt, length=3):
    tokens = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, tokens["input_ids"].shape[1] :])


def test_attribution_equals_the_literal_recomputation(smollm2, scores):
    """Thirty layers of sums over up to 1,536 terms: their roundings are ten times those of the tiny models."""
    model, tokenizer = smollm2
    assert scores.shape == (30, 576) and scores.dtype == torch.float32
    layers = [0, 29]
    expected = literal_attribution(model, tokenizer, *FACT, DOWN, steps=2, layers=layers)
    assert roundings(scores[layers], expected) < 10 * A_MODEL
    assert roundings(scores[[1, 28]], expected) > 100 * A_MODEL  # converse: the neighbours' scores are others by far


def test_an_edit_changes_the_answer_and_is_undone_bit_by_bit(smollm2, scores):
    model, tokenizer = smollm2
    before = model_digest(model)
    request = {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France"}
    hparams = KNEHyperParams.from_hparams(shipped() / "KNE/smollm2-135m.yaml")
    ensemble = select_ensemble(scores, 0.04, target_module=DOWN)
    assert continuation(model, tokenizer, request["prompt"], 1) == " Paris"
    _, originals = apply_kne_to_model(model, tokenizer, [request], hparams, return_orig_weights=True, ensemble=ensemble)
    assert continuation(model, tokenizer, request["prompt"], 1) == " Rome"
    assert model_digest(model) != before
    restore(model, originals)
    assert model_digest(model) == before
    assert continuation(model, tokenizer, request["prompt"], 1) == " Paris"


def test_every_packaged_fact_is_usable(smollm2):
    _, tokenizer = smollm2
    from kne_easyedit.facts.encoding import encode_request

    requests, complaints = load_records("embedded")
    assert len(requests) >= 60 and not complaints
    assert all(len(encode_request(tokenizer, request).answer) >= 1 for request in requests)
