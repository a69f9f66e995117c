"""Rows added to a module's output equal rows added to its weight, and leave nothing behind."""

import pytest
import torch
from conftest import GPT2_DOWN, GPTJ_DOWN, LLAMA_DOWN, fingerprint, make_gpt2, make_gptj, make_llama
from edits import edit_of
from rounding import A_MODEL, roundings

from kne_easyedit.editing.row_edit import write_rows
from kne_easyedit.edits.kept_answers import rows_added

IDS = torch.tensor([[3, 9, 4, 12, 7, 20]])


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("make", "template"), [(make_llama, LLAMA_DOWN), (make_gptj, GPTJ_DOWN), (make_gpt2, GPT2_DOWN)]
)
def test_equal_the_written_edit(make, template):
    model, written = make(), make()
    edit, before = edit_of(model, template), fingerprint(model)
    write_rows(written, edit, check=False)
    with rows_added(model, edit.deltas):
        assert roundings(logits(model), logits(written)) < A_MODEL
    assert fingerprint(model) == before
    assert roundings(logits(model), logits(written)) > 1000 * A_MODEL


def test_no_hook_is_left_after_an_error():
    model = make_llama()
    edit, before = edit_of(model), fingerprint(model)
    with pytest.raises(RuntimeError, match="inside"), rows_added(model, edit.deltas):
        raise RuntimeError("inside")
    with (
        pytest.raises(ValueError, match=r"no module 'model\.layers\.9\.x'"),
        rows_added(model, {**edit.deltas, "model.layers.9.x": ((0,), torch.ones(1, 40))}),
    ):
        pass
    assert fingerprint(model) == before
