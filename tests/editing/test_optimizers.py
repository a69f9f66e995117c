"""Polyak's step: its length, its direction, and what it does not depend on. AdamW is tested in test_row_training."""

from __future__ import annotations

import pytest
import torch
from conftest import LLAMA_DOWN, bits, tiny_hparams
from edits import ensemble_of, full_deltas, masks_of
from pytest import approx
from reference import literal_row_training

from kne_easyedit.editing.edit import EditFailed, apply_kne_to_model
from kne_easyedit.editing.optimizers import OPTIMIZERS, Polyak, TrainedRows
from kne_easyedit.editing.row_training import train_rows

POLYAK = {"optimizer": "polyak", "stop_loss": 0, "num_steps": 6}


def rows_of(*shapes: tuple[int, int], scale: float = 0.5) -> list[TrainedRows]:
    return [
        TrainedRows(f"m{i}", torch.zeros(shape, dtype=torch.float64, requires_grad=True), scale * (i + 1))
        for i, shape in enumerate(shapes)
    ]


def stepped(rows, loss, **settings) -> list[torch.Tensor]:
    """What is added to the weights after one step on ``loss(of what is added)``."""
    value = loss([one.scale * one.values for one in rows])
    gradients = torch.autograd.grad(value, [one.values for one in rows])
    Polyak(rows, tiny_hparams(**settings)).step(value.detach(), gradients)
    return [(one.scale * one.values).detach() for one in rows]


def test_the_length_on_a_quadratic():
    """1/2 sum ||ΔW_m - T_m||^2 with ||T|| = 3 and 4: L = 12.5, gradients of norm 3 and 4, so the length is 0.3 * 12.5
    / 7, the same for both modules whatever their scales."""
    targets = [torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64), torch.full((2, 2), 2.0, dtype=torch.float64)]
    loss = lambda added: sum((a - t).square().sum() for a, t in zip(added, targets)) / 2  # noqa: E731
    for change, target, norm in zip(stepped(rows_of((1, 3), (2, 2)), loss), targets, (3, 4)):
        assert torch.allclose(change, 0.3 * 12.5 / 7 * target / norm, rtol=1e-14, atol=0)


@pytest.mark.parametrize("fraction", [0.3, 0.8])
def test_a_linear_loss_falls_by_the_fraction(fraction):
    slopes = [torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    loss = lambda added: 5 + sum((a * s).sum() for a, s in zip(added, slopes))  # noqa: E731
    added = stepped(rows_of(*[(2, 3)] * 3), loss, polyak_fraction=fraction)
    assert loss(added).item() == approx(5 * (1 - fraction), rel=1e-14)


def test_rows_without_a_gradient_stay():
    """One module without any; then all."""
    first, second = stepped(rows_of((1, 2), (1, 2)), lambda added: 2 + added[0].sum() + 0 * added[1].sum())
    assert first.norm().item() == approx(0.3 * 2 / 2**0.5) and not second.any()
    (alone,) = stepped(rows_of((1, 2)), lambda added: 1 + 0 * added[0].sum())
    assert not alone.any()


def test_a_step_that_no_number_holds_is_refused_before_anything_moves():
    """Neighbours have closed all but a last bit of every direction, in which the loss all but stays."""
    free, closed = (torch.zeros(1, 2, requires_grad=True) for _ in range(2))
    rows = [
        TrainedRows("model.free", free, 0.5, lambda directions: 0 * directions),
        TrainedRows("model.closed", closed, 0.5, lambda directions: torch.tensor([[1.0, 0.0]])),
    ]
    gradients = [torch.ones(1, 2), torch.tensor([[1e-44, 1.0]])]
    with pytest.raises(FloatingPointError, match=r"step of model.closed is .*fewer neighbours.*projection_ridge"):
        Polyak(rows, tiny_hparams()).step(torch.tensor(1.0), gradients)
    assert not free.any() and not closed.any()


def test_without_a_projection_neighbours_are_not_blamed():
    rows = [TrainedRows("model.down", torch.zeros(1, 1, requires_grad=True), 0.5)]
    with pytest.raises(FloatingPointError, match=r"gradient is all but 0; load the model in float32") as caught:
        Polyak(rows, tiny_hparams()).step(torch.tensor(1.0), [torch.full((1, 1), 1e-21)])
    assert "neighbour" not in str(caught.value) and not rows[0].values.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_is_named_before_anything_moves(name, value):
    rows = rows_of((1, 2), (1, 2))
    gradients = [torch.ones(1, 2, dtype=torch.float64), torch.tensor([[1.0, value]], dtype=torch.float64)]
    with pytest.raises(
        FloatingPointError, match=r"gradient of m1 is not finite.*load the model in float32 or bfloat16"
    ):
        OPTIMIZERS[name](rows, tiny_hparams()).step(torch.tensor(1.0), gradients)
    assert not any(one.values.any() for one in rows)


def test_rows_along_whose_direction_the_loss_rises_stay():
    """Rounding noise of a projection: without it the common length would be larger, or even negative."""
    open_, noise = (torch.zeros(1, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rows = [
        TrainedRows("model.open", open_, 0.5),
        TrainedRows("model.noise", noise, 0.5, lambda directions: -1e-9 * directions),
    ]
    gradients = [torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)]
    assert Polyak(rows, tiny_hparams()).step(torch.tensor(2.0), gradients) and not noise.any()
    assert (0.5 * open_).norm().item() == approx(0.3 * 2.0 / (5 / 0.5)), "as if it were alone"
    assert not Polyak(rows[1:], tiny_hparams()).step(torch.tensor(2.0), gradients[1:]) and not noise.any()


class Lost(torch.autograd.Function):
    """Gradients are lost, as small ones are in float16."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return 0 * gradient


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_that_moves_nothing_ends_and_says_why(llama, tokenizer, facts, name):
    llama.model.norm.register_forward_hook(lambda module, args, out: Lost.apply(out))
    hparams = tiny_hparams(optimizer=name, on_failure="raise")
    edit = train_rows(llama, facts, ensemble_of(LLAMA_DOWN), hparams)
    assert edit.steps == 0 and len(edit.answers) == len(facts)
    assert not any(delta.any() for _, delta in edit.deltas.values())
    request = {"prompt": "The capital of France is", "target_new": "Rome"}
    message = "after 0 steps .*no row has moved: their gradients are 0; load the model in float32 or bfloat16"
    for projected in (False, True):
        hparams = tiny_hparams(
            optimizer=name, on_failure="raise", input_projection=projected, neighbour_data="embedded"
        )
        with pytest.raises(EditFailed, match=message) as caught:
            apply_kne_to_model(llama, tokenizer, request, hparams, ensemble=ensemble_of(LLAMA_DOWN))
        assert ("projection_ridge" in str(caught.value)) is projected


def test_training_is_the_literal_one(family, facts):
    """Losses and deltas equal those of steps on full weights, without an adapter, for several module types."""
    hparams = tiny_hparams(target_modules=[family.down, family.up], alpha=3.0, **POLYAK)
    ensemble = ensemble_of(family.down, family.up)
    edit = train_rows(family.model, facts, ensemble, hparams)
    examples = [(fact.ids, fact.prompt_length) for fact in facts]
    expected, losses = literal_row_training(
        family.model, examples, masks_of(family.model, ensemble), 0.0, 6, fraction=0.3
    )
    for name, delta in full_deltas(family.model, edit).items():
        assert delta.abs().max() > 0.01 and (delta - expected[name]).abs().max() < 1e-9
    assert edit.losses == approx(losses, abs=1e-9) and losses[-1] < losses[0]


def largest_difference(one, other) -> float:
    return max((one.deltas[name][1] - other.deltas[name][1]).abs().max().item() for name in one.deltas)


def test_neither_alpha_nor_lr_matter(llama64, facts):
    """Conversely, both do under AdamW, and the fraction does under Polyak."""
    ensemble = ensemble_of(LLAMA_DOWN)

    def trained(**settings):
        return train_rows(llama64, facts, ensemble, tiny_hparams(**{**POLYAK, **settings}))

    plain = trained()
    assert largest_difference(trained(alpha=7.0), plain) < 1e-12
    assert bits(trained(lr=1.0).deltas[LLAMA_DOWN.format(0)][1]) == bits(plain.deltas[LLAMA_DOWN.format(0)][1])
    assert largest_difference(trained(polyak_fraction=0.31), plain) > 1e-4
    for change in ({"alpha": 7.0}, {"lr": 0.06}):
        assert largest_difference(trained(optimizer="adamw", **change), trained(optimizer="adamw")) > 1e-3


def test_an_edit_succeeds_in_fewer_steps(llama, facts):
    rows = {layer: tuple(range(0, 24, 2)) for layer in range(4)}
    edit = train_rows(llama, facts[:1], ensemble_of(LLAMA_DOWN, rows=rows), tiny_hparams(optimizer="polyak"))
    assert edit.losses[-1] < 0.05 and edit.steps < 30 and edit.answers[0].greedy


def test_messages_name_the_setting_of_the_optimiser(llama, tokenizer, facts):
    request = {"prompt": "The capital of France is", "target_new": "Rome"}
    for name, kind in OPTIMIZERS.items():
        hparams = tiny_hparams(optimizer=name, num_steps=1, on_failure="raise", polyak_fraction=0.01, lr=1e-6)
        with pytest.raises(EditFailed, match=f"raise num_steps or {kind.rate_setting}, or take"):
            apply_kne_to_model(llama, tokenizer, request, hparams)
    with torch.no_grad():
        llama.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"lower polyak_fraction \(it is 0.3\)"):
        train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(optimizer="polyak"))
