"""Eq. 8-11 against full-matrix training; the adapter; what training leaves as it was, and what it refuses."""

import math

import peft
import pytest
import torch
from conftest import (
    GPT2_DOWN,
    LLAMA_DOWN,
    SIZE,
    SPELLED,
    failing,
    fingerprint,
    make_gpt2,
    make_llama,
    tiny_hparams,
)
from edits import MANY, ROWS, ensemble_of, full_deltas, masks_of
from reference import literal_row_training

from kne_easyedit.editing import adapter, training_pass
from kne_easyedit.editing.adapter import row_adapter
from kne_easyedit.editing.losses import answer_loss
from kne_easyedit.editing.row_edit import write_rows
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.facts.encoding import collate, encode


def assert_equals_reference(model, facts, ensemble, hparams, transposed=False):
    edit = train_rows(model, facts, ensemble, hparams)
    expected, losses = literal_row_training(
        model,
        [(fact.ids, fact.prompt_length) for fact in facts],
        masks_of(model, ensemble, transposed),
        hparams.lr,
        hparams.num_steps,
        hparams.alpha,
        hparams.weight_decay,
        hparams.stop_loss,
    )
    ours = full_deltas(model, edit, transposed)
    assert ours.keys() == expected.keys()
    for name, delta in ours.items():
        assert delta.dtype == torch.float64
        assert delta.abs().max() > 0.01, "trained too little to show a bug"
        assert (delta - expected[name]).abs().max() < 1e-9
    assert edit.losses == pytest.approx(losses, abs=1e-9)
    return edit


class TestLiteralReference:
    @pytest.mark.parametrize("count", [1, 3])
    def test_equal_for_one_and_for_several_facts(self, family, facts, count):
        ensemble = ensemble_of(family.down)
        edit = assert_equals_reference(
            family.model, facts[:count], ensemble, tiny_hparams(family.down, stop_loss=0, num_steps=8)
        )
        assert edit.steps == 8

    @pytest.mark.parametrize("changes", [{"alpha": 3.0}, {"weight_decay": 0.1}, {"lr": 1e-2}], ids=str)
    def test_equal_under_other_settings(self, family, facts, changes):
        hparams = tiny_hparams(family.down, stop_loss=0, num_steps=5, **changes)
        assert_equals_reference(family.model, facts, ensemble_of(family.down), hparams)

    @pytest.mark.parametrize(
        "changes", [{"alpha": 1.01}, {"weight_decay": 0.01}, {"lr": 0.0501}, {"num_steps": 6}], ids=str
    )
    def test_other_settings_matter(self, llama64, facts, changes):
        """Converse: settings that differ by little give deltas far beyond the tolerance."""
        hparams = dict(stop_loss=0, num_steps=5, weight_decay=0.0)
        one = train_rows(llama64, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(**hparams))
        other = train_rows(llama64, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(**{**hparams, **changes}))
        name = LLAMA_DOWN.format(0)
        assert (one.deltas[name][1] - other.deltas[name][1]).abs().max() > 1e-5

    def test_equal_for_several_module_types_at_once(self, family, facts):
        ensemble = ensemble_of(family.down, family.up, family.query)
        hparams = tiny_hparams(target_modules=[family.down, family.up, family.query], stop_loss=0, num_steps=4)
        assert_equals_reference(family.model, facts, ensemble, hparams)

    def test_equal_up_to_an_early_stop(self, family, facts):
        hparams = tiny_hparams(family.down, stop_loss=0.5)
        edit = assert_equals_reference(family.model, facts[1:2], ensemble_of(family.down, rows=MANY), hparams)
        assert 1 < edit.steps < hparams.num_steps

    def test_equal_for_transposed_weights(self, facts):
        model = make_gpt2(torch.float64)
        hparams = tiny_hparams(GPT2_DOWN, stop_loss=0, num_steps=5)
        assert_equals_reference(model, facts, ensemble_of(GPT2_DOWN), hparams, transposed=True)


class TestTraining:
    def test_losses_fall_until_the_stop(self, family32, facts):
        hparams = tiny_hparams(family32.down, stop_loss=0.3)
        edit = train_rows(family32.model, facts, ensemble_of(family32.down, rows=MANY), hparams)
        assert len(edit.losses) == edit.steps + 1 > 3
        assert edit.losses[-1] < 0.3 <= min(edit.losses[:-1])

    def test_ends_after_num_steps(self, llama, facts):
        edit = train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(stop_loss=0, num_steps=3))
        assert edit.steps == 3 and len(edit.losses) == 4

    def test_a_fact_that_is_known_already_needs_no_step(self, llama, facts):
        edit = train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(stop_loss=1e9))
        assert edit.steps == 0
        assert all(not delta.any() for _, delta in edit.deltas.values())

    def test_starts_as_the_identity(self, llama64, facts):
        edit = train_rows(llama64, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=1, stop_loss=0))
        with torch.no_grad():
            assert edit.losses[0] == pytest.approx(answer_loss(llama64, collate(facts)).item(), rel=1e-12)
        assert edit.losses[1] != edit.losses[0]

    def test_deltas_are_rows_by_inputs(self, llama, facts):
        edit = train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=1))
        assert {name: (rows, tuple(delta.shape)) for name, (rows, delta) in edit.deltas.items()} == {
            LLAMA_DOWN.format(layer): (rows, (len(rows), SIZE["inner"])) for layer, rows in ROWS.items()
        }
        assert not any(delta.requires_grad for _, delta in edit.deltas.values())

    def test_kaiming_start_depends_on_the_seed_alone(self, llama, facts):
        def start(seed, initialization="kaiming"):
            hparams = tiny_hparams(initialization=initialization, seed=seed, stop_loss=1e9)
            return train_rows(llama, facts, ensemble_of(LLAMA_DOWN), hparams).deltas[LLAMA_DOWN.format(0)][1]

        first = start(1)
        torch.manual_seed(99)
        torch.rand(7)
        assert torch.equal(start(1), first)
        assert not torch.equal(start(2), first)
        # kaiming_uniform with a = sqrt(5) draws from +-1/sqrt(d1), times alpha/sqrt(n); two roundings are below 1e-6
        assert 0 < first.abs().max() <= 1 / math.sqrt(SIZE["inner"]) / math.sqrt(len(ROWS[0])) * (1 + 1e-6)
        assert torch.equal(start(1, "zeros"), start(2, "zeros"))

    def test_nothing_else_is_random(self, llama, facts):
        """Dropout in particular: a model that comes in training mode gives the same edit."""
        expected = train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=3))
        llama.train()
        again = train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=3, seed=7))
        assert again.losses == expected.losses

    def test_the_global_random_state_is_left_alone(self, llama, facts):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=1, initialization="kaiming"))
        assert torch.equal(torch.get_rng_state(), before)

    def test_trains_in_float32_over_bfloat16(self, facts):
        model = make_llama(torch.bfloat16)
        edit = train_rows(model, facts, ensemble_of(LLAMA_DOWN, rows=MANY), tiny_hparams())
        assert all(delta.dtype == torch.float32 for _, delta in edit.deltas.values())
        assert edit.losses[-1] < 0.05

    def test_works_without_gradients_around(self, llama, facts):
        with torch.no_grad():
            edit = train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=2, stop_loss=0))
        assert edit.losses[2] < edit.losses[0]


class TestAsFound:
    def test_after_success(self, family32, facts):
        before = fingerprint(family32.model)
        train_rows(
            family32.model, facts, ensemble_of(family32.down, family32.up), tiny_hparams(family32.down, num_steps=2)
        )
        assert fingerprint(family32.model) == before

    def test_flags_of_a_model_in_training(self, family32, facts):
        family32.model.train()
        family32.model.config.use_cache = False
        for i, parameter in enumerate(family32.model.parameters()):
            parameter.requires_grad_(i % 2 == 0)
        before = fingerprint(family32.model)
        train_rows(family32.model, facts, ensemble_of(family32.down), tiny_hparams(family32.down, num_steps=2))
        assert fingerprint(family32.model) == before

    @pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
    @pytest.mark.parametrize(
        ("owner", "function", "call"),
        [
            (peft.tuners.lora.LoraModel, "_create_and_replace", 2),
            (adapter, "_prepare", 2),
            (training_pass, "answer_logits", 1),
            (training_pass, "answer_logits", 3),
            (torch.autograd, "grad", 2),
            (torch.optim.AdamW, "step", 2),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_after_an_exception(self, family32, facts, monkeypatch, owner, function, call, error):
        before = fingerprint(family32.model)
        broken = failing(getattr(owner, function), call, error)
        monkeypatch.setattr(owner, function, broken)
        with pytest.raises(type(error)):
            train_rows(family32.model, facts, ensemble_of(family32.down), tiny_hparams(family32.down, stop_loss=0))
        assert broken.calls == call
        assert fingerprint(family32.model) == before

    def test_edits_work_after_an_exception(self, llama, facts, monkeypatch):
        expected = train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=2)).losses
        with monkeypatch.context() as patch:
            patch.setattr(training_pass, "answer_logits", failing(training_pass.answer_logits, 2, KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=2))
        assert train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=2)).losses == expected


class TestAdapter:
    def test_is_a_lora_with_a_frozen_selector(self, llama):
        """Eq. 11 as rank-stabilised LoRA: ``alpha/sqrt(r) * B A`` with ``r = n`` and ``B`` the selector of the rows."""
        with row_adapter(llama, ensemble_of(LLAMA_DOWN), tiny_hparams(alpha=3.0)) as layers:
            assert {name: type(layer) for name, layer in layers.items()} == {
                LLAMA_DOWN.format(layer): peft.tuners.lora.Linear for layer in ROWS
            }
            for layer, rows in ROWS.items():
                lora = layers[LLAMA_DOWN.format(layer)]
                selector = lora.lora_B["kne"].weight
                assert selector.nonzero().tolist() == sorted([row, k] for k, row in enumerate(rows))
                assert selector.sum() == len(rows)
                assert lora.scaling["kne"] == pytest.approx(3 / math.sqrt(len(rows)))
            trainable = {name for name, parameter in llama.named_parameters() if parameter.requires_grad}
            assert trainable >= {f"{LLAMA_DOWN.format(layer)}.lora_A.kne.weight" for layer in ROWS}
            assert not any("lora_B" in name for name in trainable)

    def test_layer_1_is_not_layer_11(self, facts):
        """Module names are told apart in full, also where one is the beginning or the end of another."""
        model = make_llama(num_hidden_layers=12)
        ensemble = ensemble_of(LLAMA_DOWN, rows={1: (4, 5), 11: (1, 2, 3)})
        edit = train_rows(model, facts, ensemble, tiny_hparams(num_steps=1, stop_loss=0))
        assert {name: len(delta) for name, (_, delta) in edit.deltas.items()} == {
            LLAMA_DOWN.format(1): 2,
            LLAMA_DOWN.format(11): 3,
        }


class TestRefused:
    def test_a_model_that_carries_an_adapter(self, llama, facts):
        llama.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
        before = fingerprint(llama)
        with pytest.raises(ValueError, match="model: LlamaForCausalLM carries a PEFT adapter; merge or unload it"):
            train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams())
        assert fingerprint(llama) == before

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("base_model.model.model.layers.{}.mlp.down_proj", "PeftModel carries a PEFT adapter"),
            (LLAMA_DOWN, "matches no module of Peft"),
        ],
    )
    def test_a_peft_model(self, llama, facts, template, message):
        model = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"]))
        before = fingerprint(model)
        with pytest.raises(ValueError, match=message):
            train_rows(model, facts, ensemble_of(template), tiny_hparams(template))
        assert fingerprint(model) == before

    def test_a_model_whose_adapter_was_unloaded_is_taken(self, llama, facts):
        """Converse."""
        plain = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"])).unload()
        assert train_rows(plain, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=1)).losses[0] > 0

    def test_a_loss_that_is_not_finite(self, llama, facts):
        before = fingerprint(llama)
        with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d+; lower lr \(it is 1e\+37\)"):
            train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(lr=1e37, alpha=100.0, stop_loss=0))
        assert fingerprint(llama) == before

    def test_weights_that_are_not_finite(self, llama, facts):
        with torch.no_grad():
            llama.model.norm.weight[0] = float("nan")
        before = fingerprint(llama)
        with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
            train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams())
        assert fingerprint(llama) == before

    def test_an_ensemble_of_another_model(self, llama, facts):
        before = fingerprint(llama)
        with pytest.raises(ValueError, match="it was made for another model"):
            train_rows(llama, facts, ensemble_of(LLAMA_DOWN, width=99), tiny_hparams())
        assert fingerprint(llama) == before

    def test_spelled_answers_train_on_every_letter(self, llama, tokenizer):
        """Converse of refusing: an answer of several tokens is learnt in whole."""
        fact = encode(tokenizer, *SPELLED)
        write_rows(llama, train_rows(llama, [fact], ensemble_of(LLAMA_DOWN, rows=MANY), tiny_hparams()))
        with torch.no_grad():
            predicted = llama(input_ids=torch.tensor([fact.ids])).logits[0].argmax(-1)
        assert tuple(predicted[list(fact.positions)].tolist()) == fact.answer
