"""What the benchmarks of localisation measure with: time, memory, and the multiplications that are needed."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from kne_easyedit.facts.encoding import Fact, Tokenizer
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.models.loading import load_model
from kne_easyedit.models.targets import Target, is_linear, rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
reference = importlib.import_module("reference")  # of the tests: a slow, literal form of every equation

T = TypeVar("T")


def load(options: argparse.Namespace) -> tuple[nn.Module, Tokenizer, KNEHyperParams]:
    """Model, tokenizer and settings of ``--hparams``. The model's weights need no gradients."""
    hparams = KNEHyperParams.from_hparams(options.hparams)
    model, tokenizer = load_model(hparams)
    model.requires_grad_(False)  # for the literal way too: neither computes gradients of weights
    return model, tokenizer, hparams


def spread(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` of the layers, evenly spread from first to last."""
    return tuple(layers[round(i)] for i in torch.linspace(0, len(layers) - 1, min(count, len(layers))).tolist())


def literal_attribution(model: nn.Module, fact: Fact, template: str, steps: int, layer: int) -> Tensor:
    """The scores ``(1, d2)`` of one layer by the literal way: one pass through the model for every path point."""
    return reference.literal_attribution_of_ids(model, fact.ids, fact.prompt_length, template, steps, [layer])


def multiplications(model: nn.Module, target: Target, facts: Sequence[Fact], steps: int) -> int:
    """Multiplications in matrix products that the method needs (Riemann sum).

    Every path point passes once through what comes after its module, forward and back (to activations only); the end
    points ``alpha = 1`` of all layers are the same one. Attention's own products (small here) are left out, and so is
    what remains of the module's own layer.
    """
    layers = list(model.get_submodule(target.layers_path).children())
    tokens = sum(len(fact.answer) for fact in facts)
    points, ends = (steps - 1) * tokens, tokens
    passing = [
        sum(own < i for own in target.layers) * points + ends * (i > target.layers[0]) for i in range(len(layers))
    ]
    width = [sum(rows(m).numel() for m in layer.modules() if is_linear(m)) for layer in layers]
    output = cast(Any, model).get_output_embeddings()  # transformers' models have it, nn.Module does not
    head = rows(output).numel()
    return 2 * (sum(n * w for n, w in zip(passing, width)) + (len(target.layers) * points + ends) * head)


def product_rate(model: nn.Module, multiply: Callable[[Tensor, Tensor], Tensor], size: int = 2048) -> float:
    """Multiplications per second of one large matrix product in the model's type, on its device."""
    parameter = next(model.parameters())
    a, b = (torch.randn(size, size, dtype=parameter.dtype, device=parameter.device) for _ in range(2))
    multiply(a, b)
    return size**3 / min(timed(lambda: multiply(a, b))[0] for _ in range(3))


def easyedit_kn(model: nn.Module, tokenizer: Tokenizer, fact: Fact, layer: int, steps: int) -> Tensor:
    """EasyEdit's own attribution of one layer: gate_proj, the same steps, as many answer tokens."""
    from kne_easyedit import bridge

    bridge.load()
    module = importlib.import_module("easyeditor.models.kn.knowledge_neurons.knowledge_neurons.knowledge_neurons")
    neurons = module.KnowledgeNeurons(model, tokenizer, model_type="llama", device="cpu")
    return neurons.get_scores_for_layer(fact.prompt, f" {fact.target}", layer, batch_size=10, steps=steps)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds and result of ``work()``."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - start, result
