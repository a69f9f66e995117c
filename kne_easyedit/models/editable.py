"""Which modules can be edited exactly, and why others cannot: checked before an edit computes anything.

An edit adds to rows of a weight matrix and reads nothing else. So the weight must be stored as it is used: a plain
floating-point parameter, whole, on this machine, of this module alone. Attribution needs outputs only, so that it also
works on models that cannot be edited.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from kne_easyedit.models.layer_kinds import is_bitsandbytes, known_kind
from kne_easyedit.models.offload import offloaded, own_forward
from kne_easyedit.models.state import default_modes
from kne_easyedit.models.targets import rows
from kne_easyedit.models.weights import Weight, stored_tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_RECOMPUTED = {
    ("weight_orig", "weight_mask"): ("pruned (torch.nn.utils.prune)", "torch.nn.utils.prune.remove(module, 'weight')"),
    ("weight_g", "weight_v"): ("under weight_norm", "torch.nn.utils.remove_weight_norm(module)"),
    ("weight_orig", "weight_u"): ("under spectral_norm", "torch.nn.utils.remove_spectral_norm(module)"),
}
"""Names of tensors from which a hook computes the weight in every pass -> what that is, and what removes it."""


_WRAPPERS = {
    "FullyShardedDataParallel": ("spread over processes (FSDP)", "load the whole model into one process and edit that"),
    "DistributedDataParallel": ("wrapped in DistributedDataParallel", "edit what is wrapped (model.module)"),
    "DataParallel": ("wrapped in DataParallel", "edit what is wrapped (model.module)"),
}
"""Names of classes that wrap a model -> what they are, and what to do."""


def require_bare(model: nn.Module) -> None:
    """Raises ValueError for a model that is wrapped, or carries a PEFT adapter: only base weights are edited."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        at = f"at {name}" if name else "the model itself"
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise ValueError(
                f"model: {type(model).__name__} carries a PEFT adapter; merge or unload it before editing "
                f"(merge_and_unload(), unload()). It is {at}"
            )
        if wrapped := _WRAPPERS.get(type(module).__name__):
            raise ValueError(f"model: {type(model).__name__} is {wrapped[0]} ({at}); {wrapped[1]}")


def require_editable(model: nn.Module, modules: Mapping[str, nn.Module], beside: bool = False) -> None:
    """Checks that rows of these modules can be edited exactly; changes nothing.

    Args:
        model: The model.
        modules: Names and linear layers of ``model``.
        beside: The rows are trained, and not written: layers of bitsandbytes will do, whose products run in their
            compute type with the rows' product beside them.

    Raises:
        ValueError: One cannot; the message has its name, the reason, and what to do.
    """
    owners: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for place in _places(model, name, parameter):
            owners.setdefault(place, []).append(name)
    for name, module in modules.items():
        found = None if beside and is_bitsandbytes(module) else _obstacle(model, name, module)
        if found is None:
            weight = cast(Tensor, module.weight)
            others = {owner for place in _places(model, f"{name}.weight", weight) for owner in owners[place]} - {
                f"{name}.weight"
            }
            if others:
                shared = f"shared with {', '.join(sorted(others))}, which an edit would change, too"
                found = shared, "untie them: give each a copy"
        if found:
            kind, way_out = found
            raise ValueError(
                f"target_modules: {name} cannot be edited: its weight is {kind}; {way_out}, or leave the module out"
            )


def require_unquantised(modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError for a module whose weight is quantised, or of another kind to which no row can be added."""
    for name, module in modules.items():
        if found := known_kind(module, module._parameters.get("weight")):
            raise ValueError(
                f"edit: {name} cannot take it: its weight is {found[0]}, and merging would round what is added; "
                f"{found[1]}"
            )


def stored_quantisation(model: Any) -> str | None:
    """The kind of quantisation that the model's configuration names; None if there is none."""
    config = getattr(model.config, "quantization_config", None)
    config = config if config is None or isinstance(config, Mapping) else config.to_dict()
    return None if config is None or config.get("dequantize") else str(config.get("quant_method", "of an unknown kind"))


def _obstacle(model: nn.Module, name: str, module: Any) -> tuple[str, str] | None:
    """What is in the way, and what to do. Known kinds first, since the general rule cannot name them."""
    own = module._parameters.get("weight")
    if found := known_kind(module, own):
        return found
    if is_parametrized(module, "weight"):
        by = ", ".join(type(part).__name__.lstrip("_") for part in module.parametrizations.weight)
        return (
            f"computed from others (parametrised: {by})",
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first",
        )
    if own is None:
        held = {**module._parameters, **module._buffers}
        for parts, (kind, function) in _RECOMPUTED.items():
            if all(part in held for part in parts):
                return kind, f"{function} first"
        kind = (
            "a buffer"
            if "weight" in held
            else f"a {type(getattr(module, 'weight', None)).__name__} that is computed or replaced"
        )
        return f"no parameter but {kind}", "make it a plain torch.nn.Parameter first"
    place = offloaded(model, f"{name}.weight")
    if own.is_meta and place is None:
        return "not loaded (on the meta device)", "load the model's weights"
    if place is not None and place.key != "weight":  # then others than its own forward may use the weight
        return "offloaded and loaded with a whole block (accelerate)", "leave preload_module_classes out"
    if type(own) is not nn.Parameter:
        return f"a {type(own).__name__}, no plain torch.nn.Parameter", "load the model unquantised and whole"
    if own.dtype not in DTYPES:
        return f"of type {str(own.dtype).removeprefix('torch.')}", "load the model in float32, bfloat16 or float16"
    wanted = _shape(module)
    if own.layout is not torch.strided or tuple(own.shape) != wanted:
        spread = " (DeepSpeed ZeRO)" if hasattr(own, "ds_id") else ""
        return (
            f"stored as {tuple(own.shape)} ({own.layout}){spread} and not as {wanted}",
            "load the whole model, as plain matrices",
        )
    if not _is_product(model, name, module):
        return f"not all that {type(module).__name__} computes with: its output is not x W^T + b", "take another module"
    return None


def _shape(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.weight.shape[0], module.nf  # Conv1D


def _is_product(model: nn.Module, name: str, module: Any) -> bool:
    """Whether the output is ``x W^T + b``: known of `nn.Linear`, tried out where ``forward`` is another."""
    if own_forward(module) is nn.Linear.forward:
        return True
    weight = rows(module, Weight(model, name, module).stored)
    precise = torch.promote_types(weight.dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=generator).to(weight)
    none = torch.zeros((), device=weight.device)
    bias = none if module.bias is None else stored_tensor(model, f"{name}.bias", module.bias)
    try:
        with default_modes(module), torch.no_grad():  # the caller's autocast would round
            found = module.forward(x).to(weight.device, precise)
            wanted = x.to(precise) @ weight.to(precise).t() + bias.to(precise)
            terms = x.to(precise).abs() @ weight.to(precise).abs().t() + bias.to(precise).abs()
    except Exception:  # noqa: BLE001  (a foreign forward that fails on a plain matrix is no plain product)
        return False
    rounding = torch.finfo(weight.dtype).eps * (8 + math.sqrt(weight.shape[1])) * terms
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= rounding).all())


def _places(model: nn.Module, name: str, weight: Tensor) -> list[object]:
    """Keys that two parameters share if changing one changes the other."""
    if (place := offloaded(model, name)) is not None:
        source = place.source
        return [("address", source.device, source.data_ptr())] if isinstance(source, Tensor) else [source]
    plain = type(weight) is nn.Parameter and weight.layout is torch.strided and not weight.is_meta and weight.numel()
    return [id(weight), ("address", weight.device, weight.data_ptr())] if plain else [id(weight)]
