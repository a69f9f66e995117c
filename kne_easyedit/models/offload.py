"""Weights that accelerate keeps elsewhere between passes: in the machine's memory, or on disk.

A module whose weights are offloaded has them on the meta device; its hook (``AlignDevicesHook``) has a map of them, and
puts them into the module for each pass. So what the module holds between passes says nothing: the map does.

Rows are written into the map. A matrix in memory is changed in place. Of a matrix on disk the changed rows are kept in
memory, and laid over what is read: no file is ever written, neither the offload folder nor the model's own safetensors,
to which transformers' offload index points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Offloaded:
    """Where accelerate keeps one tensor of a module."""

    hook: Any
    """The `AlignDevicesHook` that loads it for a pass."""
    key: str
    """Its name in the hook's map."""

    @property
    def device(self) -> torch.device:
        """The device on which the module computes."""
        device = self.hook.execution_device
        return torch.device("cpu" if device is None else device)

    def read(self) -> Tensor:
        """The tensor as it is kept; one on disk is read."""
        return self.hook.weights_map[self.key]

    @property
    def source(self) -> Tensor | tuple[str, str]:
        """The tensor itself if it is kept in memory; else what says where it is. Nothing is read."""
        key, stored = self.key, self.hook.weights_map
        stored = stored.stored if isinstance(stored, _Overlaid) else stored
        while hasattr(stored, "prefix") and hasattr(stored, "dataset"):  # PrefixedDataset
            key, stored = f"{stored.prefix}{key}", stored.dataset
        memory = stored if isinstance(stored, dict) else getattr(stored, "state_dict", {})  # OffloadedWeightsLoader
        if key in memory:
            return memory[key]
        entry = getattr(stored, "index", {}).get(key, {})
        folder = getattr(stored, "save_folder", None) or id(stored)
        return str(entry.get("safetensors_file", folder)), str(entry.get("weight_name", key))

    def write(self, index: Tensor, values: Tensor, transposed: bool) -> None:
        """Writes rows of a matrix; no file is changed.

        Args:
            index: Row numbers, ascending, ``(n,)``.
            values: ``(n, d1)``, in the type in which the module computes.
            transposed: The matrix is kept as ``(d1, d2)``.
        """
        held = self.source
        if isinstance(held, Tensor) and held.dtype == values.dtype:
            rows = (held.t() if transposed else held).detach()
            rows[index.to(rows.device)] = values.to(rows.device)
            return
        stored = self.hook.weights_map
        overlaid = stored if isinstance(stored, _Overlaid) else _Overlaid(stored)
        overlaid.lay(self.key, index, values, transposed)
        self.hook.weights_map = overlaid if overlaid.rows else overlaid.stored  # one step: never half of it


def offloaded(model: nn.Module, name: str) -> Offloaded | None:
    """Where a parameter is kept between passes; None if the module holds it itself.

    Args:
        model: The model.
        name: The parameter's full name.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        for hook in _offloading(module):
            if end == len(parts) - 1 or hook.place_submodules:
                return Offloaded(hook, ".".join(parts[end:]))
    return None


def is_offloaded(model: nn.Module) -> bool:
    """Whether any module of a model keeps its weights elsewhere between passes."""
    return any(True for module in model.modules() for _ in _offloading(module))


def computing_device(module: nn.Module) -> torch.device | None:
    """The device on which an offloaded module computes; None if it keeps its weights itself."""
    return next((Offloaded(hook, "").device for hook in _offloading(module)), None)


def own_forward(module: Any) -> Any:
    """The function that computes a module's output, under accelerate's hooks."""
    forward = module._old_forward if "_hf_hook" in module.__dict__ else module.forward
    return getattr(forward, "__func__", forward)


def _offloading(module: nn.Module) -> Iterator[Any]:
    """The hooks of a module that load its weights for each pass."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and hasattr(one, "weights_map"):
            yield one


@dataclass
class _Overlaid(Mapping):
    """A map of offloaded weights, of some of which rows hold other values than it has."""

    stored: Any
    """The map; what it reads from disk is new each time."""
    rows: dict[str, tuple[Tensor, Tensor, bool]] = field(default_factory=dict)
    """Name -> row numbers ``(n,)``, values ``(n, d1)``, and whether the matrix is kept transposed."""

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.stored[key]
        if key not in self.rows:
            return tensor
        index, values, transposed = self.rows[key]
        held = tensor.to(values.dtype)
        tensor = held.clone() if held is tensor else held  # the map's own tensor may be in memory
        (tensor.t() if transposed else tensor)[index.to(tensor.device)] = values.to(tensor.device)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def lay(self, key: str, index: Tensor, values: Tensor, transposed: bool) -> None:
        """Lays rows over a matrix. Rows that are as they are stored are not kept: taken back, an edit takes no room."""
        own = self.stored[key].to(values.dtype)
        rows = own.t() if transposed else own
        held = {} if key not in self.rows else dict(zip(self.rows[key][0].tolist(), self.rows[key][1]))
        held.update(zip(index.tolist(), values.detach().to("cpu", copy=True)))
        place = torch.tensor(sorted(held), dtype=torch.long)
        new = torch.stack([held[row] for row in place.tolist()]) if held else values[:0].cpu()
        now = rows[place.to(rows.device)].cpu()
        bits = [one.contiguous().view(torch.uint8).reshape(len(place), -1) for one in (new, now)]
        other = (bits[0] != bits[1]).any(1)
        if other.any():
            self.rows[key] = place[other], new[other], transposed
        else:
            self.rows.pop(key, None)


@dataclass
class _Loaded:
    """The weights that are in modules now, for the pass in flight."""

    parameters: dict[int, tuple[Any, nn.Module, list[tuple[Tensor, Offloaded]]]] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps of ``tensor`` for the backward pass: of an offloaded weight, where to find it."""
        storage = tensor.untyped_storage().data_ptr()
        for _, _, own in self.parameters.values():
            for parameter, place in own:
                start = parameter.data_ptr()
                if (
                    parameter.untyped_storage().data_ptr() == storage
                    and start <= tensor.data_ptr() < start + parameter.nbytes
                ):
                    offset = int(tensor.storage_offset()) - int(parameter.storage_offset())
                    return _Reference(place, parameter.dtype, tensor.shape, tensor.stride(), offset)
        return tensor


@dataclass(frozen=True)
class _Reference:
    """A view of an offloaded weight, to be read again."""

    place: Offloaded
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """From the weight's beginning, in numbers."""

    def read(self) -> Tensor:
        whole = self.place.read().detach().to(self.place.device, self.dtype)
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


_LOADED: ContextVar[_Loaded | None] = ContextVar("kne_loaded", default=None)


def pack(tensor: Tensor) -> Any:
    """`torch.autograd.graph.saved_tensors_hooks`' first function inside `read_again`; elsewhere ``tensor`` itself.

    Returns:
        ``tensor``, or what `unpack` reads an offloaded weight from.
    """
    loaded = _LOADED.get()
    return tensor if loaded is None else loaded.pack(tensor)


def unpack(packed: Any) -> Tensor:
    """The second function: the tensor."""
    return packed.read() if isinstance(packed, _Reference) else packed


@contextmanager
def read_again(model: nn.Module) -> Iterator[None]:
    """Inside, the backward pass reads offloaded weights again, instead of keeping those of all layers until it begins.

    Without this a model that is larger than its device could be run there, but not be trained or attributed. It also
    unloads what an exception on the way has left loaded. Models without offload are left alone.
    """
    found = {
        id(hook): hook
        for module in model.modules()
        for hook in _offloading(module)
        if "pre_forward" not in hook.__dict__  # else it is inside already
    }
    if not found:
        yield
        return
    loaded = _Loaded()
    token = _LOADED.set(loaded)
    try:
        for hook in found.values():
            hook.pre_forward, hook.post_forward = _noting(hook, loaded), _forgetting(hook, loaded)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for hook in found.values():
            hook.__dict__.pop("pre_forward", None)
            hook.__dict__.pop("post_forward", None)
        for hook, module, _ in loaded.parameters.values():
            hook.post_forward(module, None)
        _LOADED.reset(token)


def _noting(hook: Any, loaded: _Loaded) -> Callable[..., Any]:
    own = hook.pre_forward

    def pre_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loaded.parameters[id(hook)] = hook, module, []
        result = own(module, *args, **kwargs)
        parameters = module.named_parameters(recurse=hook.place_submodules)
        loaded.parameters[id(hook)][2].extend((one, Offloaded(hook, key)) for key, one in parameters)
        return result

    return pre_forward


def _forgetting(hook: Any, loaded: _Loaded) -> Callable[..., Any]:
    own = hook.post_forward

    def post_forward(module: nn.Module, output: Any) -> Any:
        result = own(module, output)
        loaded.parameters.pop(id(hook), None)
        return result

    return post_forward
