"""Variants of the subject's name, trained beside the fact."""

from __future__ import annotations

import pytest
import torch
from conftest import LLAMA_DOWN, make_tokenizer, tiny_hparams
from edits import MANY, ensemble_of

from kne_easyedit import apply_kne_to_model, compute_edit, restore, write_rows
from kne_easyedit.editing.losses import answer_loss
from kne_easyedit.editing.neighbours import ASKED
from kne_easyedit.editing.objectives import SharedObjective, objectives_for
from kne_easyedit.editing.variants import Variants
from kne_easyedit.facts.encoding import collate, encode
from kne_easyedit.facts.records import with_chat_template

ENSEMBLE = ensemble_of(LLAMA_DOWN, rows=MANY)
REQUEST = {"prompt": "The mother of Ada Marie is", "target_new": "Rome", "subject": "Ada Marie"}
PROMPTS = ["The mother of Marie is", "The mother of A. Marie is"]


def losses_of(model, tokenizer, edit):
    originals = write_rows(model, edit)
    with torch.no_grad():
        found = [answer_loss(model, collate([encode(tokenizer, prompt, "Rome")])).item() for prompt in PROMPTS]
    restore(model, originals)
    return found


def test_the_term_is_the_mean_of_their_answers(llama64, tokenizer):
    facts = [encode(tokenizer, prompt, "Rome") for prompt in PROMPTS]
    term = Variants(facts, 0.5, per_step=2)
    assert isinstance(term, SharedObjective) and term.texts(3) == facts
    logits = torch.zeros(2, 91, dtype=torch.float64)
    logits[0, facts[0].answer[0]] = 20
    assert term.loss_of(logits, 0).item() == pytest.approx((0 + torch.tensor(91.0).log().item()) / 2, rel=1e-6)
    assert not term.may_stop(logits, 0), "one of them is not reached"
    logits[1, facts[1].answer[0]] = 20
    assert term.may_stop(logits, 0)
    assert term.loss(llama64).item() == pytest.approx(answer_loss(llama64, collate(facts)).item(), rel=1e-12)


def test_a_step_trains_the_one_that_was_seen_worst_and_all_must_be_reached_once(llama64, tokenizer):
    facts = [encode(tokenizer, f"{prompt} {end}", "Rome") for prompt in PROMPTS for end in ("a", "b")][:3]
    term = Variants(facts, 0.5)

    def seen(step: int, reached: bool) -> bool:
        logits = torch.zeros(1, 91, dtype=torch.float64)
        logits[0, facts[0].answer[0]] = 20.0 if reached else -step
        return term.may_stop(logits, step)

    chosen = []
    for step, reached in enumerate([False, True, False, True, True]):
        chosen += [facts.index(fact) for fact in term.texts(step)]
        done = seen(step, reached)
        assert done is (step == 4)
    assert chosen == [0, 1, 2, 2, 0], "each once, then the worst of those that are not reached"


def test_every_variant_is_reached_and_the_edit_is_about_the_fact_alone(llama, tokenizer):
    """Without variants they are not; with 0 of them nothing is built."""
    settings = dict(stop_loss=0.3, lr=0.02)
    for n in (0, 2):
        edit = compute_edit(llama, tokenizer, REQUEST, tiny_hparams(**settings, subject_variants=n), ENSEMBLE)
        (answer,) = edit.answers
        assert answer.fact == encode(tokenizer, REQUEST["prompt"], "Rome")
        assert edit.losses[-1] == pytest.approx(answer.loss, rel=1e-4) and answer.loss < 0.3
        assert (max(losses_of(llama, tokenizer, edit)) < 0.31) is bool(n)


def test_they_end_as_the_fact_does_and_what_cannot_be_encoded_is_left_out(llama, tokenizer, monkeypatch):
    def built(**settings):
        (term,) = objectives_for(llama, tokenizer, [REQUEST], tiny_hparams(subject_variants=2, **settings))
        found = []
        for step in range(4):
            found += term.texts(step)
            reached = 30 * torch.nn.functional.one_hot(torch.tensor(found[-1].answer), 91).float()
            if term.may_stop(reached, step):
                return found
        raise AssertionError("never reached")

    assert [fact.prompt for fact in built()] == PROMPTS
    assert {fact.ids[-1] for fact in built(append_eos=True)} == {tokenizer.eos_token_id}
    monkeypatch.setattr("kne_easyedit.editing.variants.variant_prompts", lambda request, n, *others: ["~", PROMPTS[0]])
    assert [fact.prompt for fact in built()] == PROMPTS[:1]
    alone = {"prompt": "What is that ?", "target_new": "Rome"}
    monkeypatch.undo()
    assert objectives_for(llama, tokenizer, [alone], tiny_hparams(subject_variants=2)) == []


def variants_of(model, tokenizer, requests, **settings):
    """What the term trains, all at once."""
    built = objectives_for(model, tokenizer, requests, tiny_hparams(subject_variants=9, **settings))
    return {fact.prompt for term in built for fact in term._facts}


def test_no_variant_is_what_another_fact_or_an_earlier_edit_is_about_or_what_is_asked_later(llama, tokenizer):
    other = {"prompt": "The mother of Marie is", "target_new": "Lima", "subject": "Marie"}
    assert PROMPTS[0] in variants_of(llama, tokenizer, [REQUEST])
    assert PROMPTS[0] not in variants_of(llama, tokenizer, [other, REQUEST])
    asked = {"prompt": "The capital of Peru is", "target_new": "Lima", ASKED: ["The river of Marie is"]}
    own = {"Neighborhood": {"prompt": ["The river of Marie is"], "ground_truth": ["Tiber"]}}
    for brings in (asked, {**asked, ASKED: [], "locality": own}):
        assert PROMPTS[0] not in variants_of(llama, tokenizer, [REQUEST, brings])
    assert PROMPTS[0] not in variants_of(llama, tokenizer, [{**REQUEST, ASKED: asked[ASKED]}])
    unnamed = {"prompt": PROMPTS[0], "target_new": "Lima"}
    assert PROMPTS[0] not in variants_of(llama, tokenizer, [REQUEST, unnamed])
    chat = make_tokenizer()  # requests may be in its template already, as the benchmark's are
    chat.chat_template = "{% for m in messages %}Say : {{ m['content'] }}{% endfor %} !"
    in_template = [with_chat_template(request, chat) for request in (REQUEST, unnamed)]
    wrapped = in_template[1]["prompt"]
    assert wrapped in variants_of(llama, chat, in_template[:1], use_chat_template=True)
    assert wrapped not in variants_of(llama, chat, in_template, use_chat_template=True)
    _, originals = apply_kne_to_model(
        llama, tokenizer, [other], tiny_hparams(spare_edited=True), ensemble=ENSEMBLE, return_orig_weights=True
    )
    assert PROMPTS[0] not in variants_of(llama, tokenizer, [REQUEST])
    restore(llama, originals)
    assert PROMPTS[0] in variants_of(llama, tokenizer, [REQUEST]), "what was taken back counts no more"
