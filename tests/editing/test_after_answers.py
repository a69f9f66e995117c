"""What the model says after the answers of an edit is spared: which texts these are, and that rows leave them alone."""

from __future__ import annotations

import pytest
import torch
from conftest import GPT2_DOWN, LLAMA_DOWN, fingerprint, make_gpt2, make_llama, make_tokenizer, tiny_hparams
from edits import REQUEST

from kne_easyedit import compute_edit
from kne_easyedit.editing import projection
from kne_easyedit.editing.after_answers import (
    BRANCHES,
    COMPARED,
    MARKS,
    after_answers,
    is_mark,
    texts_after_answers,
)
from kne_easyedit.editing.divergence import AT_ONCE, Divergence
from kne_easyedit.editing.objectives import objectives_for
from kne_easyedit.editing.projection import input_projections
from kne_easyedit.facts.encoding import encode
from kne_easyedit.models.state import preserve_state

FACTS = [("The capital of France is", "Rome"), ("The river of Peru is", "the Tiber")]
ENOUGH = 1000


@pytest.fixture
def facts(tokenizer):
    return [encode(tokenizer, *fact) for fact in FACTS]


@pytest.fixture
def found(tokenizer):
    def texts(model, facts, tokens=3, most=ENOUGH):
        with preserve_state(model), torch.no_grad():
            return after_answers(model, tokenizer, facts, tokens, most)

    return texts


def after(model, ids) -> torch.Tensor:
    """Logits of the next token."""
    with preserve_state(model), torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


def test_the_likeliest_token_and_marks_begin_texts_and_the_model_goes_on(llama64, tokenizer, facts, found):
    texts = found(llama64, facts)
    for fact in facts:
        own = [text for text in texts if text[: len(fact.ids)] == fact.ids]
        likely = [i for i in after(llama64, fact.ids).argsort(descending=True).tolist() if i not in special(tokenizer)]
        marks = [i for i in likely[1:] if tokenizer.decode([i]).strip() in list(".,?!:;")][:MARKS]
        assert [text[len(fact.ids)] for text in own] == [likely[0], *marks] and marks
        for text in own:
            assert len(text) == len(fact.ids) + 3 and texts[text] == range(len(fact.ids), len(text))
            for at in range(len(fact.ids) + 1, len(text)):
                assert text[at] == after(llama64, text[:at]).argmax()


def test_each_fact_of_a_large_batch_has_its_first_text_before_any_has_a_second(llama64, tokenizer, found):
    facts = [encode(tokenizer, f"The capital of France is {'so ' * i}", "Rome") for i in range(AT_ONCE + 4)]
    texts = list(found(llama64, facts, tokens=1, most=len(facts)))
    assert [text[:-1] for text in texts] == [fact.ids for fact in facts]


def test_texts_are_compared_behind_the_first_token_after_an_answer(llama64, tokenizer, facts):
    """Up to where the model would end; the last token is a label alone."""
    with preserve_state(llama64), torch.no_grad():
        found = texts_after_answers(llama64, tokenizer, facts)
        said = after_answers(llama64, tokenizer, facts, COMPARED, ENOUGH)
    assert [text.ids[:-1] for text in found] == list(said)
    for text, places in zip(found, said.values()):
        assert list(text.positions) == list(places) and len(text.answer) == len(places)


@pytest.mark.parametrize("more", [0, COMPARED, COMPARED + 1, ENOUGH])
def test_no_text_is_longer_than_the_model_takes(tokenizer, facts, more):
    """Of a fact that leaves too few tokens nothing is compared, and it is edited all the same."""
    limit = len(facts[0].ids) + more
    model = make_gpt2(n_positions=limit)
    with preserve_state(model), torch.no_grad():
        texts = texts_after_answers(model, tokenizer, facts[:1])
    assert all(len(text.ids) <= limit for text in texts) and bool(texts) == (more > COMPARED)
    settings = tiny_hparams(GPT2_DOWN, continuation_weight=5.0, num_steps=3, ensemble="magnitude")
    request = {"prompt": FACTS[0][0], "target_new": FACTS[0][1]}
    assert compute_edit(model, tokenizer, [request], settings).steps == 3


def test_their_divergence_is_the_literal_one(llama64, tokenizer, facts):
    """0 with gradient 0 before the edit; else the mean of KL(before || now) over all places, text by text."""
    with preserve_state(llama64), torch.no_grad():
        texts = texts_after_answers(llama64, tokenizer, facts)
        before = [llama64(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1) for text in texts]
    objective = Divergence.in_texts(llama64, texts, 2.0)
    weight = llama64.get_submodule(LLAMA_DOWN.format(3)).weight
    start = objective.loss(llama64)
    assert start.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(start, weight)[0].abs().max() < 1e-10
    with torch.no_grad():
        weight[1] += 0.3
        terms = []
        for text, was in zip(texts, before):
            now = llama64(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
            terms += [(was[at].exp() * (was[at] - now[at])).sum().item() for at in text.positions]
        assert objective.loss(llama64).item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)
        assert sum(terms) > 0.01


def test_trained_with_them_the_model_goes_on_more_as_before(llama, tokenizer):
    """Each fact's texts in turn, one a step; the answer is reached all the same."""
    left = []
    for weight in (0.0, 10.0):
        hparams = tiny_hparams(optimizer="polyak", num_steps=60, stop_loss=0.3, continuation_weight=weight, p=0.5)
        facts = [encode(tokenizer, REQUEST["prompt"], REQUEST["target_new"])]
        with preserve_state(llama), torch.no_grad():
            objective = Divergence.in_texts(llama, texts_after_answers(llama, tokenizer, facts))
        before = fingerprint(llama)
        edit = compute_edit(llama, tokenizer, [REQUEST], hparams)
        assert fingerprint(llama) == before and edit.losses[-1] < 0.3
        with edit.applied(llama), torch.no_grad():
            left.append(objective.loss(llama).item())
    assert left[1] < 0.5 * left[0]
    built = objectives_for(llama, tokenizer, [REQUEST], hparams)
    assert [(one.name, one.weight, len(one.texts(0))) for one in built] == [("continuation", 10.0, 1)]
    assert built[0].texts(0) != built[0].texts(1)


def special(tokenizer) -> set[int]:
    return {*tokenizer.all_special_ids}


def test_a_text_ends_before_the_end_token(llama64, facts, found):
    whole, shorter = found(llama64, facts[:1], tokens=4), 0
    for end in {text[-1] for text in whole}:
        tokenizer = make_tokenizer()
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        with preserve_state(llama64), torch.no_grad():
            texts = after_answers(llama64, tokenizer, facts[:1], 4, ENOUGH)
        assert texts and not any(end in text[places[0] :] for text, places in texts.items())
        shorter += any(len(places) < 4 for places in texts.values())
    assert shorter


@pytest.mark.parametrize(
    ("added", "mark"),
    [(".", True), (" ?", True), ("\n", True), (" (", True), ("。", True), (" and", False), (" ", False), ("s", False)],
)
def test_marks_of_any_script(added, mark):
    class Texts:
        def decode(self, ids):
            return "".join(ids)

    assert is_mark(Texts(), ["Ro", "me"], added) == mark


def test_the_likeliest_text_of_each_fact_comes_first(llama64, facts, found):
    whole = list(found(llama64, facts))
    assert [text[: len(fact.ids)] for text, fact in zip(whole, facts)] == [fact.ids for fact in facts]
    for most, number in ((0, 0), (3, 1), (8, 2), (ENOUGH, len(whole))):
        assert list(found(llama64, facts, most=most)) == whole[:number]


@pytest.mark.parametrize("most", [1, 2])
def test_a_first_text_that_is_too_long_is_cut_and_not_left_out(llama64, facts, found, most):
    whole = next(iter(found(llama64, facts)))
    begin = len(facts[0].ids)
    assert found(llama64, facts, most=most) == {whole[: begin + most]: range(begin, begin + most)}


@pytest.mark.parametrize("tokens", [3, 40])
def test_more_tokens_than_may_be_closed_spare_as_many_as_may(llama, tokenizer, facts, tokens, caplog):
    """Two of 40 inputs. What leaves the model no room at all is said."""
    closed = {}
    for continued in (2, tokens):
        with preserve_state(llama):
            found = input_projections(
                llama, tokenizer, [], [LLAMA_DOWN.format(1)], 1e-6, edited=facts[:1], continued=continued
            )
        closed[continued] = found[LLAMA_DOWN.format(1)].basis
    assert closed[2].shape == (2, 40) and torch.allclose(closed[tokens], closed[2], atol=1e-5) and not caplog.messages
    with preserve_state(llama):
        assert not input_projections(
            llama, tokenizer, [], [LLAMA_DOWN.format(1)], 1e-6, edited=facts[:1], continued=1000
        )
    assert "spare_continuation: nothing is spared" in caplog.text and "lower it (it is 1000)" in caplog.text


def test_a_fact_that_leaves_the_model_no_room_is_left_out(facts, found):
    model = make_llama(max_position_embeddings=len(facts[0].ids) + 2)
    texts = found(model, facts, tokens=2)
    assert {text[: len(facts[0].ids)] for text in texts} == {facts[0].ids}


def test_directions_of_what_follows_are_closed_and_the_answer_s_are_open(llama, tokenizer, facts, monkeypatch):
    monkeypatch.setattr(projection, "CONTINUED_SHARE", 0.5)
    name = LLAMA_DOWN.format(1)
    before = fingerprint(llama)
    with preserve_state(llama):
        project = input_projections(llama, tokenizer, [], [name], 1e-6, edited=facts[:1], continued=2)[name]
        texts = after_answers(llama, tokenizer, facts[:1], 2, 20)
    assert fingerprint(llama) == before and 1 < len(texts) <= BRANCHES
    for text, places in texts.items():
        x = inputs(llama, name, text)
        left = project(x).norm(dim=1) / x.norm(dim=1)
        assert left[list(places)].max() < 0.01 < 0.1 < left[places[0] - 2], "what predicts the answer may move"


def inputs(model, name: str, ids) -> torch.Tensor:
    """``(tokens, d1)``"""
    kept = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.append(args[0][0]))
    try:
        after(model, ids)
    finally:
        handle.remove()
    return kept[0]


def test_an_edit_leaves_it_alone_if_it_is_told_to(llama, tokenizer, found, monkeypatch):
    monkeypatch.setattr(projection, "CONTINUED_SHARE", 0.5)
    name = LLAMA_DOWN.format(1)
    settings = {"layers": [1], "input_projection": True, "neighbour_data": "embedded", "localization_data": None}
    fact = encode(tokenizer, REQUEST["prompt"], REQUEST["target_new"])
    texts = found(llama, [fact], tokens=2)
    moved = {}
    for tokens in (0, 2):
        edit = compute_edit(llama, tokenizer, [REQUEST], tiny_hparams(**settings, spare_continuation=tokens))
        _, delta = edit.deltas[name]
        moved[tokens] = max(
            (inputs(llama, name, text)[list(places)] @ delta.T).norm().item() for text, places in texts.items()
        )
        assert (inputs(llama, name, fact.ids) @ delta.T).norm() > 0
    assert moved[2] < 0.05 * moved[0]
