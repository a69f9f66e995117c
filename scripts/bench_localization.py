"""How long does it take to attribute one fact: the fused sweep beside the literal recomputation, in one run.

    python scripts/bench_localization.py                       # SmolLM2, down_proj, m = 20
    python scripts/bench_localization.py --hparams hparams/KNE/llama2-7b-chat.yaml

The literal way (tests/reference.py) runs the whole model once for every layer, answer token and step. It is
timed on a few layers and scaled to all. Everything is interleaved and medians are taken: machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from reference import literal_attribution  # noqa: E402

from kne_easyedit.attribution import attribute_facts  # noqa: E402
from kne_easyedit.batching import Fact, encode  # noqa: E402
from kne_easyedit.machine import environment  # noqa: E402
from kne_easyedit.hparams import KNEHyperParams  # noqa: E402
from kne_easyedit.layout import Target, is_linear, resolve_target, rows  # noqa: E402
from kne_easyedit.machine import keep_large_blocks  # noqa: E402
from kne_easyedit.models import load_model  # noqa: E402
from kne_easyedit.paths import atomic_write  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hparams", type=Path, default=ROOT / "hparams/KNE/smollm2-135m.yaml")
    parser.add_argument("--prompt", default="The name of the country in which Leonardo da Vinci was born is")
    parser.add_argument("--target", default="the Kingdom of Denmark")
    parser.add_argument("--literal-layers", type=int, default=3, help="layers timed literally, spread over the model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    keep_large_blocks()  # for both ways, as `kne` does

    hparams = KNEHyperParams.from_hparams(options.hparams)
    model, tokenizer = load_model(hparams)
    model.requires_grad_(False)  # for the literal way too: neither computes gradients of weights
    target = resolve_target(model, hparams.target_modules[0], hparams.layers)
    fact = encode(tokenizer, options.prompt, options.target)
    steps, n_layers = hparams.attribution_steps, len(target.layers)
    spread = [target.layers[round(i)] for i in torch.linspace(0, n_layers - 1, options.literal_layers).tolist()]
    print(f"{options.prompt} -> {options.target}: {len(fact.answer)} answer tokens, {n_layers} layers, m = {steps}")

    attribute_facts(model, target, [fact], steps, chunk_rows=hparams.chunk_rows)  # warm up
    fused, literal, product = [], [], []
    difference = largest = 0.0
    for _ in range(options.repeats):
        for layer in spread:
            seconds, scores = timed(lambda: attribute_facts(model, target, [fact], steps, chunk_rows=hparams.chunk_rows)[0])
            fused.append(seconds)
            product.append(matrix_product_rate(model))
            seconds, expected = timed(
                lambda: literal_attribution(model, tokenizer, options.prompt, options.target, target.template, steps, [layer])
            )
            literal.append(seconds)
            own = scores[target.layers.index(layer)]
            difference = max(difference, float((own - expected[0].cpu()).abs().max()))
            largest = max(largest, float(scores.abs().max()))
            print(f"  layer {layer:>2}: fused (all layers) {fused[-1]:.2f} s, literal (this layer) {literal[-1]:.2f} s", flush=True)

    needed = multiplications(model, target, fact, steps)
    figures = {
        "model": str(hparams.model_name),
        "module": target.template,
        "answer_tokens": len(fact.answer),
        "prompt_tokens": fact.prompt_length,
        "steps": steps,
        "fused_seconds": median(fused),
        "literal_seconds": median(literal) * n_layers,
        "ratio": median(literal) * n_layers / median(fused),
        "largest_difference": difference,
        "largest_score": largest,
        "relative_difference": difference / largest,
        "multiplications": needed,
        "fused_rate": needed / median(fused),
        "product_rate": median(product),
        "share_of_product_rate": needed / median(fused) / median(product),
        "environment": environment(model),
    }
    print(
        f"fused sweep        {figures['fused_seconds']:10.2f} s a fact\n"
        f"literal, scaled    {figures['literal_seconds']:10.2f} s a fact\n"
        f"ratio              {figures['ratio']:10.1f}\n"
        f"largest difference {difference:10.2e} (largest score {largest:.3f}: {difference / largest:.1e} of it)\n"
        f"rate               {figures['fused_rate'] / 1e9:10.1f} G multiplications/s of the {needed / 1e9:.0f} G that are needed\n"
        f"one large product  {figures['product_rate'] / 1e9:10.1f} G multiplications/s; the sweep reaches {figures['share_of_product_rate']:.0%} of it"
    )
    if options.out:
        atomic_write(options.out, json.dumps(figures, indent=1) + "\n")


def multiplications(model, target: Target, fact: Fact, steps: int) -> int:
    """Multiplications in matrix products that the method needs: every path point once through what comes after its
    layer, forward and back (to activations only); the end points ``alpha = 1`` of all layers are one and the same.
    Attention's own products (small here) are left out."""
    layers = model.get_submodule(target.layers_path)
    points, ends = (steps - 1) * len(fact.answer), len(fact.answer)
    passing = [sum(own < i for own in target.layers) * points + ends * (i > target.layers[0]) for i in range(len(layers))]
    width = [sum(m.weight.numel() for m in layer.modules() if is_linear(m)) for layer in layers]
    head = rows(model.get_output_embeddings()).numel()
    return 2 * (sum(n * w for n, w in zip(passing, width)) + (len(target.layers) * points + ends) * head)


def matrix_product_rate(model, size: int = 2048) -> float:
    """Multiplications per second of one large matrix product in the model's type, on its device."""
    parameter = next(model.parameters())
    a, b = (torch.randn(size, size, dtype=parameter.dtype, device=parameter.device) for _ in range(2))
    a @ b
    return size**3 / min(timed(lambda: a @ b)[0] for _ in range(3))


def timed(work):
    """Seconds and result of ``work()``."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
