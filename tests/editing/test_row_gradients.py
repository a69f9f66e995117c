"""Projected gradients of the rows: by tokens or by rows, whichever are fewer, and the same."""

from __future__ import annotations

import pytest
import torch
from conftest import LLAMA_DOWN, fingerprint, tiny_hparams
from edits import ensemble_of

from kne_easyedit.editing.adapter import ADAPTER, row_adapter
from kne_easyedit.editing.losses import answer_loss
from kne_easyedit.editing.optimizers import TrainedRows
from kne_easyedit.editing.projection import InputProjection
from kne_easyedit.editing.row_gradients import row_gradients
from kne_easyedit.facts.encoding import collate
from kne_easyedit.models.state import preserve_state

MANY, FEW = tuple(range(20)), (1, 5)
"""Rows of a module: more than the first fact has tokens, and fewer."""


class Watched(InputProjection):
    """Says how many directions it was asked for."""

    def __init__(self, inputs):
        super().__init__(inputs, 1e-5)
        self.asked: list[int] = []

    def __call__(self, directions):
        self.asked.append(len(directions))
        return super().__call__(directions)


@pytest.fixture
def in_training(llama64):
    """Runs a function inside training, with rows of two layers, the first of which have a projection."""

    def run(function, some_rows, projected=True):
        draw = torch.Generator().manual_seed(3)
        projection = Watched(torch.randn(15, 40, dtype=torch.float64, generator=draw)) if projected else None
        ensemble = ensemble_of(LLAMA_DOWN, rows={1: some_rows, 3: (0, 2)})
        with preserve_state(llama64), row_adapter(llama64, ensemble, tiny_hparams()) as layers:
            rows = [
                TrainedRows(name, layer.lora_A[ADAPTER].weight, layer.scaling[ADAPTER], projection if not i else None)
                for i, (name, layer) in enumerate(layers.items())
            ]
            with torch.no_grad():  # not at 0, or the upper rows would tell the lower ones nothing new
                for one in rows:
                    one.values.normal_(generator=draw)
            with torch.enable_grad(), row_gradients(rows, layers) as gradients:
                return function(gradients, rows), projection

    return run


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("some_rows", [MANY, FEW])
def test_they_are_the_projection_of_the_whole_gradient(llama64, facts, in_training, some_rows, passes):
    """In a batch with padding, and where the loss is of several passes; a pass that it is not of does not count."""

    def both(gradients, rows):
        loss = sum(answer_loss(llama64, collate(facts[: 1 + i])) for i in range(passes))
        answer_loss(llama64, collate(facts))
        expected = torch.autograd.grad(loss, [one.values for one in rows], retain_graph=True)
        return expected, *gradients.of(loss)

    before = fingerprint(llama64)
    (expected, whole, directions), projection = in_training(both, some_rows)
    assert all(torch.equal(one, other) and one.any() for one, other in zip(whole, expected))
    assert torch.allclose(directions[0], InputProjection.__call__(projection, expected[0]), rtol=0, atol=1e-10)
    assert directions[0].any() and not torch.allclose(directions[0], expected[0])
    assert directions[1] is whole[1], "no projection"
    assert fingerprint(llama64) == before


def test_tokens_are_projected_if_they_are_fewer(llama64, facts, in_training):
    """Tokens behind the last one that predicts something, and padding, do not count."""

    tokens = sum(len(fact.ids) - 1 for fact in facts[:1])
    _, few = in_training(lambda g, rows: g.of(answer_loss(llama64, collate(facts[:1]))), FEW)
    _, many = in_training(lambda g, rows: g.of(answer_loss(llama64, collate(facts[:1]))), MANY)
    assert many.asked == [tokens] and tokens < len(MANY) and few.asked == [len(FEW)]


def test_a_step_after_another_knows_only_its_own(llama64, facts, in_training):
    def twice(gradients, rows):
        return [gradients.of(answer_loss(llama64, collate(facts[:1])))[1][0] for _ in range(2)]

    (one, other), _ = in_training(twice, MANY)
    assert torch.equal(one, other) and one.any()
