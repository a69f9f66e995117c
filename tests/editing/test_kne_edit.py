"""A `KNEEdit` in the weights of a loaded model: applied, taken back, refused, and what it was trained on."""

import logging
import shutil
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from conftest import (
    GPT2_DOWN,
    GPTJ_DOWN,
    LLAMA_DOWN,
    failing,
    fingerprint,
    make_gpt2,
    make_gptj,
    make_llama,
    tiny_hparams,
    weights,
)
from edits import REQUEST, edit_of, ensemble_of, thing_of

from kne_easyedit.editing import applying, lineage
from kne_easyedit.editing.applying import set_edits
from kne_easyedit.editing.edit import apply_kne_to_model, compute_edit
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.editing.row_edit import RowEdit, write_rows

ENSEMBLE = ensemble_of(LLAMA_DOWN)
QUICK = tiny_hparams(num_steps=2)
CASES = [(make_llama, LLAMA_DOWN), (make_gptj, GPTJ_DOWN), (make_gpt2, GPT2_DOWN)]


class TestWhatItSays:
    def test_compute_edit_and_on_trained_give_the_same(self, llama, tokenizer):
        handed = []
        edit = compute_edit(llama, tokenizer, [REQUEST], tiny_hparams())
        apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams(), on_trained=handed.append)
        assert handed == [edit] and isinstance(edit, KNEEdit)
        assert edit.requests == (REQUEST,)
        assert edit.facts == ("The capital of France is -> Rome",)
        assert edit.ensemble.size == edit.size > 0
        assert edit.hparams["p"] == 0.2 and edit.versions["torch"] == torch.__version__
        assert edit.trained_on == ()
        assert edit.probabilities[-1] == pytest.approx(edit.answers[0].probability, rel=1e-4)

    def test_the_scale_is_in_the_deltas(self, llama, tokenizer):
        edit = compute_edit(llama, tokenizer, [REQUEST], tiny_hparams(alpha=3.0, num_steps=1), ENSEMBLE)
        for name, (chosen, _) in edit.deltas.items():
            assert edit.scaling[name] == pytest.approx(3.0 / len(chosen) ** 0.5)

    def test_it_is_frozen(self, llama):
        with pytest.raises(FrozenInstanceError):
            thing_of(llama).losses = ()

    def test_equal_are_those_that_add_the_same(self, llama):
        one = thing_of(llama)
        assert one == thing_of(llama) and hash(one) == hash(thing_of(llama))
        assert one != thing_of(llama, seed=1)
        assert one != replace(one, trained_on=("0" * 64,))

    def test_shared_rows(self, llama):
        one = thing_of(llama, layers=(0, 2), rows=(1, 2, 3))
        assert one.shared_rows(thing_of(llama, layers=(2, 3), rows=(2, 3, 4))) == 2
        assert one.shared_rows(thing_of(llama, layers=(3,))) == 0

    def test_without_on_trained_nothing_is_fingerprinted(self, llama, tokenizer, monkeypatch):
        monkeypatch.setattr("kne_easyedit.editing.kne_edit.base_of", lambda *_: pytest.fail("fingerprinted"))
        rows = []
        apply_kne_to_model(llama, tokenizer, [REQUEST], QUICK, ensemble=ENSEMBLE, on_rows=rows.append)
        assert [type(one) for one in rows] == [RowEdit]


class TestApplying:
    @pytest.mark.parametrize(("make", "template"), CASES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_writes_what_write_rows_writes_and_takes_it_back(self, make, template, dtype):
        model, other = make(dtype), make(dtype)
        before, edit = fingerprint(model), thing_of(model, template=template)
        edit.apply(model)
        write_rows(other, edit)
        assert weights(model) == weights(other) != before["weights"]
        edit.take_back(model)
        assert fingerprint(model) == before

    def test_applied_is_for_the_block_alone(self, llama):
        before, edit = fingerprint(llama), thing_of(llama)
        with edit.applied(llama) as model:
            assert model is llama and weights(llama) != before["weights"]
        assert fingerprint(llama) == before

    def test_applied_ends_after_an_exception_too(self, llama):
        before = fingerprint(llama)
        with pytest.raises(RuntimeError, match="inside"), thing_of(llama).applied(llama):
            raise RuntimeError("inside")
        assert fingerprint(llama) == before

    def test_applied_inside_applied(self, llama):
        before, one, two = weights(llama), thing_of(llama, 1), thing_of(llama, 2)
        with one.applied(llama):
            alone = weights(llama)
            with two.applied(llama):
                assert weights(llama) not in (alone, before)
            assert weights(llama) == alone
        assert weights(llama) == before

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rounded_once(self, dtype):
        model = make_llama(dtype)
        name, rows = LLAMA_DOWN.format(0), [2, 3, 11]
        base = model.get_submodule(name).weight[rows].clone()
        edits = [thing_of(model, seed, scale=0.01) for seed in range(4)]
        for edit in edits:
            edit.apply(model)
        total = base.float()
        for edit in edits:
            total = total + edit.deltas[name][1]
        assert torch.equal(model.get_submodule(name).weight[rows], total.to(dtype))
        if dtype is torch.bfloat16:  # converse: rounded at every step they are others
            for edit in edits:
                base = (base.float() + edit.deltas[name][1]).to(dtype)
            assert not torch.equal(base, total.to(dtype))

    @pytest.mark.parametrize("taken", [0, 1, 2])
    def test_taking_back_one_of_many_is_applying_the_others(self, taken):
        model, fresh = make_llama(torch.bfloat16), make_llama(torch.bfloat16)
        edits = [thing_of(model, seed, rows=(seed, 5, 9)) for seed in range(3)]
        for edit in edits:
            edit.apply(model)
        edits[taken].take_back(model)
        for edit in (*edits[:taken], *edits[taken + 1 :]):
            edit.apply(fresh)
        assert weights(model) == weights(fresh)

    def test_subtracting_would_not_take_back(self):
        """Converse: the reason why values without edits are kept."""
        model = make_llama(torch.bfloat16)
        before, edit = weights(model), thing_of(model)
        edit.apply(model)
        write_rows(model, replace(edit, deltas={n: (rows, -delta) for n, (rows, delta) in edit.deltas.items()}))
        assert weights(model) != before

    @pytest.mark.parametrize("call", range(1, 7))
    def test_interrupts_around_applied(self, monkeypatch, call):
        """Ctrl-C after every part of the set-up, and twice at the end."""
        model = make_llama(torch.bfloat16)
        one, two = thing_of(model, 1), thing_of(model, 2, layers=(1, 2))
        one.apply(model)
        before, entered = fingerprint(model), []
        real = applying.defer_interrupts

        class Interrupted(real):
            calls = 0

            def __enter__(self):
                Interrupted.calls += 1
                if Interrupted.calls == call:  # before anything is deferred
                    raise KeyboardInterrupt
                super().__enter__()

            def __exit__(self, *error):
                super().__exit__(*error)
                Interrupted.calls += 1
                if Interrupted.calls in (call, call + 1) and error[0] is None:  # after the block, before the caller
                    raise KeyboardInterrupt

        monkeypatch.setattr(applying, "defer_interrupts", Interrupted)
        try:
            with two.applied(model):
                entered.append(True)
        except KeyboardInterrupt:
            pass
        else:
            assert call > 4
        assert fingerprint(model) == before and lineage.edited(model).digests == (one.digest,)
        monkeypatch.undo()
        one.take_back(model)
        assert weights(model) == weights(make_llama(torch.bfloat16))

    def test_the_end_of_applied_reads_nothing(self, tmp_path, llama, monkeypatch):
        """The earlier edit's files may be gone by then, and no matrix is hashed."""
        thing_of(llama, 1).save(tmp_path / "one")
        one, two = KNEEdit.load(tmp_path / "one"), thing_of(llama, 2)
        one.apply(llama)
        before = weights(llama)
        with two.applied(llama):
            shutil.rmtree(tmp_path / "one")
            monkeypatch.setattr(applying, "base_of", lambda *_: pytest.fail("hashed"))
        assert weights(llama) == before and lineage.edited(llama).digests == (one.digest,)

    def test_what_is_taken_back_inside_applied_is_there_afterwards(self, llama):
        one, two, three = (thing_of(llama, seed, layers=(seed,)) for seed in (1, 2, 3))
        one.apply(llama)
        before = weights(llama)
        with two.applied(llama):
            set_edits(llama, [three])
        assert weights(llama) == before and lineage.edited(llama).digests == (one.digest,)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, tmp_path, llama, value):
        edit, before = thing_of(llama), fingerprint(llama)
        edit.deltas[LLAMA_DOWN.format(2)][1][1, 3] = value
        with pytest.raises(ValueError, match=r"values for model.layers.2.mlp.down_proj that are not finite"):
            edit.apply(llama)
        with pytest.raises(ValueError, match="not finite"):
            edit.save(tmp_path / "edit")
        assert fingerprint(llama) == before and not (tmp_path / "edit").exists()

    def test_twice_is_once(self, llama):
        edit = thing_of(llama)
        edit.apply(llama)
        once = weights(llama)
        edit.apply(llama)
        assert weights(llama) == once
        with pytest.raises(ValueError, match="occurs twice"):
            set_edits(llama, [edit, edit])

    def test_taking_back_what_is_not_there(self, llama):
        with pytest.raises(ValueError, match="is not applied to this model; apply it first"):
            thing_of(llama).take_back(llama)

    @pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_after_an_exception_while_writing(self, monkeypatch, error, call):
        model = make_llama(torch.bfloat16)
        one, two = thing_of(model, 1), thing_of(model, 2, layers=(0, 1, 3))
        one.apply(model)
        before = fingerprint(model)
        monkeypatch.setattr(applying, "add_rows", failing(applying.add_rows, call, error))
        with pytest.raises(type(error)):
            two.apply(model)
        assert fingerprint(model) == before
        monkeypatch.undo()
        one.take_back(model)
        assert weights(model) == weights(make_llama(torch.bfloat16))

    def test_an_interrupt_at_the_very_end(self, monkeypatch):
        """After everything is written and noted: undone, and the edit from before can still be taken back."""
        model = make_llama(torch.bfloat16)
        one, two = thing_of(model, 1), thing_of(model, 2, layers=(1, 3))
        one.apply(model)
        before = fingerprint(model)

        class Interrupted(applying.defer_interrupts):
            def __exit__(self, *error):
                self._undo()
                raise KeyboardInterrupt

        for act in (lambda: two.apply(model), lambda: one.take_back(model)):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(applying, "defer_interrupts", Interrupted)
                act()
            assert fingerprint(model) == before
        one.take_back(model)
        assert weights(model) == weights(make_llama(torch.bfloat16))

    def test_no_second_copy_is_kept(self, llama):
        """Of a module only the rows that edits change, and nothing once they are taken back."""
        edit = thing_of(llama)
        edit.apply(llama)
        kept = lineage._LINEAGES[llama].originals
        assert {name: tuple(index.tolist()) for name, (index, _) in kept.items()} == {
            name: chosen for name, (chosen, _) in edit.deltas.items()
        }
        edit.take_back(llama)
        assert llama not in lineage._LINEAGES


class TestAnotherBase:
    @pytest.fixture
    def refused(self, caplog):
        def check(edit, model, message, shapes=False):
            before = fingerprint(model)
            with pytest.raises(ValueError, match=message):
                edit.apply(model)
            assert fingerprint(model) == before
            if shapes:  # nothing forces these
                with pytest.raises(ValueError, match=message):
                    edit.apply(model, force=True)
                assert fingerprint(model) == before
            else:
                with caplog.at_level(logging.WARNING):
                    edit.apply(model, force=True)
                assert weights(model) != before["weights"] and "applied to another base" in caplog.text

        return check

    def test_other_weights(self, llama, refused):
        refused(thing_of(llama), make_llama(seed=11), "weights of model.layers.0.mlp.down_proj differ")

    def test_one_bit(self, llama, refused):
        edit = thing_of(llama)
        with torch.no_grad():  # a row that the edit leaves alone
            llama.get_submodule(LLAMA_DOWN.format(2)).weight[20, 0] *= 1.0001
        refused(edit, llama, "weights of model.layers.2.mlp.down_proj differ")

    def test_weights_of_other_modules_do_not_count(self, llama):
        """Converse: only touched modules are fingerprinted."""
        edit = thing_of(llama)
        with torch.no_grad():
            llama.get_submodule(LLAMA_DOWN.format(1)).weight[20, 0] += 1
        edit.apply(llama)

    def test_an_edited_model(self, llama, refused):
        """Edited by an edit that nobody knows."""
        edit = thing_of(llama)
        write_rows(llama, edit_of(llama))
        refused(edit, llama, "a model that is edited already")

    def test_another_configuration(self, llama, refused):
        edit = thing_of(llama)
        refused(edit, make_llama(num_hidden_layers=3), "its layers is 4, here it is 3")

    def test_another_width(self, llama, refused):
        refused(thing_of(llama), make_llama(intermediate_size=48), r"is \(24, 40\); here it is \(24, 48\)", shapes=True)

    def test_another_family(self, llama, refused):
        refused(thing_of(llama), make_gptj(), "GPTJForCausalLM has no module 'model.layers.0.mlp.down_proj'", True)

    def test_the_same_in_another_number_type(self):
        """A base in bfloat16, loaded in float32 or as it is."""
        half = make_llama(torch.bfloat16)
        edit = thing_of(half)
        same = make_llama(torch.bfloat16).float()
        edit.apply(same)
        assert weights(same) != weights(make_llama(torch.bfloat16).float())
        edit.take_back(same)
        assert weights(same) == weights(make_llama(torch.bfloat16).float())

    def test_a_base_that_is_rounded_says_in_which_type_to_load_it(self, llama):
        edit = thing_of(llama)
        with pytest.raises(ValueError, match=r"trained in float32, .* loaded in bfloat16: load it in float32 \(--set"):
            edit.apply(make_llama(torch.bfloat16))
        with pytest.raises(ValueError, match="weights of") as caught:  # converse
            edit.apply(make_llama(seed=11))
        assert "load it in" not in str(caught.value)

    def test_quantised(self, llama):
        edit = thing_of(llama)
        llama.get_submodule(LLAMA_DOWN.format(0)).weight = torch.nn.Parameter(
            torch.zeros(24, 40, dtype=torch.int8), requires_grad=False
        )
        for force in (False, True):
            with pytest.raises(ValueError, match="of type int8" if force else "a fine-tuned or quantised copy"):
                edit.apply(llama, force=force)
