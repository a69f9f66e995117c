"""Gradients of the trained rows, and what they have of the directions in which the rows may move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit.editing.adapter import ADAPTER
from kne_easyedit.editing.optimizers import TrainedRows


class RowGradients:
    """The gradient of each of the rows, ``G = sum_t delta_t x_t^T`` over tokens, and its projection ``G P``.

    With fewer tokens than rows ``sum_t delta_t (P x_t)^T`` is the same and costs less: a short text has 20 tokens, a
    module of Llama-2-7B 655 rows.
    """

    def __init__(self, rows: Sequence[TrainedRows]):
        self._rows = rows
        self._seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rows]  # of each x and delta, pass by pass

    def of(self, loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of ``loss``, each ``(n, d1)``, and their projections; its graph is freed.

        The forward passes that lead to ``loss`` must have run inside `row_gradients`.
        """
        for seen in self._seen:
            seen.clear()
        gradients = list(torch.autograd.grad(loss, [one.values for one in self._rows]))
        directions = [
            self._projected(one, gradient, seen) for one, gradient, seen in zip(self._rows, gradients, self._seen)
        ]
        return gradients, directions

    def note(self, i: int, x: Tensor, delta: Tensor) -> None:
        """Notes inputs and output gradients of the rows number ``i``, of tokens on which the loss depends."""
        delta = delta.reshape(-1, delta.shape[-1])
        used = delta.any(1)
        self._seen[i].append((x.reshape(-1, x.shape[-1])[used], delta[used]))

    @staticmethod
    def _projected(one: TrainedRows, gradient: Tensor, seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        if one.projection is None or sum(len(x) for x, _ in seen) >= len(gradient):
            return one.project(gradient)
        direction = torch.zeros_like(gradient)
        for x, delta in seen:
            direction.addmm_(delta.t(), one.project(x))
        return direction


@contextmanager
def row_gradients(rows: Sequence[TrainedRows], layers: Mapping[str, Any]) -> Iterator[RowGradients]:
    """Inside, inputs and output gradients of the rows are noted while gradients are computed.

    Args:
        rows: The rows.
        layers: Module name -> PEFT's LoRA layer (`row_adapter`).
    """
    found = RowGradients(rows)
    hooks = [
        layers[one.module].lora_A[ADAPTER].register_forward_hook(partial(_watch, found, i))
        for i, one in enumerate(rows)
        if one.projection is not None
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _watch(found: RowGradients, i: int, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    if out.requires_grad:  # the hook is a part of the graph, and is freed with it
        out.register_hook(partial(found.note, i, args[0].detach()))
