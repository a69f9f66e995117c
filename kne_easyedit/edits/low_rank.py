"""The change of a weight as the product of two thin matrices: exactly, or by its largest singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kne_easyedit.editing.row_edit import RowEdit

Rows = tuple[tuple[int, ...], Tensor]
"""Ascending rows of a weight ``(d2, d1)``, and what is added to them, ``(n, d1)``."""

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts as ``max_lora_rank``, ascending."""


@dataclass(frozen=True)
class Factors:
    """The change of some rows of one weight, ``left @ right``."""

    rows: tuple[int, ...]
    """Of the weight, ascending."""
    left: Tensor | None
    """``(n, k)``, orthonormal columns; None for the identity: one rank for each row."""
    right: Tensor
    """``(k, d1)``, float32."""
    error: float
    """Frobenius norm of what is left out, relative to that of the whole change."""
    norm: float
    """Frobenius norm of the whole change."""

    @property
    def rank(self) -> int:
        """``k``."""
        return len(self.right)

    @property
    def delta(self) -> Tensor:
        """What is added to ``rows``: ``(n, d1)``, float32."""
        return self.right if self.left is None else self.left @ self.right

    def a(self, rank: int, factor: float = 1.0) -> Tensor:
        """LoRA's ``A``: ``right`` times ``factor``, below it rows of zeros: ``(rank, d1)``."""
        padded = self.right.new_zeros(rank, self.right.shape[1])
        padded[: self.rank] = self.right * factor
        return padded

    def b(self, rank: int, width: int) -> Tensor:
        """LoRA's ``B``: ``left`` in the rows of the weight, all else 0: ``(width, rank)``."""
        full = self.right.new_zeros(width, rank)
        left = torch.eye(self.rank) if self.left is None else self.left
        full[torch.tensor(self.rows), : self.rank] = left
        return full


def summed(edits: Sequence[RowEdit]) -> dict[str, Rows]:
    """The sum of several edits: module name -> all rows that one of them changes, and what is added to them.

    Added up in the most precise type among them, in the order given. Modules without rows are left out.

    Raises:
        ValueError: There is no row; a row is negative or named twice; values are of another shape or not finite.
    """
    parts: dict[str, list[Rows]] = {}
    for number, edit in enumerate(edits):
        for name, (chosen, delta) in edit.deltas.items():
            _require_rows(f"edits[{number}]: {name}", chosen, delta)
            if chosen:
                parts.setdefault(name, []).append((tuple(chosen), delta.detach().cpu()))
    if not parts:
        raise ValueError("edits: there is no changed row in them, so there is nothing to save")
    return {name: _sum(name, found) for name, found in parts.items()}


def _require_rows(where: str, chosen: Sequence[int], delta: Tensor) -> None:
    if delta.ndim != 2 or len(delta) != len(chosen):
        raise ValueError(f"{where} has {len(chosen)} rows, but values of shape {tuple(delta.shape)}")
    if len(set(chosen)) != len(chosen) or any(row < 0 for row in chosen):
        raise ValueError(f"{where} has rows that are negative or stand twice")
    if not delta.isfinite().all():
        raise ValueError(f"{where} has values that are not finite; train the edit again, with a lower rate")


def _sum(name: str, parts: Sequence[Rows]) -> Rows:
    inputs = {delta.shape[1] for _, delta in parts}
    if len(inputs) > 1:
        raise ValueError(f"edits: {name} has {sorted(inputs)} inputs in them; they are of different models")
    chosen = sorted(set().union(*(rows for rows, _ in parts)))
    dtype = torch.float32
    for _, delta in parts:
        dtype = torch.promote_types(dtype, delta.dtype)
    total = torch.zeros(len(chosen), inputs.pop(), dtype=dtype)
    place = {row: i for i, row in enumerate(chosen)}
    for rows, delta in parts:
        total[torch.tensor([place[row] for row in rows])] += delta.to(dtype)
    return tuple(chosen), total


def factorised(changed: Rows, rank: int | None) -> Factors:
    """Writes the change of a weight's rows as a product.

    Args:
        changed: The rows, and what is added to them.
        rank: Largest rank; None, or one that is not below the number of rows: exact.

    Returns:
        The rows themselves, one rank for each; or the best product of that rank (singular value decomposition).
    """
    chosen, delta = changed
    norm = torch.linalg.matrix_norm(delta.double()).item()
    if rank is None or rank >= len(chosen):
        return Factors(chosen, None, delta.float(), 0.0, norm)
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    lost = torch.linalg.vector_norm(values[rank:]).item()
    product = (values[:rank, None] * right[:rank]).float()
    return Factors(chosen, left[:, :rank].float().contiguous(), product, lost / norm if norm else 0.0, norm)


def total_error(factors: Mapping[str, Factors]) -> float:
    """The relative error of all modules together: what is left out of all weights, relative to their whole change."""
    whole = math.sqrt(sum(one.norm**2 for one in factors.values()))
    lost = math.sqrt(sum((one.error * one.norm) ** 2 for one in factors.values()))
    return lost / whole if whole else 0.0


def served_rank(largest: int, max_rank: int | None) -> int:
    """The rank of an adapter of one rank for all modules: one that vLLM accepts.

    Args:
        largest: Rows of the module that has most.
        max_rank: What the user allows; None: as much as is needed.

    Returns:
        The smallest of `SERVED_RANKS` that holds ``largest`` rows; if that is above ``max_rank``, the largest that is
        not above it.

    Raises:
        ValueError: More rows than any rank holds, and no ``max_rank`` that allows a reduction.
    """
    allowed = [rank for rank in SERVED_RANKS if max_rank is None or rank <= max_rank]
    if largest > SERVED_RANKS[-1] and (max_rank is None or max_rank > SERVED_RANKS[-1]):
        raise ValueError(
            f"edits: a module has {largest} changed rows, and no adapter above rank {SERVED_RANKS[-1]} is served "
            f"(vLLM); reduce it by max_rank={SERVED_RANKS[-1]} or less (SVD), edit fewer rows (a smaller p, fewer "
            f"edits together), or merge the edit into a full model (kne merge). form='exact' has no such bound, for "
            f"PEFT alone"
        )
    return next((rank for rank in allowed if rank >= largest), allowed[-1])
