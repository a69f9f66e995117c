"""The commands ``rate`` and ``below`` of bench_editing.py: what a training step costs beside what it must cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, cast
from unittest.mock import patch

import torch
from localization_measures import product_rate, timed
from torch import Tensor, nn

from kne_easyedit import KNEHyperParams
from kne_easyedit.editing import training_pass
from kne_easyedit.editing.adapter import ADAPTER, row_adapter
from kne_easyedit.editing.objectives import SharedObjective, objectives_for
from kne_easyedit.editing.reading import Reading
from kne_easyedit.editing.row_training import train_rows, training_batch
from kne_easyedit.facts.encoding import Batch, Tokenizer, encode_request
from kne_easyedit.localization.localizer import find_ensemble
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.fast_linear import fast_linear, linear
from kne_easyedit.models.state import preserve_state
from kne_easyedit.models.targets import is_linear, resolve_target, rows


def rate(
    model: nn.Module,
    tokenizer: Tokenizer,
    requests: Sequence[dict],
    hparams: KNEHyperParams,
    repeats: int,
    training_step: Callable[[nn.Module, Batch | Reading, torch.optim.Optimizer], None],
) -> dict[str, float]:
    """A step of KNE's training, its texts as `train_rows` has them, against its bare products of the same shapes.

    A step's products: every linear layer forward, and backward to its inputs. For a few tokens reading the weights
    takes longer than multiplying, so their own rate is far from that of one large product; both are given.

    Returns:
        ``share``: products' time of a step's, the median of the facts; ``step`` and ``products``: their
        multiplications a second as a share of the rate of one large product.
    """
    ensemble = find_ensemble(model, tokenizer, requests, hparams)
    head: Any = cast("Any", model).get_output_embeddings()
    layers: list[Any] = [m for m in model.modules() if is_linear(m) and m is not head]
    found: dict[str, list[float]] = {"share": [], "step": [], "products": []}
    for request in requests:
        own = objectives_for(model, tokenizer, [request], hparams)
        texts = [o.texts(0) for o in own if isinstance(o, SharedObjective)]
        batch = training_batch([encode_request(tokenizer, request)], texts).to(device_of(model))
        tokens = batch.input_ids.numel()
        places = len(batch.labels) if isinstance(batch, Reading) else tokens
        times: dict[str, list[float]] = {"step": [], "products": []}
        with preserve_state(model), fast_linear(model), row_adapter(model, ensemble, hparams) as trained:
            parameters = [layer.lora_A[ADAPTER].weight for layer in trained.values()]
            optimizer = torch.optim.AdamW(parameters, lr=hparams.lr)
            training_step(model, batch, optimizer)  # AdamW creates its moments in the first step
            products(layers, tokens, head, places)
            for _ in range(repeats):
                times["products"].append(timed(partial(products, layers, tokens, head, places))[0])
                times["step"].append(timed(partial(training_step, model, batch, optimizer))[0])
        step, bare = (median(times[name]) for name in ("step", "products"))
        # Backward, too.
        needed = 2 * (tokens * sum(rows(layer).numel() for layer in layers) + places * rows(head).numel())
        fastest = product_rate(model, lambda a, b: linear(a, b.t().contiguous()))
        for name, value in (
            ("share", bare / step),
            ("step", needed / step / fastest),
            ("products", needed / bare / fastest),
        ):
            found[name].append(value)
        print(
            f"{tokens:>3} tokens in {len(batch.input_ids)} texts: step {1000 * step:.0f} ms, its products "
            f"{1000 * bare:.0f} ms ({bare / step:.0%}); of the rate of one large product: step "
            f"{found['step'][-1]:.0%}, products {found['products'][-1]:.0%}"
        )
    result = {name: median(values) for name, values in found.items()}
    print("median: " + ", ".join(f"{name} {value:.0%}" for name, value in result.items()))
    return result


def below(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[dict], hparams: KNEHyperParams, repeats: int
) -> dict[str, float]:
    """Training of rows in the upper layers only, with the layers below run once a batch and with all run every step.

    The number of steps is that of ``hparams``, or fewer where training stops earlier; both give the same bits.

    Returns:
        Which layers -> the median of the facts: seconds with the layers below run once, as a share of those without.
    """
    count, found = len(resolve_target(model, hparams.target_modules[0]).layers), {}
    for name, first in (("upper half", count // 2), ("upper third", count - count // 3), ("last layer", count - 1)):
        chosen = replace(hparams, layers=list(range(first, count)))
        ensemble, shares = find_ensemble(model, tokenizer, requests, chosen), []
        for request in requests:
            fact = encode_request(tokenizer, request)
            times: dict[str, list[float]] = {"once": [], "always": []}
            own = objectives_for(model, tokenizer, [request], chosen)
            work = partial(train_rows, model, [fact], ensemble, chosen, own)
            for _ in range(repeats):
                times["once"].append(timed(work)[0])
                with patch.object(training_pass, "layers_below", lambda *_: []):
                    seconds, edit = timed(work)
                times["always"].append(seconds)
            once, always = (median(times[name]) for name in ("once", "always"))
            shares.append(once / always)
            print(f"{name}: {edit.steps} steps, {once:.2f} s, with all layers {always:.2f} s ({once / always:.0%})")
        found[name] = median(shares)
    print("median: " + ", ".join(f"{name} {share:.0%}" for name, share in found.items()))
    return found


def products(layers: Sequence[Any], tokens: int, head: Any, places: int) -> None:
    """The products of one step: every linear layer forward, then back from the last one, as `fast_linear` does them.

    The head has those of some ``places`` only.
    """
    wanted = [*((layer, tokens) for layer in layers), (head, places)]
    with torch.no_grad():
        for layer, count in wanted:
            linear(_states(count, layer.in_features, layer), layer.weight, layer.bias)
        for layer, count in reversed(wanted):
            linear(_states(count, layer.out_features, layer), layer.weight.t())


def _states(tokens: int, width: int, layer: Any) -> Tensor:
    return torch.ones(tokens, width, dtype=layer.weight.dtype, device=layer.weight.device)
