"""The memory of an edit, from the model's configuration alone: nothing is loaded, nothing is downloaded.

KNE's is in `bridge.kne_memory`; the formulas of other methods are in `bridge.memory_formulas`, by way of the table in
`bridge.methods`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit._util.machine import free_memory
from kne_easyedit.bridge.edited_modules import depth, state_bytes, vocabulary
from kne_easyedit.bridge.kne_memory import Facts, kne
from kne_easyedit.bridge.memory_formulas import PRECISE
from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.doctor.data import token_count
from kne_easyedit.doctor.findings import FAILURE, OK, WARNING, Finding, failure, left_out, listed, size
from kne_easyedit.doctor.placement import placement
from kne_easyedit.facts.encoding import SEPARATOR, Tokenizer, chat_prompt
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.models.devices import dtype_of
from kne_easyedit.models.loading import auto_class
from kne_easyedit.models.targets import count_parameters, is_linear, rows

TOKENS = 64
"""Tokens of prompt and answer if the data are not known."""


@dataclass(frozen=True)
class MemoryNeeded:
    """The memory of one method's edit."""

    weights: int
    """Bytes of the model's weights."""
    phases: Mapping[str, Mapping[str, int]]
    """Phase of the edit -> purpose -> bytes beside the weights that are in use at the same moment."""

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def above(self) -> int:
        """Bytes beside the weights at the peak."""
        return sum(self.phases[self.largest].values())

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.above


def memory_needed(
    config_or_model: Any,
    hparams: Any,
    tokens: int = TOKENS,
    answer_tokens: int = 1,
    *,
    free: int | None = None,
    device: str = "cpu",
    earlier: Sequence[int] = (),
    template: int = 0,
) -> MemoryNeeded:
    """The memory of one method's edit, phase by phase.

    Args:
        config_or_model: A configuration of transformers, or a model (possibly on the meta device).
        hparams: The settings of any method. Without a formula for it, the result is what every method needs.
        tokens: Length of the longest prompt with its answer.
        answer_tokens: Length of the longest answer.
        free: Bytes that are free with the weights loaded: localising takes its share of them. None: the least.
        device: Type of the device.
        earlier: Tokens of each fact that the model was edited with before and still has: under ``spare_edited`` an edit
            spares them.
        template: Tokens that the chat template adds to a neighbour's prompt.

    Raises:
        ValueError: The model lacks a module or layer of the settings.
    """
    model = config_or_model if isinstance(config_or_model, nn.Module) else without_weights(config_or_model)
    itemsize = dtype_of(hparams).itemsize
    weights = weights_bytes(model, hparams)
    if isinstance(hparams, KNEHyperParams):
        phases = kne(model, hparams, itemsize, Facts(tokens, answer_tokens, free, device, earlier, template))
        if dequantised := _dequantised(model, hparams):
            phases = {phase: parts | {"a matrix dequantised": dequantised} for phase, parts in phases.items()}
        return MemoryNeeded(weights, phases)
    formula = traits_of(hparams.alg_name).memory
    texts = _texts_at_once(hparams) * tokens
    editing = {
        **(formula(model, hparams, itemsize) if formula else {}),
        # Every layer keeps its states for the backward pass; logits: copies, softmax and gradients in float32.
        "activations (estimated)": texts
        * (depth(model) * state_bytes(model, itemsize) + 4 * PRECISE * vocabulary(model)),
    }
    return MemoryNeeded(weights, {"editing": editing})


def weights_bytes(model: nn.Module, hparams: Any) -> int:
    """Bytes of the weights as ``hparams`` load them.

    Under ``load_in`` bitsandbytes holds every linear layer but the head in fewer bits: 8 and a float32 of each row, or
    4 and a float32 of each 64 weights.

    Args:
        model: The model, possibly on the meta device.
        hparams: Settings of any method.
    """
    itemsize, bits = dtype_of(hparams).itemsize, getattr(hparams, "load_in", None)
    whole = itemsize * count_parameters(model)
    saved = 0
    for matrix in _quantised(model) if bits is not None else ():
        held = matrix.numel() + PRECISE * len(matrix) if bits == "8bit" else matrix.numel() // 2 + _blocks(matrix)
        saved += itemsize * matrix.numel() - held
    return whole - saved


BLOCK = 64
"""Weights that have one scale under ``load_in: 4bit``, bitsandbytes' default."""


def _blocks(matrix: Tensor) -> int:
    return PRECISE * -(-matrix.numel() // BLOCK)


def _quantised(model: Any) -> list[Tensor]:
    """The matrices ``(d2, d1)`` that bitsandbytes quantises."""
    head = model.get_output_embeddings()
    return [rows(module) for module in model.modules() if is_linear(module) and module is not head]


def _dequantised(model: nn.Module, hparams: Any) -> int:
    """Bytes of the largest quantised matrix in the compute type, which it is multiplied in under ``load_in: 4bit``."""
    if getattr(hparams, "load_in", None) != "4bit":
        return 0
    return dtype_of(hparams).itemsize * max((matrix.numel() for matrix in _quantised(model)), default=0)


def without_weights(config: Any) -> nn.Module:
    """The model of a configuration on torch's meta device: every module and shape, no memory."""
    with torch.device("meta"):
        return auto_class(config).from_config(deepcopy(config))


def _texts_at_once(hparams: Any) -> int:
    """Texts whose states are kept together: facts; or one fact after each context template, and one text for the KL
    term.
    """
    if (texts := traits_of(hparams.alg_name).texts_at_once) is not None:
        return texts
    if templates := getattr(hparams, "context_template_length_params", None):
        return sum(count for _, count in templates) + 2
    return getattr(hparams, "batch_size", None) or 1


def memory(
    plan: Mapping[str, Any],
    model: nn.Module,
    device: torch.device,
    tokenizer: Tokenizer | None,
    requests: Sequence[Mapping[str, Any]],
) -> Iterator[Finding]:
    """Compares the memory that each method needs with what is free now."""
    parallel = device.type == "cuda" and any(getattr(hparams, "model_parallel", False) for hparams in plan.values())
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if parallel else []
    free = sum(map(free_memory, gpus or [device]))
    spread = next((hparams for hparams in plan.values() if getattr(hparams, "model_parallel", False)), None)
    try:
        placed = None if spread is None else placement(model, spread)
    except ValueError as error:
        yield failure("placement", error)
        return
    if placed is not None:
        yield placed.finding()
    for label, hparams in plan.items():
        name = f"memory of {label}"
        try:
            texts = _texts(hparams, model, tokenizer, requests)
        except ValueError as error:  # too long in the chat template, or there is none
            yield failure(name, error)
            continue
        try:
            weights = weights_bytes(model, hparams) if placed is None else placed.computing
            beside = max(0, free - weights)
            needed = memory_needed(model, hparams, **texts | {"earlier": ()}, free=beside, device=device.type)
            needed = last = replace(needed, weights=weights)
            if texts["earlier"] and getattr(hparams, "spare_edited", False):
                last = memory_needed(model, hparams, **texts, free=beside, device=device.type)
                last = replace(last, weights=weights)
        except (ValueError, OSError):
            yield left_out(name, "its modules are not there")
            continue
        parts = {"weights": needed.weights, **needed.phases[needed.largest]}
        shown = listed({purpose: size(number) for purpose, number in parts.items() if number})
        text = (
            f"{size(needed.total)} needed, {size(free)} free on {'all GPUs' if gpus else device} (while "
            f"{needed.largest}: {shown})"
        )
        if last.total > needed.total:
            text += f"; {size(last.total)} for the last of {len(requests)} edits that are all kept (spare_edited)"
        if needed.total > free:
            yield Finding(
                name,
                FAILURE,
                text,
                "free some, take another device or model_parallel (docs/large-models.md), set bf16 or fp16, or edit "
                "fewer layers",
            )
        elif last.total > free:
            yield Finding(name, WARNING, text, "in a sequence set spare_edited: false, or edit fewer layers")
        elif not isinstance(hparams, KNEHyperParams) and traits_of(hparams.alg_name).memory is None:
            yield Finding(name, WARNING, f"{text}; what {hparams.alg_name} needs beside these only a trial can show")
        else:
            yield Finding(name, OK, text)
    if device.type == "cuda" and placed is None and not any(getattr(h, "load_in", None) for h in plan.values()):
        weights = dtype_of(next(iter(plan.values()))).itemsize * count_parameters(model)
        free = free_memory(torch.device("cpu"))
        text = f"{size(weights)} needed to load the model before it moves to {device}, {size(free)} free"
        lacking = weights > free
        yield Finding("memory of the machine", FAILURE if lacking else OK, text, "free some" if lacking else "")


def _texts(
    hparams: Any, model: nn.Module, tokenizer: Tokenizer | None, requests: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What `memory_needed` is to know of the texts of one method's edits, of which the last one comes on top of all."""
    if tokenizer is None:
        return {"tokens": TOKENS, "answer_tokens": 1, "earlier": [TOKENS] * (len(requests) - 1)}
    chat, separator = getattr(hparams, "use_chat_template", False), getattr(hparams, "separator", SEPARATOR)
    lengths = [token_count(request, tokenizer, model, chat, separator) for request in requests]
    both = [prompt + answer for prompt, answer in lengths]
    in_template = len(tokenizer(chat_prompt(tokenizer, "a") if chat else "a")["input_ids"])
    return {
        "tokens": max(both, default=TOKENS),
        "answer_tokens": max((answer for _, answer in lengths), default=1),
        "earlier": both[:-1],
        "template": in_template - len(tokenizer("a")["input_ids"]),
    }
