"""What a `KNEEdit` was trained on, and what is known of a model's edits: written, restored, copied, overwritten."""

import gc

import pytest
import torch
from conftest import LLAMA_DOWN, failing, make_llama, tiny_hparams, weights
from edits import REQUEST, REQUESTS, edit_of, edited, ensemble_of, thing_of

from kne_easyedit.editing import applying, lineage
from kne_easyedit.editing.applying import set_edits
from kne_easyedit.editing.edit import apply_kne_to_model, compute_edit
from kne_easyedit.editing.row_edit import restore, write_rows

ENSEMBLE = ensemble_of(LLAMA_DOWN)
QUICK = tiny_hparams(num_steps=2)


class TestTrainedOn:
    def test_an_edit_trained_on_others_says_so(self, llama, tokenizer):
        handed = []
        for one in REQUESTS[:2]:
            apply_kne_to_model(llama, tokenizer, [one], QUICK, ensemble=ENSEMBLE, on_trained=handed.append)
        first, second = handed
        assert first.trained_on == () and second.trained_on == (first.digest,)
        assert second.base.conflict(first.base) is None, "the base is that without the first"
        third = compute_edit(llama, tokenizer, [REQUESTS[2]], QUICK, ENSEMBLE)
        assert third.trained_on == (first.digest, second.digest)

    def test_both_are_applied_to_the_base(self, tokenizer):
        model, base = make_llama(), make_llama()
        handed = []
        for one in REQUESTS[:2]:
            apply_kne_to_model(model, tokenizer, [one], QUICK, ensemble=ENSEMBLE, on_trained=handed.append)
        set_edits(base, handed)
        for one in REQUESTS[:2]:
            assert edited(base, tokenizer, one) == edited(model, tokenizer, one)
        for name in handed[0].deltas:
            torch.testing.assert_close(base.get_submodule(name).weight, model.get_submodule(name).weight)

    def test_what_was_restored_does_not_count(self, llama, tokenizer):
        """Converse: by `restore`, and as EasyEdit does it."""
        for put_back in (restore, _as_easyedit):
            handed = []
            _, originals = apply_kne_to_model(
                llama,
                tokenizer,
                [REQUEST],
                QUICK,
                ensemble=ENSEMBLE,
                on_trained=handed.append,
                return_orig_weights=True,
            )
            put_back(llama, originals)
            edit = compute_edit(llama, tokenizer, [REQUESTS[1]], QUICK, ENSEMBLE)
            assert edit.trained_on == () and edit.base.conflict(handed[0].base) is None

    def test_restoring_the_last_leaves_the_first(self, llama, tokenizer):
        handed = []
        for one in REQUESTS[:2]:
            _, originals = apply_kne_to_model(
                llama, tokenizer, [one], QUICK, ensemble=ENSEMBLE, on_trained=handed.append, return_orig_weights=True
            )
        restore(llama, originals)
        assert compute_edit(llama, tokenizer, [REQUESTS[2]], QUICK, ENSEMBLE).trained_on == (handed[0].digest,)
        handed[0].take_back(llama)
        assert weights(llama) == weights(make_llama())

    def test_restoring_an_earlier_one_names_the_later_ones(self, llama, tokenizer, caplog):
        handed, originals = [], []
        for one in REQUESTS:
            _, kept = apply_kne_to_model(
                llama, tokenizer, [one], QUICK, ensemble=ENSEMBLE, on_trained=handed.append, return_orig_weights=True
            )
            originals.append(kept)
        caplog.clear()
        restore(llama, originals[2])
        assert caplog.text == ""  # converse: the last one
        handed[2].apply(llama)
        restore(llama, originals[0])
        (said,) = caplog.messages
        for edit in handed[1:]:
            assert f"{edit.digest[:12]} ({edit.facts[0]})" in said
        assert "gone with it are the later edits" in said and handed[0].digest[:12] not in said
        assert "take_back" in said
        assert weights(llama) == weights(make_llama())

    def test_restoring_an_earlier_one_of_other_modules(self, llama, caplog):
        one, two = thing_of(llama, 1, layers=(0,)), thing_of(llama, 2, layers=(0, 2))
        originals = write_rows(llama, one)
        write_rows(llama, two)
        restore(llama, originals)
        assert f"parts may be gone of {one.digest[:12]}" in caplog.text and two.digest[:12] in caplog.text

    @pytest.mark.parametrize("number", [1, 2])
    def test_restoring_an_edit_that_is_none_names_all_that_lie_on_top(self, llama, caplog, number):
        """It is not known itself, and in rows of its own. Conversely, nothing is said of the last, and they stay."""

        def applied():
            things = [thing_of(llama, seed, rows=(4, 5 + seed)) for seed in range(number)]
            for one in things:
                one.apply(llama)
            return things

        clean, raw = weights(llama), edit_of(llama)
        originals = write_rows(llama, raw)
        things = applied()
        restore(llama, originals)
        (said,) = caplog.messages
        assert all(one.digest[:12] in said for one in things) and "no KNEEdit" in said and weights(llama) == clean
        caplog.clear()
        things = applied()
        restore(llama, write_rows(llama, raw))
        assert not caplog.messages and lineage.edited(llama).digests == tuple(one.digest for one in things)

    def test_restoring_an_edit_that_is_none_in_rows_of_others_says_what_may_be_gone(self, llama, caplog):
        originals = write_rows(llama, edit_of(llama, rows={0: (2, 7)}))
        one = thing_of(llama, layers=(0,), rows=(2, 3))
        one.apply(llama)
        restore(llama, originals)
        assert f"parts may be gone of {one.digest[:12]}" in caplog.text

    def test_a_copy_has_the_same_edits(self, llama, tokenizer):
        first = thing_of(llama)
        first.apply(llama)
        handed = []
        copy, _ = apply_kne_to_model(
            llama, tokenizer, [REQUEST], QUICK, ensemble=ENSEMBLE, copy=True, on_trained=handed.append
        )
        assert handed[0].trained_on == (first.digest,)
        set_edits(copy, [])
        assert weights(copy) == weights(make_llama())
        first.take_back(llama)
        assert weights(llama) == weights(make_llama())

    def test_written_rows_are_not_kept_alive(self, llama, tokenizer):
        """A sequence of a thousand edits keeps their digests, not their rows."""
        apply_kne_to_model(llama, tokenizer, [REQUEST], QUICK, ensemble=ENSEMBLE, on_trained=lambda _: None)
        gc.collect()
        with pytest.raises(ValueError, match="whose rows are not at hand"):
            compute_edit(llama, tokenizer, [REQUESTS[1]], QUICK, ENSEMBLE).apply(llama)
        set_edits(llama, [])  # the base needs none of them
        assert weights(llama) == weights(make_llama())

    def test_rows_changed_by_something_else(self, llama):
        edit = thing_of(llama)
        edit.apply(llama)
        with torch.no_grad():
            llama.get_submodule(LLAMA_DOWN.format(0)).weight[2] += 1
        before = weights(llama)
        with pytest.raises(ValueError, match="changed by something else since"):
            edit.take_back(llama)
        with pytest.raises(ValueError, match="the base cannot be restored; load the model again"):
            set_edits(llama, [])
        with pytest.raises(ValueError, match="changed by something else since they were written"):
            edit.apply(llama)
        assert weights(llama) == before

    def test_rows_changed_by_something_else_are_remembered(self, llama):
        """Another edit, even of other modules, does not make the changed weights a base."""
        edit, other = thing_of(llama, layers=(0,)), thing_of(llama, 1, layers=(2,))
        edit.apply(llama)
        with torch.no_grad():
            llama.get_submodule(LLAMA_DOWN.format(0)).weight[2] += 1
        before = weights(llama)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"changed by something else since they were written.*force=True"):
                other.apply(llama)
            assert weights(llama) == before and lineage.edited(llama).lost
        with pytest.raises(RuntimeError, match="inside"), other.applied(llama, force=True):
            raise RuntimeError("inside")
        assert weights(llama) == before and lineage.edited(llama).lost
        other.apply(llama, force=True)  # converse
        assert lineage.edited(llama).digests == (other.digest,)

    def test_an_error_while_writing_keeps_what_is_remembered(self, llama, monkeypatch):
        edit, other = thing_of(llama, layers=(0,)), thing_of(llama, 1, layers=(2,))
        edit.apply(llama)
        with torch.no_grad():
            llama.get_submodule(LLAMA_DOWN.format(0)).weight[2] += 1
        before = weights(llama)
        monkeypatch.setattr(applying, "add_rows", failing(applying.add_rows, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            other.apply(llama, force=True)
        assert weights(llama) == before and lineage.edited(llama).lost

    def test_rows_changed_inside_applied_are_put_back(self, llama):
        before = weights(llama)
        with thing_of(llama).applied(llama), torch.no_grad():
            llama.get_submodule(LLAMA_DOWN.format(0)).weight[2] += 1
        assert weights(llama) == before


@torch.no_grad()
def _as_easyedit(model, originals):
    parameters = dict(model.named_parameters())
    for name, value in originals.items():
        parameters[name][...] = value
