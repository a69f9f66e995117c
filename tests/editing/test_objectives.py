"""Objectives beside the answers' cross-entropy: the divergence penalty. Off, they change nothing."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import FACTS, LLAMA_DOWN, bits, fingerprint, make_llama, make_tokenizer, tiny_hparams, weights
from edits import ensemble_of, full_deltas, masks_of
from pytest import approx
from reference import literal_row_training

from kne_easyedit import apply_kne_to_model, compute_edit, restore
from kne_easyedit.editing import objectives as objectives_module
from kne_easyedit.editing.adapter import ADAPTER, row_adapter
from kne_easyedit.editing.divergence import Divergence
from kne_easyedit.editing.losses import answer_loss
from kne_easyedit.editing.neighbours import ASKED
from kne_easyedit.editing.objectives import (
    OBJECTIVES,
    Alone,
    SharedObjective,
    objectives_for,
    unrelated_prompts,
)
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.facts.encoding import collate
from kne_easyedit.facts.neighbours import is_held_out
from kne_easyedit.facts.records import with_chat_template
from kne_easyedit.models.state import preserve_state

PROMPTS = [prompt for prompt, _ in FACTS]
REQUEST = {"prompt": "The capital of Spain is", "target_new": "Oslo", "subject": "Spain"}


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": p, "target_new": t} for p, t in [*FACTS, (REQUEST["prompt"], "Oslo")]]))
    return str(path)


def test_the_divergence_of_an_unchanged_model_is_zero_and_of_a_changed_one_is_that_of_its_definition(double_precision):
    model, tokenizer = make_llama(dtype=torch.float64), make_tokenizer()
    divergence = Divergence.after_prompts(model, tokenizer, PROMPTS)
    assert divergence.loss(model).item() == approx(0, abs=1e-12)
    with torch.no_grad():
        before = [model(torch.tensor([tokenizer(p)["input_ids"]])).logits[0, -1].softmax(-1) for p in PROMPTS]
        model.get_submodule(LLAMA_DOWN.format(1)).weight.mul_(1.5)
        after = [model(torch.tensor([tokenizer(p)["input_ids"]])).logits[0, -1].softmax(-1) for p in PROMPTS]
    literal = sum((b * (b / a).log()).sum().item() for b, a in zip(before, after)) / len(PROMPTS)
    assert literal > 1e-3
    assert divergence.loss(model).item() == approx(literal, rel=1e-9)


def edited(prompts_file, **settings) -> tuple[float, dict]:
    """The divergence on unrelated prompts that an edit leaves, and its weights."""
    model, tokenizer = make_llama(), make_tokenizer()
    hparams = tiny_hparams(stop_loss=0.05, lr=0.02, **settings)
    divergence = Divergence.after_prompts(model, tokenizer, PROMPTS)
    before = fingerprint(model)
    _, originals = apply_kne_to_model(model, tokenizer, [REQUEST], hparams, return_orig_weights=True)
    found = divergence.loss(model).item(), weights(model)
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
    assert unrelated_prompts([REQUEST], hparams) == PROMPTS
    hparams.kl_size = 2
    first = {**REQUEST, "prompt": PROMPTS[0], "subject": None}
    assert unrelated_prompts([first], hparams) == [PROMPTS[1], PROMPTS[2]]
    assert unrelated_prompts([{**first, "prompt": f" {PROMPTS[0]}  "}], hparams) == [PROMPTS[1], PROMPTS[2]]
    probes = {"Reasoning": {"prompt": [PROMPTS[0]], "ground_truth": ["Lima"]}}
    assert unrelated_prompts([{**REQUEST, "portability": probes}], hparams) == [PROMPTS[1], PROMPTS[2]]
    with pytest.raises(ValueError, match=r"kl_data: .* holds no prompt beside"):
        unrelated_prompts([REQUEST, *({**first, "prompt": prompt} for prompt in PROMPTS)], hparams)


def test_unrelated_prompts_are_of_no_subject_that_is_edited_asked_or_held_out(tmp_path):
    """Whatever the words. Of these France alone is held out."""
    path = tmp_path / "facts.json"
    subjects = ["Italy", "France", "Peru", "Germany", "Poland"]
    path.write_text(
        json.dumps([{"prompt": f"The capital of {s} is", "target_new": "Rome", "subject": s} for s in subjects])
    )
    hparams = tiny_hparams(kl_weight=1.0, kl_data=str(path), kl_size=8)

    def chosen(*requests):
        return [prompt.split()[3] for prompt in unrelated_prompts(requests, hparams)]

    other = {"prompt": "The mother of Ada is", "target_new": "Marie", "subject": "Ada"}
    assert [is_held_out(name) for name in subjects] == [False, True, False, False, False]
    assert chosen(other) == ["Italy", "Peru", "Germany", "Poland"]
    assert chosen({"prompt": "What is the capital of Peru?", "target_new": "Oslo", "subject": "Peru"}) == [
        "Italy",
        "Germany",
        "Poland",
    ]
    assert chosen({"prompt": "What is the capital of Peru?", "target_new": "Oslo"}) == ["Italy", "Germany", "Poland"]
    own = {"Neighborhood": {"prompt": ["The river of Germany is"], "ground_truth": ["Rhine"]}}
    assert chosen(other, {**other, "locality": own}) == ["Italy", "Peru", "Poland"]
    assert chosen({**other, ASKED: ["Poland is in"]}) == ["Italy", "Peru", "Germany"]
    hparams.kl_size = 2
    assert chosen(other) == ["Italy", "Peru"]


def test_unrelated_prompts_are_told_as_they_are_said(prompts_file):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Say : {{ m['content'] }}{% endfor %} !"
    hparams = tiny_hparams(kl_weight=1.0, kl_data=prompts_file, kl_size=8, use_chat_template=True)
    edited = with_chat_template({**REQUEST, "prompt": PROMPTS[0], "subject": None}, tokenizer)
    assert unrelated_prompts([edited], hparams, tokenizer) == [*PROMPTS[1:], REQUEST["prompt"]]


def literal(model, tokenizer, facts, hparams, kl_weight):
    examples = [(fact.ids, fact.prompt_length) for fact in facts]
    masks = masks_of(model, ensemble_of(LLAMA_DOWN))
    kl_ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    kl_texts = [([*ids, 0], len(ids)) for ids in kl_ids]
    return literal_row_training(
        model,
        examples,
        masks,
        hparams.lr,
        hparams.num_steps,
        stop_loss=hparams.stop_loss,
        kl_weight=kl_weight,
        kl_texts=kl_texts,
    )


def largest(ours: dict, theirs: dict) -> float:
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def test_training_with_the_penalty_is_the_literal_one(llama64, tokenizer, facts):
    """Losses and deltas equal full-matrix training that adds the divergence; without it they differ."""
    hparams = tiny_hparams(stop_loss=0, num_steps=6)
    penalty = Divergence.after_prompts(llama64, tokenizer, PROMPTS, weight=3.0)
    edit = train_rows(llama64, facts[:1], ensemble_of(LLAMA_DOWN), hparams, [penalty])
    expected, losses = literal(llama64, tokenizer, facts[:1], hparams, 3.0)
    assert largest(full_deltas(llama64, edit), expected) < 1e-9
    assert edit.losses == approx(losses, abs=1e-9)
    without, _ = literal(llama64, tokenizer, facts[:1], hparams, 0.0)
    assert largest(full_deltas(llama64, edit), without) > 1e-3


class Constant:
    """An objective of one's own."""

    name, weight = "constant", 2.0

    def __init__(self, value):
        self.value, self.models = value, []

    def loss(self, model):
        self.models.append(model)
        return torch.tensor(self.value)


def bits_of(edit):
    return edit.losses, {name: (rows, bits(delta)) for name, (rows, delta) in edit.deltas.items()}


def test_without_objectives_training_is_the_papers_bit_by_bit(llama, tokenizer, facts, prompts_file):
    hparams = tiny_hparams(stop_loss=0, num_steps=4)
    plain = bits_of(train_rows(llama, facts, ensemble_of(LLAMA_DOWN), hparams))
    assert bits_of(train_rows(llama, facts, ensemble_of(LLAMA_DOWN), hparams, objectives=[])) == plain
    off = tiny_hparams(stop_loss=0, num_steps=4, kl_weight=0.0, kl_data=prompts_file)
    planned = objectives_for(llama, tokenizer, [REQUEST], off)
    assert planned == [] and bits_of(train_rows(llama, facts, ensemble_of(LLAMA_DOWN), off, planned)) == plain
    penalty = Divergence.after_prompts(llama, tokenizer, PROMPTS)
    assert bits_of(train_rows(llama, facts, ensemble_of(LLAMA_DOWN), hparams, objectives=[penalty])) != plain


def test_the_answers_alone_decide_when_training_stops(llama, facts):
    """An objective that stays large neither delays the stop nor enters the recorded losses."""
    hparams = tiny_hparams(num_steps=30, stop_loss=2.0)
    plain = train_rows(llama, facts[:1], ensemble_of(LLAMA_DOWN), hparams)
    large = Constant(100.0)
    edit = train_rows(llama, facts[:1], ensemble_of(LLAMA_DOWN), hparams, [large])
    assert edit.losses == plain.losses and 0 < edit.steps < 30
    assert large.models == [llama] * edit.steps


def test_terms_are_weighted_and_added(llama64, tokenizer, facts):
    """One objective of weight 3 trains as two that share the weight; one of weight 1 does not."""
    hparams = tiny_hparams(stop_loss=0, num_steps=4)

    def trained(*objective_weights):
        terms = [Divergence.after_prompts(llama64, tokenizer, PROMPTS, weight) for weight in objective_weights]
        return full_deltas(llama64, train_rows(llama64, facts[:1], ensemble_of(LLAMA_DOWN), hparams, terms))

    assert largest(trained(3.0), trained(1.0, 2.0)) < 1e-9
    assert largest(trained(3.0), trained(1.0)) > 1e-4


def test_the_gradient_of_the_penalty_is_zero_at_the_start(llama64, tokenizer, facts):
    """The start is the identity, where a divergence has its minimum. Conversely, neither the answers' loss nor the
    penalty of a changed model has a gradient of zero."""
    penalty = Divergence.after_prompts(llama64, tokenizer, PROMPTS)
    hparams = tiny_hparams()
    with preserve_state(llama64), row_adapter(llama64, ensemble_of(LLAMA_DOWN), hparams) as layers:
        parameters = [layer.lora_A[ADAPTER].weight for layer in layers.values()]

        def gradient(loss):
            return max(part.abs().max().item() for part in torch.autograd.grad(loss, parameters))

        assert gradient(penalty.loss(llama64)) < 1e-12
        assert gradient(answer_loss(llama64, collate(facts))) > 1e-2
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.1)
        assert gradient(penalty.loss(llama64)) > 1e-3


def test_alone_the_answers_pass_keeps_its_bits(llama, tokenizer, facts):
    """The divergence's value is the same in either pass; alone, the answers' loss of the first step is bit for bit that
    of training without. In one pass with the texts it is so up to rounding only."""
    hparams = tiny_hparams(stop_loss=0, num_steps=3)
    shared = Divergence.after_prompts(llama, tokenizer, PROMPTS, 3.0)
    assert isinstance(shared, SharedObjective) and not isinstance(Alone(shared), SharedObjective)
    edits = [
        train_rows(llama, facts[:1], ensemble_of(LLAMA_DOWN), hparams, objectives)
        for objectives in ([], [Alone(shared)], [shared])
    ]
    plain, alone, together = (edit.losses for edit in edits)
    assert alone[0] == plain[0] == approx(together[0], rel=1e-5)
    assert alone == approx(together, rel=1e-4) and alone[1:] != plain[1:]


def test_objectives_are_planned_from_the_settings(llama, tokenizer, prompts_file):
    before = fingerprint(llama)
    hparams = tiny_hparams(kl_weight=2.5, kl_data=prompts_file, kl_size=2)
    (penalty,) = objectives_for(llama, tokenizer, [REQUEST], hparams)
    assert (penalty.name, penalty.weight) == ("kl", 2.5)
    assert fingerprint(llama) == before


def test_another_objective_is_one_line_in_the_table(llama, tokenizer, monkeypatch):
    """`compute_edit` builds it when the setting that is its weight is not 0."""
    constant = Constant(1.0)
    seen = []

    def build(model, tokenizer, requests, hparams):
        seen.append([request["prompt"] for request in requests])
        return constant

    monkeypatch.setattr(objectives_module, "OBJECTIVES", {**OBJECTIVES, "constant_weight": build})
    hparams = tiny_hparams(num_steps=2, stop_loss=0)
    hparams.constant_weight = 0.0
    compute_edit(llama, tokenizer, [REQUEST], hparams)
    assert not seen and not constant.models
    hparams.constant_weight = 2.0
    compute_edit(llama, tokenizer, [REQUEST], hparams)
    assert seen == [[REQUEST["prompt"]]] and len(constant.models) == 2
