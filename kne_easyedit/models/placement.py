"""How a model is loaded: on one device, spread over several, offloaded to memory and disk, or quantised."""

from __future__ import annotations

import re
from typing import Any

import torch

from kne_easyedit._util.files import expand_path
from kne_easyedit._util.messages import require_one_of

QUANTISED = ("8bit", "4bit")
"""Values of the setting ``load_in``."""
_SIZE = re.compile(r"\d+(\.\d+)? ?[KMGT]i?B", re.IGNORECASE)


def require_placement(hparams: Any) -> None:
    """Checks ``max_memory``, ``offload_folder`` and ``load_in``, as far as that can be done on any machine.

    Args:
        hparams: Settings of any method; they may lack these names.

    Raises:
        ValueError: One is out of range, or does not go with the others; the message names it.
    """
    parallel, quantised = getattr(hparams, "model_parallel", False), getattr(hparams, "load_in", None)
    for name in ("max_memory", "offload_folder"):
        value = getattr(hparams, name, None)
        if value is not None and not parallel:
            raise ValueError(
                f"{name}: {value!r} says how model_parallel places the model; set model_parallel: true, or leave it out"
            )
    memory = getattr(hparams, "max_memory", None)
    if memory is not None and not memory:
        raise ValueError("max_memory: {} names no device; leave it out, or give {0: 20GiB, cpu: 60GiB}")
    for device, size in (memory or {}).items():
        if device != "cpu" and (isinstance(device, bool) or not isinstance(device, int) or device < 0):
            raise ValueError(f"max_memory: {device!r} is no device; expected a GPU's number, or cpu")
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        if not whole and not (isinstance(size, str) and _SIZE.fullmatch(size.strip())):
            raise ValueError(f"max_memory: {device}: {size!r} is no size; expected one such as 20GiB, or bytes")
    if quantised is not None:
        require_one_of("load_in", quantised, QUANTISED)


def require_present(hparams: Any) -> None:
    """Checks that this machine has the GPUs that ``max_memory`` names.

    Raises:
        ValueError: It has not got one of them.
    """
    there = torch.cuda.device_count()
    for device in getattr(hparams, "max_memory", None) or {}:
        if device != "cpu" and device >= there:
            has = f"the last GPU of this machine is {there - 1}" if there else "this machine has no GPU"
            raise ValueError(f"max_memory: names GPU {device}, {has}; leave it out")


def loading_options(hparams: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` beside the number type; none: the model is moved to ``device`` afterwards.

    Args:
        hparams: Settings of any method.
        device: Where the model goes if it is not spread.
        dtype: Compute type of a quantised model.

    Raises:
        ValueError: As `require_placement` and `require_present`; or bitsandbytes is not installed.
    """
    require_placement(hparams)
    options: dict[str, Any] = {}
    if getattr(hparams, "model_parallel", False):
        require_present(hparams)
        folder, memory = getattr(hparams, "offload_folder", None), getattr(hparams, "max_memory", None)
        options = {
            "device_map": "auto",
            "max_memory": memory and dict(memory),  # a copy: accelerate turns its sizes into bytes in place
            "offload_folder": None if folder is None else str(expand_path(folder)),
        }
    if (bits := getattr(hparams, "load_in", None)) is not None:
        options = {"device_map": {"": device}, **options, "quantization_config": _quantisation(bits, dtype)}
    return options


def _quantisation(bits: str, dtype: torch.dtype) -> Any:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"load_in: {bits!r} needs bitsandbytes, which is not installed; pip install 'kne_easyedit[quantised]', or "
            f"leave load_in out"
        )
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
