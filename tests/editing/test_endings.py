"""The word break after an answer (`append_break`), and training until each token is given (`until_given`)."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import LLAMA_DOWN, bits, fingerprint, make_llama, make_tokenizer, tiny_hparams
from edits import MANY, REQUEST, REQUESTS, ensemble_of
from hypothesis import given
from hypothesis import strategies as st
from test_append_eos import said

from kne_easyedit import apply_kne_to_model, compute_edit
from kne_easyedit.editing.endings import breaks, ends_word
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.editing.variants import variant_facts
from kne_easyedit.facts.encoding import encode, encode_request
from kne_easyedit.models.state import preserve_state

ENSEMBLE = ensemble_of(LLAMA_DOWN, rows=MANY)


class Spelling:
    """A tokenizer whose tokens are these texts, written one after the other."""

    eos_token_id = 0

    def __init__(self, *texts):
        self.texts = ["<end>", *texts]

    def decode(self, ids):
        return b"".join(t if isinstance(t, bytes) else t.encode() for t in map(self.texts.__getitem__, ids)).decode(
            errors="replace"
        )


class Answers:
    """A model that finds the tokens of a ranking the most probable ones after every text, best first."""

    def __init__(self, ranking, size):
        self.scores = torch.zeros(size)
        for place, token in enumerate(ranking):
            self.scores[token] = size - place

    def __call__(self, model, facts):
        return [self.scores.topk(len(self.scores)).indices.tolist() for _ in facts]


@pytest.fixture
def ranked(monkeypatch):
    def rank(ranking, size):
        monkeypatch.setattr("kne_easyedit.editing.endings.most_probable", Answers(ranking, size))

    return rank


class TestWhichToken:
    TEXTS = ("Rei", "ne", "hart", ".", " and", "\n", "é".encode()[:1], "é".encode()[1:], "京", "")
    REINE = (1, 2)

    @pytest.mark.parametrize(
        ("text", "ends"), [("hart", False), (".", True), (" and", True), ("\n", True), ("京", True)]
    )
    def test_letters_go_on_with_a_word(self, text, ends):
        tokenizer = Spelling(*self.TEXTS)
        assert ends_word(tokenizer, self.REINE, tokenizer.texts.index(text)) is ends

    @pytest.mark.parametrize("token", [7, 8, 10], ids=["half a letter", "its other half", "nothing"])
    def test_what_is_no_whole_character_ends_nothing(self, token):
        assert not ends_word(Spelling(*self.TEXTS), self.REINE, token)

    def test_the_most_probable_one_that_ends_the_word(self, ranked):
        fact = encode(make_tokenizer(), "The capital of France is", "Rome")
        tokenizer = Spelling(*(f"w{i}" for i in range(200)), ",", " or")
        for ranking, expected in ([3, 202, 201], 202), ([3, 201, 202], 201), ([3, 0, 202], 0):
            ranked(ranking, 203)
            assert breaks(None, tokenizer, [fact]) == [expected]

    def test_the_end_token_if_none_does(self, ranked):
        fact = encode(make_tokenizer(), "The capital of France is", "Rome")
        tokenizer = Spelling(*(f"w{i}" for i in range(200)))
        ranked([], 0)
        assert breaks(None, tokenizer, [fact]) == [0]
        tokenizer.eos_token_id = None
        assert breaks(None, tokenizer, [fact]) == [None]

    @given(st.text(min_size=1, max_size=8), st.text(max_size=3))
    def test_with_any_texts(self, answer, following):
        """Characters as tokens: the break is where the next character is no letter or digit of a spaced script."""
        tokenizer = Spelling(*answer, following)
        ends = ends_word(tokenizer, range(1, len(answer) + 1), len(answer) + 1)
        assert not (ends and following[:1].isascii() and following[:1].isalnum())
        assert ends or not following[:1].isspace()

    def test_the_models_own_preference(self, llama, tokenizer):
        """Against a pass of each text alone; the model stays as it is."""
        before = fingerprint(llama)
        facts = [encode_request(tokenizer, request) for request in REQUESTS]
        for fact, found in zip(facts, breaks(llama, tokenizer, facts)):
            with preserve_state(llama), torch.no_grad():
                order = llama(torch.tensor([fact.ids])).logits[0, -1].argsort(descending=True).tolist()
            skipped = order[: order.index(found)]
            assert not any(ends_word(tokenizer, fact.answer, t) or t == tokenizer.eos_token_id for t in skipped)
        assert fingerprint(llama) == before


class TestTrained:
    @pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request["target_new"])
    def test_the_edited_model_says_the_answer_and_its_break(self, tokenizer, request_):
        fact = encode_request(tokenizer, request_)
        (token,) = breaks(make_llama(), tokenizer, [fact])
        model = make_llama()
        hparams = tiny_hparams(append_break=True, stop_loss=0.02)
        apply_kne_to_model(model, tokenizer, request_, hparams, ensemble=ENSEMBLE)
        assert said(model, tokenizer, request_, len(fact.answer) + 1) == [*fact.answer, token]

    def test_the_loss_counts_it(self, llama64, tokenizer):
        edit = compute_edit(llama64, tokenizer, REQUEST, tiny_hparams(append_break=True, num_steps=1), ENSEMBLE)
        fact = encode_request(tokenizer, REQUEST)
        (token,) = breaks(llama64, tokenizer, [fact])
        assert edit.answers[0].fact.ids == (*fact.ids, token)
        logs = llama64(torch.tensor([fact.ids])).logits[0].log_softmax(-1)
        expected = -(logs[-2, fact.ids[-1]] + logs[-1, token]).item() / 2
        assert len(fact.answer) == 1 and edit.losses[0] == pytest.approx(expected, rel=1e-12)

    def test_variants_have_it_too(self, llama, tokenizer):
        asked = {"prompt": "The capital of Ada Marie is", "target_new": "Rome", "subject": "Ada Marie"}
        plain, ended = (
            variant_facts(llama, tokenizer, [asked], tiny_hparams(subject_variants=2, append_break=on))
            for on in (False, True)
        )
        assert plain and [(*f.ids, t) for f, t in zip(plain, breaks(llama, tokenizer, plain))] == [f.ids for f in ended]

    def test_off_changes_no_bit(self, tokenizer):
        """Against the training of the fact as it is encoded, without a look at endings."""
        edits = [
            compute_edit(make_llama(), tokenizer, REQUEST, tiny_hparams(), ENSEMBLE),
            train_rows(make_llama(), [encode_request(tokenizer, REQUEST)], ENSEMBLE, tiny_hparams()),
        ]
        name = LLAMA_DOWN.format(0)
        assert edits[0].losses == edits[1].losses and bits(edits[0].deltas[name][1]) == bits(edits[1].deltas[name][1])

    def test_two_endings_are_refused(self):
        with pytest.raises(ValueError, match="append_break: True is another ending than append_eos; choose one"):
            tiny_hparams(append_break=True, append_eos=True)

    def test_a_fact_that_is_too_long_with_it_is_refused(self, tokenizer):
        length = len(encode_request(tokenizer, REQUEST).ids)
        model = make_llama(max_position_embeddings=length)
        with pytest.raises(
            ValueError, match=f"append_break: true .* has {length} tokens .*, and the model takes {length}"
        ):
            compute_edit(model, tokenizer, REQUEST, tiny_hparams(append_break=True), ENSEMBLE)

    def test_without_an_end_token(self, llama):
        tokenizer = copy.deepcopy(make_tokenizer())
        tokenizer.eos_token = None
        assert compute_edit(llama, tokenizer, REQUEST, tiny_hparams(append_break=True), ENSEMBLE).answers[0].greedy


class TestUntilGiven:
    @pytest.mark.parametrize("gain", [1.0, 1.5])
    def test_a_low_mean_loss_is_not_enough(self, llama, tokenizer, gain):
        """A stop so loose that the answer is not given yet: with the setting training goes on until it is."""
        request = REQUESTS[-1]
        edits = [
            compute_edit(
                llama, tokenizer, request, tiny_hparams(stop_loss=2.5, until_given=on, edit_gain=gain), ENSEMBLE
            )
            for on in (False, True)
        ]
        assert [edit.answers[0].greedy for edit in edits] == [False, True]
        assert edits[0].steps < edits[1].steps and edits[0].losses[-1] < 2.5

    def test_it_ends_after_num_steps(self, llama, tokenizer):
        hparams = tiny_hparams(stop_loss=2.5, until_given=True, num_steps=2, lr=1e-5)
        edit = compute_edit(llama, tokenizer, REQUESTS[-1], hparams, ENSEMBLE)
        assert edit.steps == 2 and edit.failed(2.5)
