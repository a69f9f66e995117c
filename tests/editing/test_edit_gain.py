"""Trained rows that are multiplied afterwards, as far as every answer keeps its loss."""

from __future__ import annotations

import pytest
import torch
from conftest import LLAMA_DOWN, bits, tiny_hparams
from edits import MANY, ensemble_of

from kne_easyedit import answer_loss, collate, restore, write_rows
from kne_easyedit.editing.row_training import train_rows

ENSEMBLE = ensemble_of(LLAMA_DOWN, rows=MANY)


def trained(model, facts, **settings):
    return train_rows(model, facts, ENSEMBLE, tiny_hparams(optimizer="polyak", **{"stop_loss": 0.3, **settings}))


def largest(ours, theirs, gain):
    """How far deltas are from others that are multiplied by ``gain``."""
    return max((ours.deltas[name][1] - gain * theirs.deltas[name][1]).abs().max().item() for name in theirs.deltas)


def losses_with(model, facts, edit, gain):
    """Each fact's loss with the deltas multiplied, in the written model."""
    with torch.no_grad():
        originals = write_rows(model, edit, check=False)
        for name, (rows, delta) in edit.deltas.items():
            model.get_submodule(name).weight[list(rows)] += (gain - 1) * delta
        found = [answer_loss(model, collate([fact])).item() for fact in facts]
    restore(model, originals)
    return found


@pytest.mark.parametrize("gain", [1.3, 3.0, 30.0])
def test_is_the_largest_that_keeps_every_answer(llama64, facts, gain):
    """Of three, in equal steps above 1, by the losses of the written model. Losses and answers are the deltas'."""
    plain, gained = trained(llama64, facts[:2]), trained(llama64, facts[:2], edit_gain=gain)
    tried = [1 + (gain - 1) * part / 3 for part in (3, 2, 1)]
    expected = next((g for g in tried if max(losses_with(llama64, facts[:2], plain, g)) < 0.3), 1.0)
    assert largest(gained, plain, expected) < 1e-12
    assert gained.losses[:-1] == plain.losses[:-1] and gained.steps == plain.steps
    own = losses_with(llama64, facts[:2], plain, expected)
    assert [answer.loss for answer in gained.answers] == pytest.approx(own, rel=1e-9)
    write_rows(llama64, gained)  # compares the loss of the written model with the last one


def test_some_gain_is_taken_and_some_is_not(llama64, facts):
    plain = trained(llama64, facts[:1])
    assert largest(trained(llama64, facts[:1], edit_gain=1.3), plain, 1.3) < 1e-12
    far = trained(llama64, facts[:1], edit_gain=1e4)
    assert largest(far, plain, 1.0) == 0 and far.losses == plain.losses


@pytest.mark.parametrize("settings", [{"edit_gain": 1.0}, {"edit_gain": 2.0, "num_steps": 1}], ids=str)
def test_without_gain_or_success_nothing_changes(llama, facts, settings):
    off = {**settings, "edit_gain": 1.0}
    one, other = trained(llama, facts, **settings), trained(llama, facts, **off)
    assert one.losses == other.losses
    for name, (_, delta) in one.deltas.items():
        assert bits(delta) == bits(other.deltas[name][1])
