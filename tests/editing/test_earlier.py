"""Facts that a model was edited with before are spared (`spare_edited`), as long as it has them."""

from __future__ import annotations

import pytest
import torch
from conftest import LLAMA_DOWN, failing, make_llama, tiny_hparams, weights
from edits import MANY, REQUEST, REQUESTS, edited, ensemble_of

from kne_easyedit import EditStore
from kne_easyedit.editing import applying, earlier
from kne_easyedit.editing.applying import set_edits
from kne_easyedit.editing.earlier import earlier_facts, earlier_requests
from kne_easyedit.editing.edit import apply_kne_to_model, compute_edit
from kne_easyedit.editing.neighbours import neighbour_prompts
from kne_easyedit.editing.objectives import objectives_for
from kne_easyedit.editing.projection import EARLIER_SHARE, input_projections, latest
from kne_easyedit.editing.row_edit import restore
from kne_easyedit.facts.encoding import encode
from kne_easyedit.localization.data import encode_facts
from kne_easyedit.models.state import preserve_state

ENSEMBLE = ensemble_of(LLAMA_DOWN, rows=MANY)
ON = {"input_projection": True, "projection_ridge": 1e-13, "neighbour_data": "embedded"}


def apply(model, tokenizer, one, ensemble=ENSEMBLE, **settings):
    hparams = tiny_hparams(**{"num_steps": 2, "spare_edited": True, **settings})
    return apply_kne_to_model(model, tokenizer, [one], hparams, ensemble=ensemble, return_orig_weights=True)[1]


def known(model, requests=()):
    return [(one["prompt"], one["target_new"]) for one in earlier_requests(model, requests)]


def said(*requests):
    return [(one["prompt"], one["target_new"]) for one in requests]


def logits(model, tokenizer, one):
    """At every token that predicts another one of the prompt or of the answer, and after it."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([encode(tokenizer, one["prompt"], one["target_new"]).ids])).logits


class TestWhatIsKnown:
    def test_the_last_edit_comes_first(self, llama, tokenizer):
        assert known(llama) == []
        for one in REQUESTS:
            apply(llama, tokenizer, one)
        assert known(llama) == said(*REQUESTS[::-1])
        assert known(llama, [REQUESTS[1]]) == said(REQUESTS[2], REQUESTS[0]), "it is edited now"

    def test_of_a_prompt_the_last_answer(self, llama, tokenizer):
        again = {**REQUEST, "target_new": "Ada"}
        for one in (REQUEST, REQUESTS[1], again):
            apply(llama, tokenizer, one)
        assert known(llama) == said(again, REQUESTS[1])

    def test_nothing_is_noted_unless_it_is_asked_for(self, llama, tokenizer):
        apply(llama, tokenizer, REQUEST, spare_edited=False)
        assert known(llama) == []

    @pytest.mark.parametrize("rows", [MANY, {0: (2, 3), 3: (5,)}])
    def test_what_was_taken_back_is_forgotten(self, llama, tokenizer, rows):
        """As EasyEdit does it; where both edits have the same rows, and where they have others."""
        apply(llama, tokenizer, REQUEST)
        originals = apply(llama, tokenizer, REQUESTS[1], ensemble_of(LLAMA_DOWN, rows=rows))
        with torch.no_grad():
            for name, value in originals.items():
                llama.get_parameter(name)[...] = value
        assert known(llama) == said(REQUEST)
        apply(llama, tokenizer, REQUESTS[2])
        assert known(llama) == said(REQUESTS[2], REQUEST)

    def test_without_edits_there_is_nothing(self, llama, tokenizer):
        originals = [apply(llama, tokenizer, one) for one in REQUESTS[:2]]
        for its in originals[::-1]:
            restore(llama, its)
        assert known(llama) == []

    def test_the_first_of_several_is_taken_back(self, llama, tokenizer):
        """With rows of its own: by its originals, and as an edit that is known by itself."""
        edits = []
        for one, rows in zip(REQUESTS, ({0: (1, 2)}, {0: (5, 6), 2: (1,)}, {3: (4,)})):
            hparams = tiny_hparams(num_steps=2, spare_edited=True)
            ensemble = ensemble_of(LLAMA_DOWN, rows=rows)
            apply_kne_to_model(llama, tokenizer, [one], hparams, ensemble=ensemble, on_trained=edits.append)
        edits[0].take_back(llama)
        assert known(llama) == said(*REQUESTS[:0:-1])
        edits[1].take_back(llama)
        assert known(llama) == said(REQUESTS[2])

    def test_the_first_of_two_is_restored(self, llama, tokenizer):
        originals = apply(llama, tokenizer, REQUEST, ensemble_of(LLAMA_DOWN, rows={0: (1, 2)}))
        apply(llama, tokenizer, REQUESTS[1], ensemble_of(LLAMA_DOWN, rows={2: (1, 2)}))
        restore(llama, originals)
        assert known(llama) == said(REQUESTS[1])

    def test_nobody_has_asked_before_the_next_edit(self, llama, tokenizer):
        """Without projection and neighbours: what was restored does not come back with the rows of the next edit."""
        for _ in range(3):
            restore(llama, apply(llama, tokenizer, REQUEST))
        apply(llama, tokenizer, REQUESTS[1])
        assert known(llama) == said(REQUESTS[1]) and len(earlier._WRITTEN[llama]) == 1

    def test_what_is_there_for_a_while_makes_nothing_forgotten(self, llama, tokenizer):
        other = compute_edit(llama, tokenizer, REQUESTS[1], tiny_hparams(num_steps=2), ENSEMBLE)
        apply(llama, tokenizer, REQUEST)
        with other.applied(llama, force=True):
            assert known(llama) == said(REQUESTS[1], REQUEST), "it stands on the first one's rows"
        assert known(llama) == said(REQUEST)

    def test_edits_of_both_ways_on_one_model(self, llama, tokenizer):
        """One that was applied by itself, beneath and above one that was written as EasyEdit does it."""
        trained = {"num_steps": 2}
        first, last = (compute_edit(llama, tokenizer, one, tiny_hparams(**trained), ENSEMBLE) for one in REQUESTS[::2])
        first.apply(llama)
        originals = apply(llama, tokenizer, REQUESTS[1])
        assert known(llama) == said(REQUESTS[1], REQUESTS[0])
        restore(llama, originals)
        assert known(llama) == said(REQUESTS[0])
        first.take_back(llama)
        assert known(llama) == []
        apply(llama, tokenizer, REQUESTS[1])
        for _ in range(2):
            last.apply(llama, force=True)
            assert known(llama) == said(REQUESTS[2], REQUESTS[1])
            last.take_back(llama)
            assert known(llama) == said(REQUESTS[1])

    def test_an_edit_that_was_written_is_taken_back_by_itself(self, llama, tokenizer):
        """Its note is not renewed: what the model has is what is left."""
        kept = []
        apply(llama, tokenizer, REQUESTS[1])
        hparams = tiny_hparams(num_steps=2, spare_edited=True)
        apply_kne_to_model(llama, tokenizer, [REQUEST], hparams, ensemble=ENSEMBLE, on_trained=kept.append)
        assert known(llama) == said(REQUEST, REQUESTS[1])
        kept[0].take_back(llama)
        assert known(llama) == said(REQUESTS[1])

    @pytest.mark.parametrize("second", [{"use_chat_template": True}, {"separator": ""}], ids=str)
    def test_each_is_spared_as_it_was_edited(self, llama, tokenizer, second):
        """Whatever the settings of the edit are that spares it; whether it is noted or known by itself."""
        tokenizer.chat_template = "{% for m in messages %}Say : {{ m['content'] }} !{% endfor %}"
        compute_edit(llama, tokenizer, REQUESTS[1], tiny_hparams(num_steps=2, **second), ENSEMBLE).apply(llama)
        apply(llama, tokenizer, REQUEST)
        apply(llama, tokenizer, REQUESTS[2], **second)
        plain, other = (tiny_hparams(**settings) for settings in ({}, second))
        wanted = [(REQUESTS[2], other), (REQUEST, plain), (REQUESTS[1], other)]
        expected = [fact for one, hparams in wanted for fact in encode_facts(llama, tokenizer, [one], hparams)]
        assert earlier_facts(llama, tokenizer) == expected
        assert expected[0].ids != encode_facts(llama, tokenizer, [REQUESTS[2]], plain)[0].ids

    def test_one_that_cannot_be_read_is_left_out(self, llama, tokenizer, caplog):
        apply(llama, tokenizer, REQUEST)
        apply(llama, tokenizer, REQUESTS[1])
        llama.config.max_position_embeddings = 1
        assert earlier_facts(llama, tokenizer) == [] and "an earlier fact is not spared" in caplog.text

    @pytest.mark.parametrize("rows", [MANY, {0: (20, 21), 3: (22,)}], ids=["the same rows", "others"])
    def test_of_a_prompt_the_last_answer_however_it_came(self, llama, tokenizer, rows):
        again = {**REQUEST, "target_new": "Ada"}
        first = ensemble_of(LLAMA_DOWN, rows={0: (2, 3), 3: (5,)})
        compute_edit(llama, tokenizer, REQUEST, tiny_hparams(num_steps=2), first).apply(llama)
        apply(llama, tokenizer, again, ensemble_of(LLAMA_DOWN, rows=rows))
        assert known(llama) == said(again)

    def test_what_is_taken_for_the_base_stays(self, llama, tokenizer):
        """An edit was written over one that was applied, so that the base is lost: nothing has been taken back."""
        first, last = (
            compute_edit(llama, tokenizer, one, tiny_hparams(num_steps=2), ENSEMBLE) for one in REQUESTS[::2]
        )
        first.apply(llama)
        apply(llama, tokenizer, REQUESTS[1])
        set_edits(llama, [last], force=True)
        assert sorted(known(llama)) == sorted(said(*REQUESTS))

    def test_what_is_written_inside_and_stays(self, llama, tokenizer):
        """In rows that no other edit has, so that it is not taken back with the others."""
        other = compute_edit(
            llama, tokenizer, REQUEST, tiny_hparams(num_steps=2), ensemble_of(LLAMA_DOWN, rows={0: (2, 3)})
        )
        with other.applied(llama):
            apply(llama, tokenizer, REQUESTS[1], ensemble_of(LLAMA_DOWN, rows={2: (7,)}))
        assert known(llama) == said(REQUESTS[1])

    def test_an_error_on_the_way_leaves_what_was_noted(self, llama, tokenizer, monkeypatch):
        apply(llama, tokenizer, REQUEST)
        other = compute_edit(llama, tokenizer, REQUESTS[1], tiny_hparams(num_steps=2), ENSEMBLE)
        monkeypatch.setattr(applying, "renew_notes", failing(applying.renew_notes, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            other.apply(llama, force=True)
        assert known(llama) == said(REQUEST)

    def test_a_copy_has_them_and_the_model_does_not(self, llama, tokenizer):
        apply(llama, tokenizer, REQUEST)
        hparams = tiny_hparams(num_steps=2, spare_edited=True)
        copy, _ = apply_kne_to_model(llama, tokenizer, [REQUESTS[1]], hparams, copy=True, ensemble=ENSEMBLE)
        assert known(copy) == said(REQUESTS[1], REQUEST) and known(llama) == said(REQUEST)

    def test_edits_that_are_added_up(self, llama, tokenizer):
        edits = [compute_edit(llama, tokenizer, one, tiny_hparams(num_steps=2), ENSEMBLE) for one in REQUESTS]
        set_edits(llama, edits[:2])
        assert known(llama) == said(REQUESTS[1], REQUESTS[0])
        set_edits(llama, edits[1:])
        assert known(llama) == said(REQUESTS[2], REQUESTS[1])
        set_edits(llama, [])
        assert known(llama) == []

    def test_edits_of_a_store(self, llama, tokenizer, tmp_path):
        store = EditStore(tmp_path / "edits")
        for one in REQUESTS[:2]:
            store.add(compute_edit(llama, tokenizer, one, tiny_hparams(num_steps=2), ENSEMBLE))
        with store.applied(llama):
            assert known(llama) == said(REQUESTS[1], REQUESTS[0])
        assert known(llama) == []

    def test_a_fact_that_the_model_knows_is_no_edit(self, llama, tokenizer):
        """Its rows are the same before and after, so that nobody could see that it was taken back."""
        before = weights(llama)
        apply(llama, tokenizer, REQUEST, stop_loss=100.0)
        assert weights(llama) == before and known(llama) == []

    def test_a_module_that_was_exchanged(self, llama, tokenizer):
        apply(llama, tokenizer, REQUEST)
        llama.model.layers[0].mlp.down_proj = torch.nn.Identity()
        assert known(llama) == []

    def test_an_error_while_it_is_noted_undoes_the_edit(self, llama, tokenizer, monkeypatch):
        apply(llama, tokenizer, REQUEST)
        before = weights(llama)
        monkeypatch.setattr(earlier, "_digests", failing(earlier._digests, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            apply(llama, tokenizer, REQUESTS[1])
        assert weights(llama) == before
        monkeypatch.undo()
        assert known(llama) == said(REQUEST)


class TestSparing:
    @pytest.mark.parametrize("optimizer", ["adamw", "polyak"])
    def test_a_fact_keeps_its_logits_when_the_next_is_edited(self, tokenizer, double_precision, optimizer):
        """At every token, by induction over the layers. Without the setting they change; both facts are there."""
        first, second = REQUESTS[1], REQUEST
        for on in (True, False):
            model = make_llama(torch.float64)
            settings = {"optimizer": optimizer, "num_steps": 200, "until_given": True, **ON}
            apply(model, tokenizer, first, **settings)
            before = logits(model, tokenizer, first)
            apply(model, tokenizer, second, **settings, spare_edited=on)
            change = (logits(model, tokenizer, first) - before).abs().max()
            assert edited(model, tokenizer, second)
            assert change < 1e-6 if on else change > 0.1
            assert edited(model, tokenizer, first) or not on

    def test_an_edit_on_top_of_a_store(self, llama64, tokenizer, tmp_path):
        store = EditStore(tmp_path / "edits")
        hparams = tiny_hparams(num_steps=200, until_given=True, spare_edited=True, **ON)
        for one in (REQUESTS[1], REQUEST):
            store.add(compute_edit(llama64, tokenizer, one, hparams, ENSEMBLE))
            store.apply(llama64)
            if one is REQUESTS[1]:
                before = logits(llama64, tokenizer, one)
        assert (logits(llama64, tokenizer, REQUESTS[1]) - before).abs().max() < 1e-6
        assert edited(llama64, tokenizer, REQUEST) and edited(llama64, tokenizer, REQUESTS[1])

    def test_the_first_edit_is_what_it_is_without(self, tokenizer):
        models = [make_llama() for _ in range(2)]
        for model, on in zip(models, (True, False)):
            apply(model, tokenizer, REQUEST, **ON | {"projection_ridge": 1e-5}, spare_edited=on)
        assert weights(models[0]) == weights(models[1])

    def test_a_fact_that_is_edited_again_is_free(self, llama, tokenizer):
        again = {**REQUEST, "target_new": "Ada"}
        settings = {"num_steps": 200, "until_given": True, **ON, "projection_ridge": 1e-5}
        for one in (REQUEST, again):
            apply(llama, tokenizer, one, **settings)
            assert edited(llama, tokenizer, one)

    def test_a_blank_at_the_end_makes_no_other_prompt(self, llama, tokenizer):
        """It is not read, so that the same tokens would be closed and trained."""
        again = {**REQUEST, "prompt": REQUEST["prompt"] + " ", "target_new": "Ada"}
        apply(llama, tokenizer, REQUEST)
        assert known(llama, [again]) == []
        apply(llama, tokenizer, again)
        assert known(llama) == said(again)

    def test_of_too_many_the_tokens_near_the_answers_are_spared(self, tokenizer):
        facts = [encode(tokenizer, *fact) for fact in (("Marie and Ada was", "Rome"), ("Marie and Rome", "Oslo"))]
        assert [len(fact.ids) for fact in facts] == [5, 4]
        first, second = (fact.ids for fact in facts)
        assert latest(facts, 99) == {first: [3, 4, 2], second: [2, 3, 1, 0]}, "they begin alike"
        assert latest(facts, 5) == {first: [3, 4, 2], second: [2, 3]}
        assert latest(facts, 3) == {first: [3, 4], second: [2]}
        assert latest(facts, 1) == {first: [3]} and latest(facts, 0) == {} == latest([], 9)

    def test_no_more_than_a_share_of_the_inputs_is_closed(self, llama, tokenizer):
        facts = [encode(tokenizer, one["prompt"], one["target_new"]) for one in REQUESTS]
        with preserve_state(llama):
            found = input_projections(llama, tokenizer, [], [LLAMA_DOWN.format(1)], 1e-5, earlier=facts)
            none = input_projections(llama, tokenizer, [], [LLAMA_DOWN.format(1)], 1e-5)
        assert len(found[LLAMA_DOWN.format(1)].basis) == int(EARLIER_SHARE * 40) and none == {}

    def test_a_penalty_keeps_the_answer_too(self, llama, tokenizer):
        """The continuation that is compared begins with the answer, for the model has it."""
        apply(llama, tokenizer, REQUEST, num_steps=200, until_given=True)
        for on in (True, False):
            settings = {"neighbour_weight": 1.0, "neighbour_data": "embedded", "neighbour_tokens": 2}
            hparams = tiny_hparams(**settings, spare_edited=on)
            (term,) = objectives_for(llama, tokenizer, [REQUESTS[1]], hparams)
            texts = {text.prompt: text.target for text in term.texts(0)}
            others = {prompt for prompt in texts if prompt != REQUEST["prompt"]}
            assert others == set(neighbour_prompts([REQUESTS[1]], hparams, llama, tokenizer))
            assert ("Rome" in texts[REQUEST["prompt"]]) if on else REQUEST["prompt"] not in texts
