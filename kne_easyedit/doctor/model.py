"""Checks of the device, the model's files and the tokenizer. Nothing is loaded, nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kne_easyedit._util.files import expand_path, parse_json
from kne_easyedit.bridge.edited_modules import depth, vocabulary
from kne_easyedit.bridge.loaded_model import prepare_tokenizer
from kne_easyedit.bridge.methods import require_undoable
from kne_easyedit.doctor.findings import FAILURE, OK, WARNING, Finding, failure, listed
from kne_easyedit.doctor.memory import without_weights
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.models.devices import dtype_of, resolve_device
from kne_easyedit.models.loading import SMOLLM2, reason
from kne_easyedit.models.targets import count_parameters


def devices(plan: Mapping[str, Any]) -> Generator[Finding, None, torch.device | None]:
    """Checks devices and number types, and that the methods can run at all. Returns the device of the run, or None."""
    found: dict[torch.device, list[str]] = {}
    types: dict[str, str] = {}
    for label, hparams in plan.items():
        try:
            require_undoable(hparams)
        except ValueError as error:
            yield failure(f"method {label}", error)
        try:
            device = resolve_device(hparams.device)
            found.setdefault(device if device.index else torch.device(device.type), []).append(label)  # cuda is cuda:0
        except (ValueError, RuntimeError) as error:
            yield failure(f"device of {label}", error)
        try:
            types[label] = str(dtype_of(hparams)).removeprefix("torch.")
        except ValueError as error:
            yield failure(f"type of {label}", error)
    if len(types) < len(plan):
        return None
    first = next(iter(types.values()))
    if set(types.values()) != {first}:
        text = (
            f"fp16, bf16: the files ask for different types ({listed(types)}), and the model is loaded once, in {first}"
        )
        yield Finding("type", WARNING, text)
    if len(found) > 1:
        names = "; ".join(f"{device} for {', '.join(labels)}" for device, labels in found.items())
        yield Finding(
            "device",
            FAILURE,
            f"device: the files name different ones: {names}",
            "name one in all files: one run has one model",
        )
        return None
    for device in found:
        gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        yield Finding("device", OK, f"{device}{gpu}, model in {first}")
        return device
    return None


def model_folder(plan: Mapping[str, Any]) -> Generator[Finding, None, Path | None]:
    """Returns the folder of the model's files on this machine, or None. Nothing is downloaded."""
    names = sorted({str(hparams.model_name) for hparams in plan.values()})
    if len(names) > 1:
        text = f"model_name: the files name different models: {', '.join(names)}"
        yield Finding("model", FAILURE, text, "name one in all files: one run has one model")
        return None
    try:
        return local_folder(names[0])
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        yield failure("model", error)
        return None


def architecture(folder: Path) -> Generator[Finding, None, nn.Module | None]:
    """Returns the model without its weights, or None."""
    from transformers import AutoConfig

    try:
        model = without_weights(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        _require_weights(folder)
    except Exception as error:  # noqa: BLE001  (a configuration's numbers raise anything, in transformers and in torch)
        yield failure("model", f"model_name: {folder}: {reason(error)}")
        return None
    yield Finding(
        "model",
        OK,
        f"{type(model).__name__} with {depth(model)} layers and {count_parameters(model):,} parameters in {folder}",
    )
    return model


def local_folder(name: str) -> Path:
    """The folder of a model's files on this machine. Nothing is downloaded.

    Args:
        name: ``smollm2-135m``, a path, or a hub name in the cache.

    Raises:
        ValueError: The model is not here; the message says how to get it.
    """
    if name == SMOLLM2:
        from kne_easyedit.models.smollm2 import smollm2_path

        return smollm2_path()
    path = expand_path(name) if name[:1] == "~" or "$" in name else Path(name)  # as `load_model` takes it
    if path.is_dir():
        return path.absolute()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        from_hub = f"get it by `hf download {name}`, or " if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) else ""
        raise ValueError(
            f"model_name: {name!r} is not on this machine; {from_hub}set model_name to a folder that has it"
        ) from error


def _require_weights(folder: Path) -> None:
    """Raises ValueError for a folder that lacks weights: a download may have been interrupted."""
    for index in folder.glob("*.index.json"):
        try:
            its = parse_json(index.read_bytes())
        except ValueError as error:
            raise ValueError(f"{index.name}: {error}; get the whole model") from error
        names = its.get("weight_map") if isinstance(its, dict) else None
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise ValueError(f"{index.name}: has no mapping weight_map of names to files; get the whole model")
        files = set(names.values())
        if missing := sorted(file for file in files if not (folder / file).is_file()):
            raise ValueError(
                f"of {len(files)} files of weights {len(missing)} are missing ({missing[0]}, ...); get the whole model"
            )
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ValueError("there are no weights (*.safetensors, *.bin); get the whole model")


def tokenizers(plan: Mapping[str, Any], folder: Path, model: nn.Module) -> Generator[Finding, None, Tokenizer | None]:
    """Checks padding, and that the model knows the tokenizer's tokens. Returns the tokenizer, or None."""
    from transformers import AutoTokenizer

    name = "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (a broken file raises anything, in transformers or in tokenizers' Rust)
        yield failure(name, f"tokenizer: that in {folder} cannot be loaded: {error}")
        return None
    sides: dict[str, list[str]] = {}
    for label, hparams in plan.items():
        prepared = deepcopy(tokenizer)
        prepare_tokenizer(prepared, hparams.alg_name)
        sides.setdefault(prepared.padding_side, []).append(label)
    pad, largest, known = prepared.pad_token_id, max(tokenizer.get_vocab().values()), vocabulary(model)
    if pad is None or pad >= known:
        fault = (
            "has neither a pad token nor an end token"
            if pad is None
            else f"has pad token {pad}, the model knows those below {known}"
        )
        yield Finding(
            name, FAILURE, f"tokenizer: {fault}", f"set another pad_token in {folder / 'tokenizer_config.json'}"
        )
        return None
    if largest >= known:
        text = (
            f"tokenizer: has tokens up to {largest}, the model knows those below {known}; "
            f"records that use such tokens are bad"
        )
        yield Finding(name, WARNING, text, "take the tokenizer that belongs to the model")
    padding = ", ".join(f"{side} for {', '.join(labels)}" for side, labels in sides.items())
    own = "its own pad token" if tokenizer.pad_token_id is not None else "its end token for padding"
    text = (
        f"{type(tokenizer).__name__} with {own}; padding will be {padding}; its tokens end at {largest}, "
        f"the model's at {known - 1}"
    )
    yield Finding(name, OK, text)
    return tokenizer
