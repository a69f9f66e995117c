"""A model's modules and shapes by its name, without its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from kne_easyedit.doctor.memory import without_weights
from kne_easyedit.doctor.model import local_folder
from kne_easyedit.models.loading import reason


def structure_of(name: str) -> tuple[Any, nn.Module]:
    """The configuration of a model, and the model on torch's meta device.

    Args:
        name: ``smollm2-135m``, the path of a model's folder, or a hub name in the cache. Nothing is downloaded.

    Raises:
        ValueError: The model is not on this machine, or transformers does not know its kind.
    """
    from transformers import AutoConfig

    folder = local_folder(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return config, without_weights(config)
    except Exception as error:  # numbers at fault in a configuration raise anything, in transformers and in torch
        raise ValueError(f"model_name: {name!r} cannot be read: {reason(error)}") from error
