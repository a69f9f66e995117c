"""Eq. 11: rows written into the weights, and restored bit for bit."""

import pytest
import torch
from conftest import (
    GPT2_DOWN,
    LLAMA_DOWN,
    ONE_TOKEN,
    bits,
    fingerprint,
    make_gpt2,
    make_gptj,
    make_llama,
    tiny_hparams,
    weights,
)
from edits import ROWS, edit_of, ensemble_of, masks_of

from kne_easyedit.editing.losses import answer_loss
from kne_easyedit.editing.row_edit import RowEdit, restore, write_rows
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.facts.encoding import collate, encode
from kne_easyedit.models.weights import Weight

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

    @pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_after_an_exception_while_writing(self, monkeypatch, dtype, error):
        model = make_llama(dtype)
        before = fingerprint(model)
        real, seen = Weight.__setitem__, []

        def write(weight, *args):
            seen.append(weights(model) != before["weights"])
            if len(seen) == 3:
                raise error
            real(weight, *args)

        monkeypatch.setattr(Weight, "__setitem__", write)
        with pytest.raises(type(error)):
            write_rows(model, edit_of(model))
        assert seen == [False, True, True], "some rows were written before the exception"
        assert fingerprint(model) == before
