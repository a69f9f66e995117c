"""What torch holds in tensors, counted operation by operation: the same on every machine, whatever the system keeps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class _Live(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._known:
                    self._known.add(key)
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
                    self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_allocated(work: Callable[[], T]) -> tuple[T, int, int]:
    """The result of ``work()``, the most bytes that its tensors had at a time, and those that it left."""
    with _Live() as live:
        result = work()
    return result, live.most, live.now
