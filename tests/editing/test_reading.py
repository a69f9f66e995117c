"""Texts that are read together: each place once, the head where it is asked, and the same logits as alone."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import LLAMA_DOWN, fingerprint, tiny_hparams
from edits import REQUEST, ensemble_of
from families import FAMILIES, OTHERS, made, make
from torch import nn

from kne_easyedit import compute_edit
from kne_easyedit.editing import reading
from kne_easyedit.editing.divergence import continuations
from kne_easyedit.editing.reading import learn_head, predicted_logits, read_together
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.models.state import preserve_state

CHANGED_BEHIND_THE_HEAD = ["gemma2"]
"""Their logits are capped."""


def fact(ids, prompt_length) -> Fact:
    return Fact("", "", tuple(ids), prompt_length)


PROMPT_AND_ANSWER = (5, 9, 7, 8)
FACTS = [
    fact((*PROMPT_AND_ANSWER, 3), 2),  # with its ending
    fact((4, 9, 6, 2, 10), 1),
    fact((*PROMPT_AND_ANSWER, 11, 12, 13, 1), 5),  # what follows the answer
    fact((4, 9, 6), 2),
    fact((4, 9, 2), 2),  # another answer to the same
]
"""No text is shorter than the longest by a window of the tiny models: a row of padding alone would not be finite."""
TOLERANCE = 1e-5
"""Some compute softmax or logits in float32; logits are up to 15."""


def alone(model, facts) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([one.ids])).logits[0, list(one.positions)] for one in facts])


def head_rows(model) -> list[int]:
    """Positions of which the head of a model computes logits from now on, pass by pass."""
    found: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: found.append(out[..., 0].numel()))
    return found


def test_a_beginning_is_read_once():
    together = read_together(FACTS)
    assert together.input_ids.tolist() == [[*PROMPT_AND_ANSWER, 11, 12, 13], [4, 9, 6, 2, 0, 0, 0]]
    assert together.attention_mask.tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert together.rows.tolist() == [0] * 3 + [1] * 4 + [0] * 3 + [1, 1]
    assert together.positions.tolist() == [1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 1, 1]
    assert together.labels.tolist() == [7, 8, 3, 9, 6, 2, 10, 12, 13, 1, 6, 2]


def test_any_facts_have_all_their_places_in_as_few_texts_as_can_be():
    draw = random.Random(1)
    for _ in range(200):
        facts = []
        for _ in range(draw.randint(1, 8)):
            ids = tuple(draw.choice((2, 3)) for _ in range(draw.randint(2, 6)))
            facts.append(fact(ids, draw.randint(1, len(ids) - 1)))
        together = read_together(facts)
        ids, mask = together.input_ids.tolist(), together.attention_mask.tolist()
        texts = [tuple(row[: sum(there)]) for row, there in zip(ids, mask)]
        inputs = {one.ids[:-1] for one in facts}
        longest = {ids for ids in inputs if not any(ids != other and ids == other[: len(ids)] for other in inputs)}
        assert set(texts) == longest and len(texts) == len(longest)
        places = zip(together.rows.tolist(), together.positions.tolist(), together.labels.tolist(), strict=True)
        read = [(texts[row][: at + 1], label) for row, at, label in places]
        assert read == [(one.ids[: at + 1], one.ids[at + 1]) for one in facts for at in one.positions]


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_logits_are_those_of_each_alone(name):
    """With and without a head that is known; most models' are, and then it reads no more than it must."""
    model = make(name)
    before = fingerprint(model)
    with preserve_state(model), torch.no_grad():
        expected = alone(model, FACTS)
        together = read_together(FACTS)
        whole = predicted_logits(model, together)
        learn_head(model)
        read = head_rows(model)
        chosen = predicted_logits(model, together)
    for logits in (whole, chosen):
        assert torch.allclose(logits, expected, rtol=0, atol=TOLERANCE)
    known = name not in CHANGED_BEHIND_THE_HEAD
    assert read == [len(together.labels) if known else together.input_ids.numel()]
    model.get_output_embeddings()._forward_hooks.clear()
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_continuations_ask_the_head_once_for_each_text(name, tokens):
    prompts = [[5, 9, 7], [4], [6, 3, 8, 2]]
    model = make(name)
    expected, before = continuations(made(name), prompts, tokens, None)
    with preserve_state(model):
        learn_head(model)
        read = head_rows(model)
        said, found = continuations(model, prompts, tokens, None)
    assert said == expected and read == [len(prompts)] * tokens
    for one, other in zip(found, before):
        assert torch.allclose(one, other, rtol=0, atol=TOLERANCE)


class TestKnownHeads:
    def test_gradients_flow_through_the_places_alone(self, llama64):
        grads = []
        weight = llama64.get_submodule(LLAMA_DOWN.format(1)).weight
        for learn in (False, True):
            with preserve_state(llama64), torch.enable_grad():
                if learn:
                    learn_head(llama64)
                weight.requires_grad_(True)
                grads += torch.autograd.grad(predicted_logits(llama64, read_together(FACTS)).square().sum(), weight)
        assert grads[0].any() and torch.allclose(*grads, rtol=1e-9, atol=1e-9)

    def test_another_head_is_not_known(self, llama):
        with preserve_state(llama):
            learn_head(llama)
            assert reading._known_head(llama) is llama.lm_head
        llama.set_output_embeddings(nn.Linear(*reversed(llama.lm_head.weight.shape), bias=False))
        assert reading._known_head(llama) is None
        read = head_rows(llama)
        with preserve_state(llama), torch.no_grad():
            together = read_together(FACTS)
            logits = predicted_logits(llama, together)
            assert read == [together.input_ids.numel()]
            assert torch.allclose(logits, alone(llama, FACTS), rtol=0, atol=1e-4)

    def test_a_head_whose_output_is_changed_by_a_hook_is_not_trusted_blindly(self, llama):
        """The logits are what the model returns, with the hook."""
        llama.register_forward_hook(lambda _, args, out: type(out)(logits=2 * out.logits))
        with preserve_state(llama), torch.no_grad():
            learn_head(llama)
            assert reading._known_head(llama) is None
            expected = alone(llama, FACTS)
            assert torch.allclose(predicted_logits(llama, read_together(FACTS)), expected, rtol=0, atol=1e-4)

    def test_a_model_without_one(self, llama, monkeypatch):
        monkeypatch.setattr(type(llama), "get_output_embeddings", lambda self: None)
        with preserve_state(llama), torch.no_grad():
            learn_head(llama)
            expected = alone(llama, FACTS)
            assert torch.allclose(predicted_logits(llama, read_together(FACTS)), expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("name", ["llama", *CHANGED_BEHIND_THE_HEAD])
    def test_it_is_asked_once(self, name):
        """Whatever the answer is."""
        model = make(name)
        with preserve_state(model):
            read = head_rows(model)
            learn_head(model)
            learn_head(model)
        assert read == [2]


def test_an_edit_reads_its_fact_in_what_follows_it(llama, tokenizer):
    """Without variants a step has one text, and the head reads the places that predict something."""
    hparams = tiny_hparams(continuation_weight=1.0, stop_loss=0, num_steps=3)
    seen, heads = [], []
    llama.model.layers[0].register_forward_hook(lambda _, args, out: seen.append(out.shape[:2]))
    llama.lm_head.register_forward_hook(lambda _, args, out: heads.append(out.shape[:2]))
    compute_edit(llama, tokenizer, REQUEST, hparams, ensemble_of(LLAMA_DOWN))
    (texts, length), (rows, places) = seen[-1], heads[-1]
    assert texts == rows == 1 and places < length


def test_without_objectives_the_head_is_not_asked_about(llama, tokenizer):
    """The paper's settings: what the model runs is what it ran before."""
    compute_edit(llama, tokenizer, REQUEST, tiny_hparams(num_steps=2), ensemble_of(LLAMA_DOWN))
    assert llama not in reading._heads
