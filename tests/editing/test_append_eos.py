"""The end token after the answer, trained if `append_eos` is set."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import LLAMA_DOWN, bits, make_llama, make_tokenizer, tiny_hparams
from edits import MANY, REQUEST, REQUESTS, ensemble_of

from kne_easyedit import apply_kne_to_model, compute_edit
from kne_easyedit.editing import edit as edit_module
from kne_easyedit.facts.encoding import encode_request

ENSEMBLE = ensemble_of(LLAMA_DOWN, rows=MANY)


def said(model, tokenizer, request, tokens=4):
    ids = tokenizer(request["prompt"], return_tensors="pt")
    return model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request["target_new"])
def test_the_edited_model_ends_after_the_answer(tokenizer, request_):
    """Without the setting it goes on. The loss counts the end token as one more of the answer."""
    answer = list(encode_request(tokenizer, request_).answer)
    for append_eos in (True, False):
        model = make_llama()
        hparams = tiny_hparams(append_eos=append_eos, stop_loss=0.02)
        apply_kne_to_model(model, tokenizer, request_, hparams, ensemble=ENSEMBLE)
        found = said(model, tokenizer, request_, len(answer) + 1)
        assert found[: len(answer)] == answer
        assert (found[len(answer) :] == [tokenizer.eos_token_id]) is append_eos


def test_the_loss_is_that_of_answer_and_end(llama64, tokenizer):
    hparams = tiny_hparams(append_eos=True, num_steps=1)
    edit = compute_edit(llama64, tokenizer, REQUEST, hparams, ENSEMBLE)
    fact = encode_request(tokenizer, REQUEST)
    assert edit.answers[0].fact.ids == (*fact.ids, tokenizer.eos_token_id)
    assert edit.answers[0].fact.prompt_length == fact.prompt_length
    logs = llama64(torch.tensor([fact.ids])).logits[0].log_softmax(-1)
    expected = -(logs[-2, fact.ids[-1]] + logs[-1, tokenizer.eos_token_id]).item() / 2
    assert len(fact.answer) == 1 and edit.losses[0] == pytest.approx(expected, rel=1e-12)


def test_localisation_does_without(llama, tokenizer, monkeypatch):
    seen = []
    real = edit_module.find_ensemble
    monkeypatch.setattr(edit_module, "find_ensemble", lambda m, t, facts, h: seen.extend(facts) or real(m, t, facts, h))
    compute_edit(llama, tokenizer, REQUEST, tiny_hparams(append_eos=True, num_steps=1))
    assert seen == [encode_request(tokenizer, REQUEST)]


def test_an_answer_that_ends_already_is_left_as_it_is(llama, tokenizer):
    request = {**REQUEST, "target_new": "Rome<eos>"}
    edits = [
        compute_edit(llama, tokenizer, request, tiny_hparams(append_eos=on, num_steps=2), ENSEMBLE)
        for on in (True, False)
    ]
    assert edits[0].answers[0].fact.answer[-1] == tokenizer.eos_token_id
    name = LLAMA_DOWN.format(0)
    assert bits(edits[0].deltas[name][1]) == bits(edits[1].deltas[name][1])


def test_a_tokenizer_without_an_end_token_is_refused(llama):
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"append_eos: True, but .* has no end token; set tokenizer\.eos_token"):
        compute_edit(llama, tokenizer, REQUEST, tiny_hparams(append_eos=True), ENSEMBLE)
    compute_edit(llama, tokenizer, REQUEST, tiny_hparams(num_steps=1), ENSEMBLE)


def test_a_fact_that_is_too_long_with_its_end_is_refused(tokenizer):
    length = len(encode_request(tokenizer, REQUEST).ids)
    model = make_llama(max_position_embeddings=length)
    with pytest.raises(ValueError, match=f"append_eos: true .* has {length} tokens .*, and the model takes {length}"):
        compute_edit(model, tokenizer, REQUEST, tiny_hparams(append_eos=True), ENSEMBLE)
    compute_edit(model, tokenizer, REQUEST, tiny_hparams(num_steps=1), ENSEMBLE)
