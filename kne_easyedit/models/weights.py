"""The weights of a loaded model, wherever they are: in their modules, in memory beside them, or on disk.

All that reads or writes weights goes by this module, so that it works on models that are larger than a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit.models.offload import Offloaded, offloaded
from kne_easyedit.models.targets import is_linear, rows


class Weight:
    """The weight of one linear layer as rows ``(d2, d1)``, whatever its orientation and wherever it is kept.

    ``weight[index]`` is a copy of rows, ``weight[index] = values`` writes them.
    """

    def __init__(self, model: nn.Module, name: str, module: Any):
        self._module = module
        self._place = offloaded(model, f"{name}.weight")

    @property
    def stored(self) -> Tensor:
        """The whole matrix in the module's own orientation: the parameter itself, or what an offloaded one will be."""
        own: Tensor = self._module.weight.detach()
        return own if self._place is None else _read(self._place, own.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The number type in which the module computes."""
        return self._module.weight.dtype

    @property
    def shape(self) -> torch.Size:
        """``(d2, d1)``."""
        return rows(self._module).shape

    def rows_of(self, stored: Tensor) -> Tensor:
        """A matrix in the orientation of `stored` as a view ``(d2, d1)``."""
        return rows(self._module, stored)

    def __getitem__(self, index: Tensor) -> Tensor:
        weight = self.rows_of(self.stored)
        return weight[index.to(weight.device)]

    def __setitem__(self, index: Tensor, values: Tensor) -> None:
        if self._place is None:
            weight = rows(self._module).detach()
            weight[index.to(weight.device)] = values.to(weight)
        else:
            self._place.write(index, values.detach().to(self.dtype), not isinstance(self._module, nn.Linear))

    def write(self, stored: Tensor) -> None:
        """Writes a whole matrix in the orientation of `stored`."""
        if self._place is None:
            self._module.weight.detach().copy_(stored)
        else:
            whole = rows(self._module, stored)
            self[torch.arange(len(whole))] = whole


def weight_of(model: nn.Module, name: str) -> Weight:
    """The weight of the linear layer ``name``.

    Raises:
        ValueError: ``model`` has no such linear layer.
    """
    return Weight(model, name, linear_module(model, name))


def linear_module(model: nn.Module, name: str) -> Any:
    """The linear layer ``name`` of ``model``.

    Raises:
        ValueError: There is none.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if module is None or not is_linear(module):
        found = "has no module" if module is None else f"has a {type(module).__name__}, no linear layer,"
        raise ValueError(
            f"edit: {type(model).__name__} {found} {name!r}; the edit is of another model, or modules were exchanged"
        )
    return module


def named_weights(model: Any) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """All parameters, each once.

    Yields:
        Name, and what gives the tensor: offloaded ones are read when it is called. One that is not loaded is on the
        meta device.
    """
    tied = _tied(model)
    for name, parameter in model.named_parameters():
        place = offloaded(model, name)
        if place is None:
            yield name, partial(itself, parameter)
        elif name not in tied:  # to accelerate each has a weight of its own
            yield name, partial(_read, place, parameter.dtype)


def stored_tensor(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """What a parameter holds: itself, or of an offloaded one what is kept."""
    place = offloaded(model, name)
    return parameter.detach() if place is None else _read(place, parameter.dtype)


def write_tensor(model: nn.Module, name: str, parameter: Tensor, value: Tensor) -> None:
    """Writes a whole parameter, wherever it is kept; shape and type are those of ``parameter``."""
    place = offloaded(model, name)
    if place is None:
        parameter.copy_(value)
        return
    module, _, key = name.rpartition(".")
    found = model.get_submodule(module)
    if key == "weight" and is_linear(found):
        Weight(model, module, found).write(value)
    else:
        place.write(torch.arange(len(value)), value, transposed=False)


def itself(tensor: Tensor) -> Tensor:
    """What gives a tensor that is at hand."""
    return tensor


def _read(place: Offloaded, dtype: torch.dtype) -> Tensor:
    return place.read().detach().to(dtype)


def _tied(model: Any) -> set[str]:
    """Names of parameters that are another one, which comes before: a model without offload names them once."""
    found = getattr(model, "all_tied_weights_keys", None)  # transformers 5: target -> source
    if isinstance(found, dict):
        order = {name: place for place, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
        return {max(pair, key=lambda name: order.get(name, -1)) for pair in found.items()}
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return set()
    return set(getattr(model, "_tied_weights_keys", None) or ())
