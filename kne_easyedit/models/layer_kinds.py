"""Layers of other libraries whose weight is no plain matrix, recognised by the names of their classes.

By name, since these libraries are not imported, and most are not installed. The general rule in `editable` finds layers
that are not listed; the list only lets the message name the kind.
"""

from __future__ import annotations

import re

from torch import nn

UNQUANTISED = "load the model unquantised"
_BESIDE = "or compute the edit on it and keep it beside, as an adapter (compute_edit, kne_easyedit.edits.save_adapter)"
_WHOLE = (
    "load the whole model into one process (without FSDP or tensor parallelism) and edit that; with model_parallel: "
    "true one process uses all GPUs, memory and disk (docs/large-models.md)"
)
SPREAD = "spread over processes (DTensor)", _WHOLE
"""The kind of a weight of which each process has a part."""
_KINDS = {
    r"Linear8bitLt|Int8Params": (
        "8-bit (bitsandbytes); its whole numbers would swallow what is added",
        f"{UNQUANTISED}, without load_in_8bit, {_BESIDE}",
    ),
    r"Linear4bit|LinearNF4|LinearFP4|Params4bit": (
        "4-bit (bitsandbytes)",
        f"{UNQUANTISED}, without load_in_4bit, {_BESIDE}",
    ),
    r"\w*QuantLinear\w*|GPTQ\w*": ("quantised (GPTQ)", UNQUANTISED),
    r"WQLinear\w*": ("quantised (AWQ)", UNQUANTISED),
    r"HQQLinear\w*": ("quantised (HQQ)", UNQUANTISED),
    r"EetqLinear|FP8Linear|FbgemmFp8Linear|BitLinear|AutoBitLinear|HiggsLinear|SpQR\w*": ("quantised", UNQUANTISED),
    r"VptqLinear|VQuantLinear|QuantizedLinear|QLinear\w*|QModuleMixin": ("quantised", UNQUANTISED),
    r"DTensor": SPREAD,
    r"FlatParameter": ("spread over processes (FSDP)", _WHOLE),
}
_LIBRARIES = {
    r"torchao\b": ("quantised (torchao)", UNQUANTISED),
    r"torch\.ao\.nn\b|torch\.nn\.quantized\b": (
        "quantised (torch.ao)",
        f"{UNQUANTISED}, without torch.ao.quantization",
    ),
}


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether it is a layer of bitsandbytes, 8 or 4 bit: it can be trained beside, but nothing can be added to it."""
    return any(cls.__module__.split(".")[0] == "bitsandbytes" for cls in type(module).__mro__)


def known_kind(*things: object) -> tuple[str, str] | None:
    """The kind of a layer (or weight) that is listed here, and what to do; None for all others."""
    for thing in things:
        for cls in type(thing).__mro__:
            if cls in (nn.Linear, nn.Module, object):
                continue
            for pattern, found in _KINDS.items():
                if re.fullmatch(pattern, cls.__name__):
                    return found
            for pattern, found in _LIBRARIES.items():
                if re.match(pattern, cls.__module__):
                    return found
    return None
