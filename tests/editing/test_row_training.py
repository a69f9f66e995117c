"""Eq. 8-11 against full-matrix training, the loss, and writing and undoing bit by bit."""

import math

import peft
import pytest
import torch
from conftest import (
    GPT2_DOWN,
    LLAMA_DOWN,
    ONE_TOKEN,
    SIZE,
    SPELLED,
    bits,
    failing,
    fingerprint,
    make_gpt2,
    make_gptj,
    make_llama,
    tiny_hparams,
    weights,
)
from reference import literal_row_training

from kne_easyedit.editing import adapter, row_edit
from kne_easyedit.editing import row_training as training
from kne_easyedit.editing.adapter import row_adapter
from kne_easyedit.editing.objectives import answer_loss
from kne_easyedit.editing.row_edit import RowEdit, restore, write_rows
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.facts.encoding import IGNORE, collate, encode
from kne_easyedit.localization.ensemble import NeuronEnsemble

ROWS = {0: (2, 3, 11), 2: (0,), 3: (5, 23)}
"""Several layers, of different numbers of neurons; the last row of a matrix is among them."""

MANY = {layer: tuple(range(0, SIZE["hidden"], 2)) for layer in range(SIZE["layers"])}
"""Enough to learn any fact."""


def ensemble_of(*templates, rows=ROWS, width=None):
    widths = {t: width or (SIZE["inner"] if t.endswith(("up_proj", "fc_in")) else SIZE["hidden"]) for t in templates}
    return NeuronEnsemble({template: rows for template in templates}, widths)


def masks_of(model, ensemble, transposed=False):
    """Parameter name -> (mask of the chosen entries, number of neurons), without the package's help."""
    masks = {}
    for template, layers in ensemble.neurons.items():
        for layer, rows in layers.items():
            name = f"{template.format(layer)}.weight"
            mask = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
            (mask.t() if transposed else mask)[list(rows)] = True
            masks[name] = mask, len(rows)
    return masks


def full_deltas(model, edit, transposed=False):
    """The edit's rows scattered into matrices of the weights' shapes."""
    full = {}
    for name, (rows, delta) in edit.deltas.items():
        matrix = torch.zeros_like(model.get_parameter(f"{name}.weight"), dtype=delta.dtype, requires_grad=False)
        (matrix.t() if transposed else matrix)[list(rows)] = delta
        full[f"{name}.weight"] = matrix
    return full


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
        # kaiming_uniform with a = sqrt(5) draws from +-1/sqrt(d1); alpha/sqrt(n) scales it; two roundings are less than 1e-6
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


class TestLoss:
    def test_padding_side_makes_no_difference(self, family, facts):
        right = answer_loss(family.model, collate(facts, padding_side="right")).item()
        left = answer_loss(family.model, collate(facts, padding_side="left")).item()
        assert abs(left - right) < 1e-12

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_token_makes_no_difference(self, family, facts, side):
        """Not even one that is the end token, or a token of the answers: the mask decides."""
        plain = answer_loss(family.model, collate(facts, padding_side=side)).item()
        for pad_id in (1, facts[0].answer[0]):
            assert abs(answer_loss(family.model, collate(facts, pad_id, side)).item() - plain) < 1e-12

    def test_mean_over_the_answer_tokens_of_all_facts(self, family, facts):
        logs = []
        for fact in facts:
            logits = family.model(input_ids=torch.tensor([fact.ids])).logits[0].log_softmax(-1)
            logs += [logits[at, token].item() for at, token in zip(fact.positions, fact.answer, strict=True)]
        assert len(logs) == 1 + 3 + 4
        assert answer_loss(family.model, collate(facts)).item() == pytest.approx(-sum(logs) / len(logs), abs=1e-12)

    def test_gradient_comes_from_the_predicting_positions_only(self, llama64, facts):
        """Prompt tokens, padding and the last answer token predict nothing that counts."""
        seen = []
        handle = llama64.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.retain_grad() or out))
        batch = collate(facts)
        answer_loss(llama64, batch).backward()
        handle.remove()
        predicting = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for i, fact in enumerate(facts):
            predicting[i, list(fact.positions)] = True
        assert torch.equal(seen[0].grad.abs().sum(-1) > 0, predicting)

    def test_is_in_float32_at_least(self, facts):
        assert answer_loss(make_llama(torch.bfloat16), collate(facts)).dtype == torch.float32
        assert answer_loss(make_llama(torch.float64), collate(facts)).dtype == torch.float64


class TestCollate:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_labels_are_the_answers_where_they_stand(self, facts, side):
        batch = collate(facts, pad_id=7, padding_side=side)
        width = max(len(fact.ids) for fact in facts)
        for fact, ids, mask, labels in zip(facts, batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            pad = width - len(fact.ids)
            before, after = (pad, 0) if side == "left" else (0, pad)
            assert ids.tolist() == [7] * before + list(fact.ids) + [7] * after
            assert mask.tolist() == [0] * before + [1] * len(fact.ids) + [0] * after
            assert labels.tolist() == [IGNORE] * (before + fact.prompt_length) + list(fact.answer) + [IGNORE] * after


def edit_of(model, template=LLAMA_DOWN, rows=ROWS):
    """A hand-made edit of all the ensemble's rows."""
    generator = torch.Generator().manual_seed(3)
    deltas = {}
    for layer, found in rows.items():
        weight = model.get_submodule(template.format(layer)).weight
        inputs = weight.numel() // SIZE["hidden"]
        deltas[template.format(layer)] = found, torch.randn(len(found), inputs, generator=generator).to(torch.float32)
    return RowEdit(deltas, (1.0, 0.1))


CASES = [(make_llama, LLAMA_DOWN), (make_gptj, "transformer.h.{}.mlp.fc_out"), (make_gpt2, GPT2_DOWN)]


class TestWriting:
    @pytest.mark.parametrize(("make", "template"), CASES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_exactly_the_chosen_rows_change(self, make, template, dtype):
        """Both ways: every chosen row has changed, every other bit of the model is equal."""
        model, untouched = make(dtype), make(dtype)
        write_rows(model, edit_of(model, template))
        masks = masks_of(model, ensemble_of(template), transposed=make is make_gpt2)
        for name, parameter in model.named_parameters():
            same = parameter == untouched.get_parameter(name)
            mask, _ = masks.get(name, (torch.zeros_like(same), 0))
            assert bits(parameter[~mask]) == bits(untouched.get_parameter(name)[~mask])
            changed = (~same).t() if make is make_gpt2 and mask.any() else ~same
            rows = mask.t() if make is make_gpt2 and mask.any() else mask
            assert torch.equal(changed.flatten(1).any(1), rows.flatten(1).any(1)) if mask.any() else same.all()

    @pytest.mark.parametrize(("make", "template"), CASES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_restores_bit_by_bit(self, make, template, dtype):
        model = make(dtype)
        before = fingerprint(model)
        originals = write_rows(model, edit_of(model, template))
        assert set(originals) == {f"{template.format(layer)}.weight" for layer in ROWS}
        changed = weights(model)
        assert {name for name, digest in changed.items() if digest != before["weights"][name]} == set(originals)
        restore(model, originals)
        assert fingerprint(model) == before

    def test_subtracting_would_not_restore(self):
        """Converse: the reason why originals are kept, and not differences."""
        model = make_llama(torch.bfloat16)
        before = weights(model)
        edit = edit_of(model)
        write_rows(model, edit)
        write_rows(model, RowEdit({name: (rows, -delta) for name, (rows, delta) in edit.deltas.items()}, edit.losses))
        assert weights(model) != before

    def test_adds_in_float32_and_rounds_once(self):
        model = make_llama(torch.bfloat16)
        name = LLAMA_DOWN.format(0)
        edit = edit_of(model)
        rows, delta = edit.deltas[name]
        expected = (model.get_submodule(name).weight[list(rows)].float() + delta).bfloat16()
        write_rows(model, edit)
        assert torch.equal(model.get_submodule(name).weight[list(rows)], expected)

    def test_originals_are_copies(self, llama):
        before = bits(llama.get_submodule(LLAMA_DOWN.format(0)).weight)
        originals = write_rows(llama, edit_of(llama))
        assert bits(originals[f"{LLAMA_DOWN.format(0)}.weight"]) == before

    def test_the_written_model_has_the_last_loss(self, family, facts):
        edit = train_rows(family.model, facts, ensemble_of(family.down), tiny_hparams(family.down, num_steps=20))
        write_rows(family.model, edit)
        with torch.no_grad():
            loss = answer_loss(family.model, collate(facts)).item()
        assert loss == pytest.approx(edit.losses[-1], abs=1e-9)
        assert edit.losses[-1] < edit.losses[0] - 0.1

    def test_row_257_in_bfloat16(self, tokenizer):
        """As an integer tensor that is cast to bf16, row 257 would become row 256."""
        template = "model.layers.{}.mlp.up_proj"
        model = make_llama(torch.bfloat16, intermediate_size=300)
        before = {i: model.get_submodule(template.format(2)).weight[i].clone() for i in (255, 256, 257, 258)}
        ensemble = ensemble_of(template, rows={2: (257,)}, width=300)
        edit = train_rows(
            model, [encode(tokenizer, *ONE_TOKEN)], ensemble, tiny_hparams(template, lr=1.0, num_steps=1, stop_loss=0)
        )
        assert edit.deltas[template.format(2)][0] == (257,)
        write_rows(model, edit)
        after = model.get_submodule(template.format(2)).weight
        assert [i for i, row in before.items() if not torch.equal(after[i], row)] == [257]


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
            (training, "answer_logits", 1),
            (training, "answer_logits", 3),
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

    @pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_after_an_exception_while_writing(self, monkeypatch, dtype, error):
        model = make_llama(dtype)
        before = fingerprint(model)
        real, seen = row_edit.rows, []

        def rows(module, *args):
            seen.append(weights(model) != before["weights"])
            if len(seen) == 3:
                raise error
            return real(module, *args)

        monkeypatch.setattr(row_edit, "rows", rows)
        with pytest.raises(type(error)):
            write_rows(model, edit_of(model))
        assert seen == [False, True, True], "some rows were written before the exception"
        assert fingerprint(model) == before

    def test_edits_work_after_an_exception(self, llama, facts, monkeypatch):
        expected = train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=2)).losses
        with monkeypatch.context() as patch:
            patch.setattr(training, "answer_logits", failing(training.answer_logits, 2, KeyboardInterrupt()))
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
