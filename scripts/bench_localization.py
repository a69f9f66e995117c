"""Measure localisation. Every figure of docs/performance.md comes from one of these commands.

    python scripts/bench_localization.py single      # one fact: the sweep, the literal way, EasyEdit's KN, in one run
    python scripts/bench_localization.py scaling     # time and memory against layers, steps, lengths, facts (with plot)
    python scripts/bench_localization.py quadrature  # error of both sums against the integral
    python scripts/bench_localization.py precision   # bfloat16 and float16 against float32: the same neurons?
    python scripts/bench_localization.py random --architecture llama2-7b --dtype bfloat16 --device cuda --data FILE

`random` builds a published architecture with random weights, for speed and memory on a GPU. The literal way
(tests/reference.py) runs the whole model once for every layer, answer token and step; it is timed on some layers
and scaled to all. What is compared is interleaved, and medians are taken: machines are noisy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from architectures import ARCHITECTURES, fitting_tokenizer, random_model
from localization_measures import (
    ROOT,
    easyedit_kn,
    literal_attribution,
    load,
    multiplications,
    product_rate,
    spread,
    timed,
)
from localization_random import many_facts
from localization_scaling import scaling
from torch import Tensor, nn
from torch.nn import functional

from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.machine import keep_large_blocks
from kne_easyedit.attribution.engine import attribute_facts
from kne_easyedit.attribution.quadrature import gauss_legendre, riemann
from kne_easyedit.facts.encoding import Fact, encode, encode_request
from kne_easyedit.facts.records import load_requests
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization.ensemble import NeuronEnsemble, select_ensemble
from kne_easyedit.localization.selection import Selection, aggregate
from kne_easyedit.models.devices import environment
from kne_easyedit.models.fast_linear import linear
from kne_easyedit.models.targets import Target, resolve_target

PROMPT, ANSWER = "The name of the country in which Leonardo da Vinci was born is", "the Kingdom of Denmark"


def main() -> None:
    """Runs one command and writes its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hparams", type=Path, default=ROOT / "hparams/KNE/smollm2-135m.yaml")
    parser.add_argument("--module", help="template; default: the first of the hparams")
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON, and plots")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("single")
    one.add_argument("--prompt", default=PROMPT)
    one.add_argument("--target", default=ANSWER)
    one.add_argument("--data", help="KnowEdit file: its first facts instead")
    one.add_argument("--size", type=int, default=3, help="facts of --data")
    one.add_argument("--literal-layers", type=int, default=3, help="layers timed literally, spread over the model")
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument(
        "--kn",
        action="store_true",
        help="EasyEdit's KnowledgeNeurons.get_scores_for_layer, too (both on mlp.gate_proj)",
    )
    one.set_defaults(command=single)
    grow = commands.add_parser("scaling")
    grow.add_argument("--repeats", type=int, default=3)
    grow.add_argument("--point", help=argparse.SUPPRESS)  # one measurement, in its own process
    grow.set_defaults(command=scaling)
    for name, command in (("quadrature", quadrature), ("precision", precision)):
        sub = commands.add_parser(name)
        sub.add_argument("--data", default="embedded", help="KnowEdit file, or 'embedded' (default)")
        sub.add_argument("--size", type=int, default=20)
        sub.set_defaults(command=command)
        if command is precision:
            sub.add_argument(
                "--types",
                nargs="+",
                default=["bfloat16", "float16"],
                choices=("bfloat16", "float16"),
                help="float16 is slow on CPUs",
            )
    big = commands.add_parser("random")
    big.add_argument("--architecture", choices=ARCHITECTURES, default="llama2-7b")
    big.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    big.add_argument("--device", default="cuda")
    big.add_argument(
        "--data", required=True, help="KnowEdit file, or 'embedded'; tokenised by a tokenizer trained on its facts"
    )
    big.add_argument("--size", type=int, default=200)
    big.add_argument("--steps", type=int, default=20)
    big.add_argument("--literal-layers", type=int, default=3, help="0: the literal way is not run")
    big.set_defaults(command=random_weights)
    options = parser.parse_args()
    figures = options.command(options)
    if options.out and figures:
        atomic_write(options.out / f"{options.command.__name__}.json", json.dumps(figures, indent=1) + "\n")


def single(options: argparse.Namespace) -> dict:
    """One fact at a time: the sweep against the literal way, and against one large matrix product."""
    keep_large_blocks()  # for all ways, as `kne` does
    model, tokenizer, hparams = load(options)
    if options.kn:
        options.module = "model.layers.{}.mlp.gate_proj"
    target = resolve_target(model, options.module or hparams.target_modules[0], hparams.layers)
    if options.data:
        facts = [encode_request(tokenizer, request) for request in load_requests(options.data, options.size)]
    else:
        facts = [encode(tokenizer, options.prompt, options.target)]
    steps, layers = hparams.attribution_steps, spread(target.layers, options.literal_layers)
    results: list[dict[str, Any]] = []
    for fact in facts:
        print(
            f"{fact.prompt} -> {fact.target}: {fact.prompt_length} + {len(fact.answer)} tokens, "
            f"{len(target.layers)} layers, m = {steps}"
        )
        sweep = partial(attribute_of_one, model, target, fact, steps)
        sweep()  # warm up
        times: dict[str, list[float]] = {"sweep": [], "literal": [], "kn": []}
        products: dict[str, list[float]] = {"torch": [], "fastest": []}
        difference = largest = 0.0
        for layer in [layer for _ in range(options.repeats) for layer in layers]:
            seconds, scores = timed(sweep)
            times["sweep"].append(seconds)
            products["torch"].append(product_rate(model, functional.linear))
            products["fastest"].append(product_rate(model, linear))
            seconds, expected = timed(partial(literal_attribution, model, fact, target.template, steps, layer))
            times["literal"].append(seconds)
            if options.kn:
                times["kn"].append(timed(partial(easyedit_kn, model, tokenizer, fact, layer, steps))[0])
            difference = max(difference, float((scores[target.layers.index(layer)] - expected[0].cpu()).abs().max()))
            largest = max(largest, float(scores.abs().max()))
            print("  layer", layer, {way: round(found[-1], 2) for way, found in times.items() if found}, flush=True)
        needed, n = multiplications(model, target, [fact], steps), len(target.layers)
        # Lower layers cost the literal way more: the mean over the spread, of each layer's median over the repeats.
        per_layer = {
            way: mean(median(found[k :: len(layers)]) for k in range(len(layers))) * n
            for way, found in times.items()
            if found
        }
        seconds = median(times["sweep"])
        result: dict[str, Any] = {
            "module": target.template,
            "prompt_tokens": fact.prompt_length,
            "answer_tokens": len(fact.answer),
            "layers": n,
            "steps": steps,
            "sweep_seconds": seconds,
            "literal_seconds": per_layer["literal"],
            "ratio": per_layer["literal"] / seconds,
            "relative_difference": difference / largest,
            "largest_score": largest,
            "multiplications": needed,
            "sweep_rate": needed / seconds,
            "product_rate": median(products["torch"]),
            "fastest_product_rate": median(products["fastest"]),
        }
        if options.kn:
            result |= {"kn_seconds": per_layer["kn"], "kn_ratio": per_layer["kn"] / seconds}
        results.append(result)
        print(
            f"sweep              {seconds:10.2f} s a fact\n"
            f"literal, scaled    {result['literal_seconds']:10.2f} s a fact: ratio {result['ratio']:.1f}\n"
            + (
                f"EasyEdit's KN      {result['kn_seconds']:10.2f} s a fact, scaled: ratio {result['kn_ratio']:.1f}\n"
                if options.kn
                else ""
            )
            + f"largest difference {difference / largest:10.1e} of the largest score ({largest:.3f})\n"
            f"rate               {result['sweep_rate'] / 1e9:10.1f} G multiplications/s of the "
            f"{needed / 1e9:.0f} G that are needed\n"
            f"one large product  {result['product_rate'] / 1e9:10.1f} G/s by torch: "
            f"{result['sweep_rate'] / result['product_rate']:.0%}; "
            f"{result['fastest_product_rate'] / 1e9:.1f} G/s by the fastest library: "
            f"{result['sweep_rate'] / result['fastest_product_rate']:.0%}"
        )
    if len(results) > 1:
        print(f"median ratio over {len(results)} facts: {median(r['ratio'] for r in results):.1f}")
    return {"model": str(hparams.model_name), "environment": environment(model), "facts": results}


def attribute_of_one(model: nn.Module, target: Target, fact: Fact, steps: int) -> Tensor:
    """The scores ``(layers, d2)`` of one fact by the sweep."""
    return attribute_facts(model, [target], [fact], steps)[0][0]


def quadrature(options: argparse.Namespace) -> dict:
    """Error of both sums against the integral (Gauss-Legendre, 64 nodes), and which neurons they would choose."""
    keep_large_blocks()
    model, tokenizer, hparams = load(options)
    target = resolve_target(model, options.module or hparams.target_modules[0], hparams.layers)
    facts = [encode_request(tokenizer, request) for request in load_requests(options.data, options.size)]
    exact = [attribute_facts(model, [target], [fact], 64, quadrature=gauss_legendre)[0][0] for fact in facts]
    chosen = selected(exact, hparams.selection, target)
    found = {}
    for name, rule, many in (
        ("riemann", riemann, (5, 10, 20, 40)),
        ("gauss-legendre", gauss_legendre, (2, 3, 4, 5, 6, 8, 10)),
    ):
        for steps in many:
            scores = [attribute_facts(model, [target], [fact], steps, quadrature=rule)[0][0] for fact in facts]
            errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(scores, exact)]
            ensemble = selected(scores, hparams.selection, target)
            found[f"{name} {steps}"] = {
                "median_error": median(errors),
                "largest_error": max(errors),
                "overlap": ensemble.overlap(chosen),
            }
            print(
                f"{name:>15} m = {steps:>2}: error {median(errors):.1e} of the largest score "
                f"(worst fact {max(errors):.1e}), "
                f"{ensemble.overlap(chosen):.1%} of the integral's ensemble",
                flush=True,
            )
    return {
        "model": str(hparams.model_name),
        "data": options.data,
        "facts": len(facts),
        "sums": found,
        "environment": environment(model),
    }


def precision(options: argparse.Namespace) -> dict:
    """Scores of half-precision models against those of float32: the same neurons?"""
    keep_large_blocks()
    requests = load_requests(options.data, options.size)

    def scores_in(dtype: torch.dtype) -> tuple[list[Tensor], Target, KNEHyperParams, nn.Module]:
        model, tokenizer, hparams = load(options)  # loaded again: rounded weights do not come back
        model.to(dtype)
        target = resolve_target(model, options.module or hparams.target_modules[0], hparams.layers)
        facts = [encode_request(tokenizer, request) for request in requests]
        return (
            [attribute_facts(model, [target], [fact], hparams.attribution_steps)[0][0] for fact in facts],
            target,
            hparams,
            model,
        )

    exact, target, hparams, model = scores_in(torch.float32)
    found = {}
    for dtype in options.types:
        scores = scores_in(getattr(torch, dtype))[0]
        choose = partial(selected, selection=hparams.selection, target=target)
        single = [choose([a]).overlap(choose([b])) for a, b in zip(scores, exact)]
        shared = choose(scores).overlap(choose(exact))
        correlation = median(
            float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) for a, b in zip(scores, exact)
        )
        found[dtype] = {
            "scores_dtype": str(scores[0].dtype),
            "ensemble_overlap": shared,
            "fact_overlap_median": median(single),
            "fact_overlap_least": min(single),
            "correlation_median": correlation,
        }
        print(
            f"{dtype}: the ensemble of {len(requests)} facts shares {shared:.1%} of its neurons with float32's; "
            f"single facts {median(single):.1%} (least {min(single):.1%}); correlation {correlation:.4f}",
            flush=True,
        )
    return {
        "model": str(hparams.model_name),
        "data": options.data,
        "facts": len(requests),
        "types": found,
        "environment": environment(model),
    }


def selected(scores: Sequence[Tensor], selection: Selection, target: Target) -> NeuronEnsemble:
    """The ensemble of some facts' scores under the settings' rules."""
    selection = replace(selection, layers=target.layers)
    return select_ensemble(aggregate(scores, selection.aggregation)[0], selection, target_module=target.template)


def random_weights(options: argparse.Namespace) -> dict:
    """Many real facts on a published architecture with random weights: time in all, memory above the weights, ratio."""
    if options.device == "cpu":
        keep_large_blocks()
    model: Any = random_model(options.architecture, getattr(torch, options.dtype), options.device)
    target = resolve_target(model, options.module or ARCHITECTURES[options.architecture].module)
    requests = load_requests(options.data, options.size)
    tokenizer = fitting_tokenizer(requests, model.config.vocab_size)
    facts = [encode_request(tokenizer, request) for request in requests]
    found = many_facts(model, target, facts, options.steps, options.literal_layers)
    return {"architecture": options.architecture, "dtype": options.dtype, **found}


if __name__ == "__main__":
    main()
