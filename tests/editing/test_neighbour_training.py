"""Training with neighbours: the divergence at their continuations, in the answers' pass, some of them in each step."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from conftest import FACTS, LLAMA_DOWN, fingerprint, make_tokenizer, tiny_hparams
from edits import MANY, REQUEST, ensemble_of, full_deltas, masks_of
from families import made
from pytest import approx
from reference import literal_continuation, literal_row_training

from kne_easyedit import compute_edit, restore, write_rows
from kne_easyedit._util.settings import replace_settings
from kne_easyedit.editing.adapter import ADAPTER, row_adapter
from kne_easyedit.editing.divergence import Divergence, continuations
from kne_easyedit.editing.neighbours import neighbour_prompts, neighbour_source, neighbours_by_request
from kne_easyedit.editing.objectives import objectives_for
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.facts.neighbours import FactPool, KnownFact, is_held_out
from kne_easyedit.facts.records import with_chat_template
from kne_easyedit.models.state import preserve_state

PROMPTS = [*[prompt for prompt, _ in FACTS], "The mother of Marie was", "Spain is"]
TOKENS = 3


def encoded(prompts=PROMPTS):
    return [make_tokenizer()(prompt)["input_ids"] for prompt in prompts]


def literal_texts(model, tokens=TOKENS, end=1):
    return [([*ids, *literal_continuation(model, ids, tokens, end)], len(ids)) for ids in encoded()]


class TestContinuations:
    @pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gptj", "gpt2", "bloom", "opt"])
    def test_are_the_models_own(self, name, double_precision):
        """Prompts of different lengths in one batch, with a cache: the tokens and distributions of single passes."""
        model = made(name)
        said, before = continuations(model, encoded(), 4, None)
        for ids, answer, rows in zip(encoded(), said, before):
            assert answer == literal_continuation(model, ids, 4)
            with torch.no_grad():
                literal = model(input_ids=torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            assert (rows - literal).abs().max() < 1e-9

    def test_end_with_the_end_token(self, llama64):
        said, _ = continuations(llama64, encoded(), 4, None)
        end = said[0][1]
        shorter, before = continuations(llama64, encoded(), 4, end)
        assert shorter[0] == said[0][:2] and before[0].shape == (2, before[0].shape[1])
        assert [row[: row.index(end) + 1] if end in row else row for row in said] == shorter


class TestDivergence:
    def test_is_zero_at_the_start_and_that_of_its_definition_later(self, llama64, tokenizer):
        divergence = Divergence.after_prompts(llama64, tokenizer, PROMPTS, tokens=TOKENS)
        assert divergence.loss(llama64).item() == approx(0, abs=1e-12)
        texts = literal_texts(llama64)
        assert [(list(text.ids), text.prompt_length) for text in divergence.texts(0)] == texts

        def distributions():
            with torch.no_grad():
                return [llama64(torch.tensor([ids])).logits[0, n - 1 : -1].softmax(-1) for ids, n in texts]

        before = distributions()
        with torch.no_grad():
            llama64.get_submodule(LLAMA_DOWN.format(1)).weight.mul_(1.5)
        parts = [(b * (b / a).log()).sum(-1) for b, a in zip(before, distributions())]
        assert divergence.loss(llama64).item() == approx(torch.cat(parts).mean().item(), rel=1e-9) and max(
            map(max, parts)
        )

    def test_its_gradient_is_zero_at_the_start(self, llama64, tokenizer, facts):
        penalty = Divergence.after_prompts(llama64, tokenizer, PROMPTS, tokens=TOKENS)
        with preserve_state(llama64), row_adapter(llama64, ensemble_of(LLAMA_DOWN), tiny_hparams()) as layers:
            parameters = [layer.lora_A[ADAPTER].weight for layer in layers.values()]

            def gradient():
                return max(g.abs().max().item() for g in torch.autograd.grad(penalty.loss(llama64), parameters))

            assert gradient() < 1e-12
            with torch.no_grad():
                parameters[0].add_(0.1)
            assert gradient() > 1e-3

    def test_every_text_has_its_turn(self, llama, tokenizer):
        divergence = Divergence.after_prompts(llama, tokenizer, PROMPTS, tokens=TOKENS, per_step=2)
        turns = [[text.prompt for text in divergence.texts(step)] for step in range(5)]
        assert turns[0] == PROMPTS[:2] and turns[2] == [PROMPTS[4], PROMPTS[0]]
        assert sorted(prompt for turn in turns for prompt in turn) == sorted(PROMPTS * 2)
        assert len(Divergence.after_prompts(llama, tokenizer, PROMPTS, per_step=99).texts(3)) == len(PROMPTS)

    def test_few_at_once_or_many_are_the_same(self, llama64, tokenizer, monkeypatch):
        whole = Divergence.after_prompts(llama64, tokenizer, PROMPTS, tokens=TOKENS, per_step=1)
        monkeypatch.setattr("kne_easyedit.editing.divergence.AT_ONCE", 2)
        parts = Divergence.after_prompts(llama64, tokenizer, PROMPTS, tokens=TOKENS, per_step=1)
        for step, prompt in enumerate(PROMPTS):
            assert whole.texts(step) == parts.texts(step) and whole.texts(step)[0].prompt == prompt
        with torch.no_grad():
            llama64.get_submodule(LLAMA_DOWN.format(1)).weight.mul_(1.5)
        assert whole.loss(llama64).item() == approx(parts.loss(llama64).item(), rel=1e-12)


def largest(ours: dict, theirs: dict) -> float:
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


@pytest.mark.parametrize("optimizer", ["adamw", "polyak"])
@pytest.mark.parametrize("per_step", [0, 2])
def test_training_is_the_literal_one(family, tokenizer, facts, optimizer, per_step):
    """Losses and deltas equal those of full weights, text by text and without an adapter; without neighbours, or with
    another number of them in a step, they differ."""
    hparams = tiny_hparams(family.down, stop_loss=0, num_steps=6, optimizer=optimizer)
    ensemble = ensemble_of(family.down)
    penalty = Divergence.after_prompts(family.model, tokenizer, PROMPTS, 3.0, tokens=TOKENS, per_step=per_step)
    edit = train_rows(family.model, facts[:2], ensemble, hparams, [penalty])
    ours = full_deltas(family.model, edit)

    def literal(weight, per_step):
        return literal_row_training(
            family.model,
            [(fact.ids, fact.prompt_length) for fact in facts[:2]],
            masks_of(family.model, ensemble),
            hparams.lr,
            hparams.num_steps,
            kl_weight=weight,
            kl_texts=literal_texts(family.model),
            kl_per_step=per_step,
            fraction=0.3 if optimizer == "polyak" else None,
        )

    expected, losses = literal(3.0, per_step)
    assert largest(ours, expected) < 1e-9 and edit.losses == approx(losses, abs=1e-9)
    assert largest(ours, literal(0.0, per_step)[0]) > 1e-3 and largest(ours, literal(3.0, 3)[0]) > 1e-3
    assert [answer.fact for answer in edit.answers] == facts[:2], "neighbours are no answers"


def test_training_goes_on_until_both_hold(llama, tokenizer, facts):
    """The bound delays the end, the losses of all steps are recorded, and num_steps ends it in any case."""

    def trained(bound, steps=60):
        penalty = Divergence.after_prompts(llama, tokenizer, PROMPTS, 3.0, tokens=TOKENS, bound=bound)
        hparams = tiny_hparams(num_steps=steps, stop_loss=0.5, lr=0.02)
        edit = train_rows(llama, facts[:1], ensemble_of(LLAMA_DOWN, rows=MANY), hparams, [penalty])
        originals = write_rows(llama, edit)
        left = penalty.loss(llama).item()
        restore(llama, originals)
        return edit, left

    plain, left = trained(math.inf)
    both, less = trained(0.9 * left)
    assert less < 0.9 * left
    assert plain.steps < both.steps < 60 and both.losses[plain.steps] < 0.5 and both.losses[-1] < 0.5
    assert trained(1e-9, plain.steps + 2)[0].steps == plain.steps + 2


def test_the_gain_keeps_the_bound_that_training_waited_for(llama, tokenizer, facts):
    def left(bound, gain):
        penalty = Divergence.after_prompts(llama, tokenizer, PROMPTS, 3.0, tokens=TOKENS, bound=bound)
        hparams = tiny_hparams(num_steps=60, stop_loss=0.5, lr=0.02, edit_gain=gain)
        edit = train_rows(llama, facts[:1], ensemble_of(LLAMA_DOWN, rows=MANY), hparams, [penalty])
        originals = write_rows(llama, edit)
        found = penalty.loss(llama).item()
        restore(llama, originals)
        return found

    bound = 0.9 * left(math.inf, 1.0)
    assert left(math.inf, 1.5) > 1.2 * bound, "else this says nothing"
    assert left(bound, 1.5) < 1.001 * bound  # in a pass of its own


@pytest.fixture
def records(tmp_path):
    """A file of facts of three relations about many subjects."""
    subjects = ["France", "Spain", "Peru", "Italy", "Oslo", "Lima", "Paris", "Madrid", "Ada", "Marie", "Rome", "Tiber"]
    path = tmp_path / "facts.json"
    facts = [
        {"prompt": pattern.format(subject), "target_new": "Latin", "subject": subject}
        for subject in subjects
        for pattern in ("The capital of {} is", "The language spoken in {} is", "The river of {} is")
    ]
    path.write_text(json.dumps(facts))
    return str(path)


ON = {"neighbour_weight": 2.0, "neighbour_tokens": 2}


class TestChoice:
    def test_is_half_of_each_kind_and_never_held_out(self, records):
        hparams = tiny_hparams(neighbour_data=records, neighbour_relation_size=3, neighbour_subject_size=2, **ON)
        found = neighbour_prompts([REQUEST], hparams)
        relation = [p for p in found if p.startswith("The capital of ")]
        assert set(found) - set(relation) == {"The language spoken in France is", "The river of France is"}
        assert len(relation) == 3 and found[0] in relation and found[1] not in relation
        assert REQUEST["prompt"] not in found and not any(is_held_out(p.split()[-2]) for p in relation)

    def test_what_is_edited_together_is_left_out(self, records):
        hparams = tiny_hparams(neighbour_data=records, **ON)
        one = neighbour_prompts([REQUEST], hparams)
        other = {**REQUEST, "prompt": one[0], "subject": one[0].split()[-2]}
        both = neighbour_prompts([REQUEST, other], hparams)
        assert one[0] not in both and REQUEST["prompt"] not in both and len(set(both)) == len(both)
        assert {p.split()[-2] for p in both[:2]} != {other["subject"]}, "each request has its turn"

    def test_of_a_batch_asks_nothing_that_another_request_edits(self):
        """Two facts of one subject, each in other words, and a fact whose subject is not given."""
        of = {"neighbour_relation_size": 32, "neighbour_subject_size": 16, "input_projection": True}
        hparams = tiny_hparams(**of, neighbour_data="embedded")
        capital = {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France"}
        language = {"prompt": "The official language of France is", "target_new": "Spanish", "subject": "France"}

        def asked(requests, word, subject="France"):
            found = neighbours_by_request(requests, hparams)
            return [[one for one in own if word in one and subject in one] for own in found]

        (alone,) = asked([capital], "language")
        assert alone, "else this says nothing"
        assert asked([capital, language], "language") == [[], []] == asked([capital, language], "capital")
        unnamed = {"prompt": "What is the capital of Germany?", "target_new": "Lima"}
        assert asked([capital], "capital", "Germany") != [[]]
        assert asked([capital, unnamed], "capital", "Germany") == [[], []]

    def test_no_subject_trains_that_the_records_own_neighbours_are_about(self, records):
        """They are asked whether they are held out or not, in words of their own, of all that is edited together."""
        hparams = tiny_hparams(neighbour_data=records, **ON)
        name = neighbour_prompts([REQUEST], hparams)[0].split()[-2]
        text = f"The chief city of {name} is called"
        own = {"Neighborhood": {"prompt": [text], "ground_truth": ["x"]}}
        single = {"neighborhood": {"prompt": text, "ground_truth": "x"}}  # as EasyEdit's edit hands it over
        listed = {"Neighborhood": [{"prompt": text, "ground_truth": "x"}], "Other": None}
        record = {**REQUEST, "locality": own}
        other = {**REQUEST, "prompt": "The river of Nowhere is", "subject": "Nowhere", "locality": own}
        forms = [[{**REQUEST, "locality": its}] for its in (single, listed)]
        for requests in ([record], [REQUEST, other], *forms):
            found = neighbour_prompts(requests, hparams)
            assert found and not any(name in prompt for prompt in found)
        for nothing in (None, {"Neighborhood": None}):
            assert neighbour_prompts([{**REQUEST, "locality": nothing}], hparams) == neighbour_prompts(
                [REQUEST], hparams
            )

    def test_is_the_same_in_a_chat_template(self, records, tokenizer):
        """The benchmark's requests are in it already: the pool knows prompts as they are said."""
        tokenizer.chat_template = (
            "{% for m in messages %}Say : {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} !{% endif %}"
        )
        settings = {"neighbour_data": records, "neighbour_relation_size": 3, "neighbour_subject_size": 2, **ON}
        plain = neighbour_prompts([REQUEST], tiny_hparams(**settings))
        hparams = tiny_hparams(**settings, use_chat_template=True)
        for request in (REQUEST, with_chat_template(REQUEST, tokenizer)):
            assert neighbour_prompts([request], hparams, None, tokenizer) == plain
        assert request["prompt"] == f"Say : {REQUEST['prompt']} !"

    def test_comes_from_what_was_localised_on_but_not_from_the_rest_of_the_file(self, records):
        at = {"localization_data": records, "localization_size": 9, "localization_offset": 3}
        assert neighbour_source(tiny_hparams(**at)) == (records, 9, 3)
        assert neighbour_source(tiny_hparams(**at, neighbour_data="embedded")) == ("embedded", None, 0)
        assert neighbour_source(tiny_hparams(neighbour_data=records)) == (records, None, 0)
        for data in (None, "embedded"):
            assert neighbour_source(tiny_hparams(localization_data=data)) == ("embedded", None, 0)
        few = neighbour_prompts([REQUEST], tiny_hparams(**at, **ON))
        assert {p.split()[-2] for p in few} <= {"Spain", "Peru", "Italy", "France"}

    def test_a_request_without_neighbours_is_trained_without_and_named(self, llama, tokenizer, records, caplog):
        alone = {"prompt": "What is that ?", "target_new": "Rome"}
        hparams = tiny_hparams(neighbour_data=records, **ON)
        with caplog.at_level(logging.WARNING):
            assert objectives_for(llama, tokenizer, [alone], hparams) == []
        assert "neighbour_data: no neighbours of 'What is that ?'" in caplog.text

    def test_few_of_a_kind_are_filled_up_with_others_of_the_data(self, tmp_path):
        """Two of a taxon's relation; the others are people, of whom something else is asked."""
        people = [
            "Spain",
            "Peru",
            "Italy",
            "Oslo",
            "Lima",
            "Paris",
            "Madrid",
            "Ada",
            "Marie",
            "Tiber",
            "Norway",
            "Cuba",
        ]
        facts = [
            *({"prompt": f"The family of {name} is", "target_new": "Latin", "subject": name} for name in "ABCDEFG"),
            *({"prompt": f"The mother of {name} is", "target_new": "Anna", "subject": name} for name in people),
        ]
        path = tmp_path / "facts.json"
        path.write_text(json.dumps(facts))
        edit = {"prompt": "The family of Zebra is", "subject": "Zebra", "target_new": "Rome"}
        settings = dict(neighbour_data=str(path), neighbour_subject_size=0, **ON)
        few, more = (
            [one.split()[-2] for one in neighbour_prompts([edit], tiny_hparams(neighbour_relation_size=n, **settings))]
            for n in (2, 8)
        )
        kin = [name for name in "ABCDEFG" if not is_held_out(name)]
        assert 2 <= len(kin) < 8, "else nothing is told"
        assert set(few) <= set(kin) and set(more[: len(kin)]) == set(kin)
        strangers = more[len(kin) :]
        assert len(more) == len(set(more)) == 8 and set(strangers) <= {name for name in people if not is_held_out(name)}

    def test_the_model_names_subjects_where_the_facts_know_none(self, llama, tokenizer, records, monkeypatch):
        """And only there. What it names comes first, chosen from as from facts: nothing that is held out."""
        asked = []

        def own_pool(model, tokenizer, request):
            asked.append(request["subject"])
            names = ["Spain", "Peru", "Italy", "France", "Rome", "Oslo", "Lima"]
            return FactPool([KnownFact(name, "What is {} ?", kind="named") for name in names])

        monkeypatch.setattr("kne_easyedit.editing.neighbours.own_pool", own_pool)
        hparams = tiny_hparams(neighbour_data=records, neighbour_subject_size=0, **ON)
        unknown = {"prompt": "What is xyz ?", "subject": "xyz", "target_new": "Rome"}
        assert neighbour_prompts([REQUEST], hparams, llama, tokenizer) and asked == []
        assert neighbour_prompts([unknown], hparams) and asked == []
        named = neighbour_prompts([unknown], replace_settings(hparams, neighbour_relation_size=2), llama, tokenizer)
        assert asked == ["xyz"] and len(named) == 2
        assert {prompt.split()[-2] for prompt in named} <= {"Spain", "Peru", "Italy", "France", "Oslo", "Lima"}
        named = neighbour_prompts([unknown], hparams, llama, tokenizer)
        assert not any(is_held_out(prompt.split()[-2]) for prompt in named)
        (penalty,) = objectives_for(llama, tokenizer, [unknown], hparams)
        assert {text.prompt for text in penalty.texts(0)} <= set(named)


def test_an_edit_with_neighbours_leaves_them_nearer_to_what_they_were(llama, tokenizer, records):
    """By the settings alone; the model is as it was until the rows are written."""
    before = fingerprint(llama)
    settings = dict(neighbour_data=records, stop_loss=0.3, lr=0.02)
    (penalty,) = objectives_for(llama, tokenizer, [REQUEST], tiny_hparams(**settings, **ON))
    assert penalty.name == "neighbours" and penalty.weight == 2 and penalty.bound == math.inf

    def divergence_after(**changes):
        edit = compute_edit(llama, tokenizer, REQUEST, tiny_hparams(**settings, **changes))
        assert fingerprint(llama) == before and edit.losses[-1] < 0.3
        originals = write_rows(llama, edit)
        found = penalty.loss(llama).item()
        restore(llama, originals)
        return found

    without = divergence_after()
    assert 0 < divergence_after(**ON) < 0.7 * without
    assert 0 < divergence_after(**ON, neighbours_per_step=2) < 0.9 * without
    assert divergence_after(neighbour_tokens=2, neighbours_per_step=2) == without, "weight 0 changes nothing"
