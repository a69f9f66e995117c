"""Localising many facts with one loaded model: time, memory above the weights, rate, ratio to the literal way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import mean, median
from typing import Any

from localization_measures import literal_attribution, multiplications, product_rate, spread, timed

from kne_easyedit._util.machine import PeakMemory
from kne_easyedit.attribution.engine import attribute_facts, rows_in_flight
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.localization.localizer import batches
from kne_easyedit.models.devices import device_of, environment
from kne_easyedit.models.fast_linear import linear
from kne_easyedit.models.targets import Target


def many_facts(model: Any, target: Target, facts: Sequence[Fact], steps: int, literal_layers: int) -> dict[str, Any]:
    """Localises facts in batches, and one of them alone and literally.

    Args:
        model: A loaded model.
        target: The modules.
        facts: At least one.
        steps: ``m``.
        literal_layers: Layers timed literally, spread over the model, and scaled to all; 0: the literal way is not run.

    Returns:
        Seconds, bytes above the weights, multiplications a second, and ratios; None where the literal way was not run.
    """
    device = device_of(model)
    attribute_facts(model, [target], facts[:1], steps)  # warm up
    in_flight = rows_in_flight(model, [target], facts[0])

    def everything() -> None:
        for batch in batches(facts, len(target.layers) * steps, in_flight):
            attribute_facts(model, [target], batch, steps, chunk_rows=in_flight)

    with PeakMemory(device) as peak:
        seconds, _ = timed(everything)
    fact = sorted(facts, key=lambda f: len(f.ids))[len(facts) // 2]
    alone = median(timed(lambda: attribute_facts(model, [target], [fact], steps))[0] for _ in range(3))
    layers = spread(target.layers, literal_layers) if literal_layers else ()
    literal = [timed(partial(literal_attribution, model, fact, target.template, steps, layer))[0] for layer in layers]
    literally = mean(literal) * len(target.layers) if literal else None
    needed = multiplications(model, target, facts, steps)
    rate = product_rate(model, linear, 8192 if device.type == "cuda" else 2048)
    figures = {
        "module": target.template,
        "facts": len(facts),
        "steps": steps,
        "seconds": seconds,
        "bytes_above_weights": peak.bytes,
        "rows_in_flight": in_flight,
        "multiplications": needed,
        "rate": needed / seconds,
        "product_rate": rate,
        "fact_tokens": [fact.prompt_length, len(fact.answer)],
        "sweep_alone_seconds": alone,
        "literal_seconds": literally,
        "ratio_alone": literally and literally / alone,
        "ratio_batched": literally and literally / (seconds / len(facts)),
        "environment": environment(model),
    }
    above = "unknown memory" if peak.bytes is None else f"{peak.bytes / 2**30:.2f} GiB"
    print(
        f"{len(facts)} facts: {seconds:.1f} s in all ({seconds / len(facts):.2f} s a fact), {above} above the weights, "
        f"{in_flight} rows in flight\n"
        f"{needed / seconds / 1e12:.2f} T multiplications/s; one large product "
        f"{rate / 1e12:.2f} T/s: {needed / seconds / rate:.0%}"
    )
    shown = "the literal way was not run"
    if literally is not None:
        shown = (
            f"literal {literally:.0f} s (scaled from layers {list(layers)}): ratio {literally / alone:.0f} alone, "
            f"{literally * len(facts) / seconds:.0f} against the mean fact of the batch"
        )
    print(f"one fact of {fact.prompt_length} + {len(fact.answer)} tokens: {alone:.2f} s alone, {shown}", flush=True)
    return figures
