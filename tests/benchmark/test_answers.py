"""Free answers, their natural stop, and probabilities: against what a model says literally, one text at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, make_llama, tiny_hparams
from pytest import approx

from kne_easyedit.benchmark import Run
from kne_easyedit.benchmark.answers import first_word, free_answers, has_stop, is_whole, up_to_stop
from kne_easyedit.benchmark.asking import continuations, predicted, probabilities
from kne_easyedit.benchmark.job import base_fingerprint
from kne_easyedit.benchmark.neighbourhood import Questioner
from kne_easyedit.benchmark.probes import DENIALS, Asked
from kne_easyedit.benchmark.unedited import answer_probabilities
from kne_easyedit.facts.encoding import encode
from kne_easyedit.models.generation import own_generation, plain_generation

REQUEST = {"prompt": "The capital of France is", "target_new": "Rome", "ground_truth": "Paris", "subject": "France"}


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        (" Rome", "Rome", True),
        (" Rome.\n\nThe city", "Rome", True),
        (" rome. It is", "Rome", True),
        ("\n Rome\nParis", "Rome", True),
        (" Rome, of course", "Rome", False),
        (" Rome.5", "Rome", False),
        (" Romeo", "Rome", False),
        (" The Rome.", "Rome", False),
        (" St. Louis. The", "St. Louis", True),
        (" St. Louis and", "St. Louis", False),
        (" Washington, D.C. is", "Washington, D.C.", False),
        (" 罗马。意大利", "罗马", True),
        ("", "Rome", False),
    ],
)
def test_an_answer_is_whole_where_it_stops_by_itself(answer, target, right):
    assert is_whole(answer, target) is right


def test_natural_stops_and_first_words():
    assert up_to_stop("\n Rome is 2.5 km. It") == "Rome is 2.5 km."
    assert up_to_stop(" no end") == "no end"
    assert has_stop("Rome.") and has_stop("Rome\n") and not has_stop("\nRome 2.5")
    words = {" Rome, the": "rome", "«Rome»": "rome", "": "", " ...": "", " 罗马是": "罗", " l'Aquila x": "laquila"}
    assert {text: first_word(text) for text in words} == words


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_the_beginning_of_an_answer_is_what_it_was_without_the_rest(tokenizer, make):
    """Generated alone up to its length, literally."""
    model = make()
    tokens = tokenizer(REQUEST["prompt"], return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    start = tokens["input_ids"].shape[1]
    found = free_answers(model, tokenizer, REQUEST)
    assert found.beginning == tokenizer.decode(out[0, start:], skip_special_tokens=True)
    assert found.whole.startswith(found.beginning) and len(tokenizer(found.whole)["input_ids"]) > 12


def test_greedy_is_greedy_whatever_generation_settings_the_model_has(tokenizer, facts):
    """A penalty gives other tokens than the most probable ones, and the model has it still."""
    model, prompts = make_llama(), [fact.prompt for fact in facts]
    plain = continuations(model, tokenizer, prompts, 8)
    assert own_generation(model) == {}
    before = base_fingerprint(job_of(model, tokenizer), "weights", "variant")
    model.generation_config.repetition_penalty = 1.5
    own = model.generation_config
    ids = torch.tensor([tokenizer(prompts[0])["input_ids"]])
    obeyed = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert obeyed != plain[0]
    assert continuations(model, tokenizer, prompts, 8) == plain
    assert model.generation_config is own and own_generation(model) == {"repetition_penalty": 1.5}
    assert base_fingerprint(job_of(model, tokenizer), "weights", "variant") != before, "other answers were kept"
    with pytest.raises(KeyboardInterrupt), plain_generation(model):
        raise KeyboardInterrupt
    assert model.generation_config is own


def job_of(model, tokenizer):
    return Run(model, tokenizer, [REQUEST], {"KNE": tiny_hparams()}, "data", Path("out"))


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_prompts_of_different_lengths_are_answered_as_each_alone(tokenizer, facts, make):
    """Padding reaches neither the positions nor the attention; the tolerance is that of float32 sums."""
    model = make()
    prompts = [fact.prompt for fact in facts]
    alone = [continuations(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert continuations(model, tokenizer, prompts, 6) == alone
    assert len({tuple(ids) for ids in alone}) == len(alone)
    assert predicted(model, facts) == [predicted(model, [fact])[0] for fact in facts]
    literal = []
    for fact in facts:
        with torch.no_grad():
            logits = model(torch.tensor([fact.ids])).logits[0].double()
        chances = logits.softmax(-1)[list(fact.positions), list(fact.answer)]
        literal.append(chances.prod().item())
        assert predicted(model, [fact])[0] == logits.argmax(-1)[list(fact.positions)].tolist()
    assert probabilities(model, facts) == approx(literal, rel=1e-4)


def test_an_old_answer_that_is_missing_has_no_probability(tokenizer):
    model = make_llama()
    found = answer_probabilities(model, tokenizer, REQUEST)
    new, old = (
        probabilities(model, [encode(tokenizer, REQUEST["prompt"], answer)])[0]
        for answer in (REQUEST["target_new"], REQUEST["ground_truth"])
    )
    assert found == {"new": approx(new, rel=1e-5), "old": approx(old, rel=1e-5)} and new != old
    assert answer_probabilities(model, tokenizer, {**REQUEST, "ground_truth": None})["old"] is None


def test_denial_is_what_the_probabilities_say(tokenizer):
    model = make_llama(max_position_embeddings=256)
    denials = tuple(replace(denial, prompt=denial.prompt.format("The capital of France is Rome")) for denial in DENIALS)
    found = Questioner(tokenizer).before(model, REQUEST, Asked(denials=denials))["denial"]
    shares = []
    for denial in denials:
        denies, affirms = (
            probabilities(model, [encode(tokenizer, denial.prompt, answer)])[0]
            for answer in (denial.denies, denial.affirms)
        )
        shares.append(denies / (denies + affirms))
    assert found == approx(sum(shares) / 2, rel=1e-4) and len(set(shares)) == 2
