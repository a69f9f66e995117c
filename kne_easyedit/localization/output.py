"""Writes and prints what `study` and `explain` found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from kne_easyedit._util.files import atomic_write, parse_json
from kne_easyedit._util.messages import printable, shorten
from kne_easyedit._util.settings import public_settings
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.localization.explain import Explanation, Neuron
from kne_easyedit.localization.figures import draw_ensemble, draw_explanation
from kne_easyedit.localization.settings import LocalizationSettings
from kne_easyedit.localization.stability import Study
from kne_easyedit.models.devices import environment

SUMMARY = "summary.json"
BAR = 30
"""Widest bar of the printed table, in characters."""


_DECISIVE = (
    *("model_name", "bf16", "fp16", "load_in", "target_modules", "layers", "use_chat_template", "separator"),
    *("attribution_steps", "quadrature", "p", "aggregation", "score_scale"),
    *("localization_data", "localization_size", "localization_offset"),
)
"""Settings that decide which neurons are found; others say how to train, or where and how fast to compute."""


def decisive_settings(hparams: LocalizationSettings) -> dict[str, Any]:
    """The settings on which the results of a localisation depend, as a summary has them."""
    found = _shown_settings(hparams)
    return {name: json.loads(json.dumps(found[name])) for name in _DECISIVE if name in found}


def _shown_settings(hparams: LocalizationSettings) -> dict[str, Any]:
    return {**public_settings(hparams), "model_name": str(hparams.model_name)}


def require_same_settings(folder: Path, hparams: LocalizationSettings) -> None:
    """Raises ValueError if a folder has results of other settings: users name its ensemble in their files.

    Settings that the version that wrote it did not know are not compared.
    """
    file = folder / SUMMARY
    if not file.is_file():
        return
    try:
        there = parse_json(file.read_bytes())["hparams"]
        known = [(name, there[name], its) for name, its in decisive_settings(hparams).items() if name in there]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: no summary of a localisation; name another folder, or remove this file") from error
    if shown := [f"{name}: {shorten(was)} there, {shorten(its)} now" for name, was, its in known if was != its]:
        raise ValueError(
            f"{folder} has results of other settings ({'; '.join(shown)}); name another folder, or remove this one"
        )


def save_study(found: Study, folder: Path, model: nn.Module, hparams: LocalizationSettings, data: str) -> None:
    """Writes ``ensemble.json``, ``scores.safetensors``, ``summary.json`` and ``ensemble.png``.

    Args:
        found: What `study` found.
        folder: Where the files go; it is made.
        model: The model, for a description of the environment.
        hparams: The settings that `study` had.
        data: The data's name.

    Raises:
        OSError: A file cannot be written.
        ImportError: matplotlib is missing.
    """
    ensemble = found.ensemble
    ensemble.save(folder / "ensemble.json")
    metadata = {
        "format": "kne-aggregated-scores-1",
        "layers": json.dumps(list(ensemble.layers)),
        "aggregation": str(ensemble.aggregation),
        "steps": str(hparams.attribution_steps),
        "quadrature": hparams.quadrature,
        "facts": str(ensemble.facts),
        "model": found.model_digest,
    }
    atomic_write(
        folder / "scores.safetensors", save({t: scores.contiguous() for t, scores in found.scores.items()}, metadata)
    )
    summary = {
        "model": str(hparams.model_name),
        "model_digest": found.model_digest,
        "data": data,
        "facts": ensemble.facts,
        "computed_now": found.computed,
        "seconds_now": found.seconds,
        "seconds_when_computed": ensemble.seconds,
        "neurons": ensemble.size,
        "neurons_per_layer": ensemble.counts(),
        "thresholds": ensemble.thresholds,
        "parameters": found.parameters,
        "parameter_share": found.parameter_share,
        "stability": found.stability,
        "stability_by_chance": found.chance,
        "hparams": _shown_settings(hparams),
        "environment": environment(model),
    }
    atomic_write(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    draw_ensemble(
        ensemble,
        folder / "ensemble.png",
        f"{hparams.model_name}: {ensemble.facts} facts of {data}\n{stability_line(found)}",
        found.halves,
    )


def stability_line(found: Study) -> str:
    """The stability as one line of text."""
    if found.stability is None:
        return "stability: unknown, it needs two halves of the facts that each have an ensemble"
    return (
        f"stability: ensembles of two halves of the facts share {found.stability:.0%} of their neurons "
        f"(by chance {found.chance:.1%})"
    )


def print_study(found: Study) -> None:
    """Prints neurons per layer, their share of the parameters, and the stability."""
    ensemble = found.ensemble
    each = ""
    if ensemble.seconds and ensemble.facts:
        each = f", {ensemble.seconds / ensemble.facts:.2f} s a fact when computed"
    print(
        f"\n{ensemble.facts} facts ({found.computed} attributed now, the others cached{each}), "
        f"{found.seconds:.1f} s now"
    )
    for template, counts in ensemble.counts().items():
        most = max(counts.values()) or 1
        print(f"\n{template}: {sum(counts.values())} of {len(counts) * ensemble.widths[template]} neurons")
        for layer, count in counts.items():
            print(f"  layer {layer:>3} {count:>6}  {'#' * round(BAR * count / most)}")
    print(
        f"\n{ensemble.size} neurons, {found.parameter_share:.2%} of the model's "
        f"{found.parameters / 1e6:.1f} M parameters"
    )
    print(stability_line(found))


def save_explanation(found: Explanation, folder: Path, hparams: LocalizationSettings) -> None:
    """Writes ``explanation.json`` and ``explanation.png``.

    Args:
        found: What `explain` found.
        folder: Where the files go; it is made.
        hparams: The settings that `explain` had.

    Raises:
        OSError: A file cannot be written.
        ImportError: matplotlib is missing.
    """
    content = {
        "model": str(hparams.model_name),
        "p": found.selection.p,
        "score_scale": found.selection.scale,
        "steps": hparams.attribution_steps,
        "quadrature": hparams.quadrature,
        "facts": [
            {
                "prompt": fact.prompt,
                "target_new": fact.target,
                "neurons": ensemble.size,
                "neurons_per_layer": ensemble.counts(),
                "rows": ensemble.neurons,
                "strongest": [
                    {"module": t, "layer": layer, "neuron": row, "attribution": value}
                    for (t, layer, row), value in best
                ],
            }
            for fact, ensemble, best in zip(found.facts, found.ensembles, found.strongest)
        ],
        "collisions": {
            "meaning": "[i][j]: share of fact i's neurons that fact j has, too",
            "shares": found.collisions(),
        },
        "hubs": [
            {"module": t, "layer": layer, "neuron": row, "facts": count} for (t, layer, row), count in found.hubs()
        ],
    }
    atomic_write(folder / "explanation.json", json.dumps(content, indent=1) + "\n")
    draw_explanation(
        found,
        folder / "explanation.png",
        f"{hparams.model_name}: neurons of {len(found.facts)} facts, top {found.selection.p:.0%} of each",
    )


def print_explanation(found: Explanation, examples: int = 5) -> None:
    """Prints layers and strongest neurons of the first ``examples`` facts, and the neurons that facts share most."""
    for i, (fact, ensemble, best) in enumerate(zip(found.facts[:examples], found.ensembles, found.strongest)):
        print(f"\n[{i}] {printable(fact.prompt)}  ->  {printable(fact.target)}: {ensemble.size} neurons")
        for template, counts in ensemble.counts().items():
            top = sorted(counts.items(), key=lambda item: -item[1])[:6]
            print(f"    {template}: " + ", ".join(f"layer {layer}: {count}" for layer, count in top if count) + " ...")
        print("    strongest: " + ", ".join(f"{_short(neuron)} {value:.3f}" for neuron, value in best[:5]))
    if len(found.facts) > examples:
        print(f"\n... and {len(found.facts) - examples} facts more (in explanation.json)")
    if len(found.facts) == 1:
        return
    shares = found.collisions()
    pairs = sorted(
        ((shares[i][j], i, j) for i in range(len(shares)) for j in range(len(shares)) if i != j), reverse=True
    )
    mean = sum(share for share, _, _ in pairs) / len(pairs)
    print(f"\nCollisions: on average a fact shares {mean:.0%} of its neurons with another. Most:")
    for share, i, j in pairs[:5]:
        print(f"    {share:>4.0%} of [{i}] {_fact(found.facts[i])}  are of  [{j}] {_fact(found.facts[j])}")
    if found.hubs():
        print("Shared by most facts: " + ", ".join(f"{_short(neuron)} ({count})" for neuron, count in found.hubs()[:6]))


def _short(neuron: Neuron) -> str:
    template, layer, row = neuron
    return f"{template.rsplit('.', 1)[-1]} {layer}:{row}"


def _fact(fact: Fact) -> str:
    text = printable(f"{fact.prompt} -> {fact.target}")
    return text if len(text) <= 48 else f"{text[:45]}..."
