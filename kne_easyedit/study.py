"""Localise on a set of facts and look at what came out: how many neurons where, and how stable the choice is."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from kne_easyedit.ensemble import NeuronEnsemble
from kne_easyedit.hparams import KNEHyperParams, public
from kne_easyedit.layout import count_parameters
from kne_easyedit.localization import Localization, localization_requests
from kne_easyedit.machine import environment
from kne_easyedit.paths import atomic_write

BAR = 30
"""Widest bar of the printed table, in characters."""


@dataclass(frozen=True)
class Study:
    """What a localisation found."""

    ensemble: NeuronEnsemble
    scores: Mapping[str, Tensor]
    """Template -> aggregated scores ``(layers, d2)``."""
    halves: tuple[NeuronEnsemble, NeuronEnsemble] | None
    """The ensembles of every other fact and of the rest; None if a half has no ensemble."""
    computed: int
    """Facts that were not in the cache."""
    seconds: float
    """Time that it took now."""
    parameter_share: float
    parameters: int
    model_digest: str

    @property
    def stability(self) -> float | None:
        """Overlap of the two halves' ensembles, in [0, 1]."""
        return None if self.halves is None else self.halves[0].overlap(self.halves[1])

    @property
    def chance(self) -> float:
        """The overlap that ensembles of this size would have if their neurons were drawn at random."""
        drawn = {t: sum(map(len, layers.values())) for t, layers in self.ensemble.neurons.items()}
        return sum(n * n / (self.ensemble.widths[t] * len(self.ensemble.layers)) for t, n in drawn.items()) / self.ensemble.size


def study(model: nn.Module, tokenizer, requests: Sequence[Mapping], hparams: KNEHyperParams) -> Study:
    """Localises on ``requests`` (see `localize`), and on two halves of them for the stability."""
    start = time.perf_counter()
    found = Localization(model, tokenizer, requests, hparams)
    computed = found.compute()
    scores = found.aggregate()
    ensemble = found.ensemble(scores=scores)
    try:
        halves = (found.ensemble(found.facts[::2]), found.ensemble(found.facts[1::2])) if len(found.facts) > 1 else None
    except ValueError:  # a half without any positive score
        halves = None
    seconds = time.perf_counter() - start
    share = ensemble.parameter_share(model)
    return Study(ensemble, scores, halves, computed, seconds, share, count_parameters(model), found.cache.model_digest)


def save_study(found: Study, folder: Path, model: nn.Module, hparams: KNEHyperParams, data: str) -> None:
    """Writes ``ensemble.json``, ``scores.safetensors``, ``summary.json`` and ``ensemble.png`` into ``folder``."""
    from kne_easyedit.plots import draw_ensemble

    ensemble = found.ensemble
    ensemble.save(folder / "ensemble.json")
    metadata = {
        "format": "kne-aggregated-scores-1",
        "layers": json.dumps(list(ensemble.layers)),
        "aggregation": hparams.aggregation,
        "steps": str(hparams.attribution_steps),
        "quadrature": hparams.quadrature,
        "facts": str(ensemble.facts),
        "model": found.model_digest,
    }
    atomic_write(folder / "scores.safetensors", save({t: scores.contiguous() for t, scores in found.scores.items()}, metadata))
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
        "hparams": {**public(hparams), "model_name": str(hparams.model_name)},
        "environment": environment(model),
    }
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    draw_ensemble(ensemble, folder / "ensemble.png", f"{hparams.model_name}: {ensemble.facts} facts of {data}\n{stability_line(found)}", found.halves)


def stability_line(found: Study) -> str:
    if found.stability is None:
        return "stability: unknown, it needs two halves of the facts that each have an ensemble"
    return f"stability: ensembles of two halves of the facts share {found.stability:.0%} of their neurons (by chance {found.chance:.1%})"


def print_study(found: Study) -> None:
    """Neurons per layer, share of the parameters, stability."""
    ensemble = found.ensemble
    each = f", {ensemble.seconds / ensemble.facts:.2f} s a fact when computed" if ensemble.seconds else ""
    print(f"\n{ensemble.facts} facts ({found.computed} attributed now, the others cached{each}), {found.seconds:.1f} s now")
    for template, counts in ensemble.counts().items():
        most = max(counts.values()) or 1
        print(f"\n{template}: {sum(counts.values())} of {len(counts) * ensemble.widths[template]} neurons")
        for layer, count in counts.items():
            print(f"  layer {layer:>3} {count:>6}  {'#' * round(BAR * count / most)}")
    print(f"\n{ensemble.size} neurons, {found.parameter_share:.2%} of the model's {found.parameters / 1e6:.1f} M parameters")
    print(stability_line(found))


def localize_job(hparams: KNEHyperParams, folder: Path) -> Study:
    """The whole job of ``kne localize`` and ``scripts/localize.py``: load, localise, print, write, draw.

    The facts are those of ``localization_data``. Raises ValueError if the settings name none.
    """
    from kne_easyedit.models import load_model

    if hparams.localization_data is None:
        raise ValueError("localization_data: none; name a KnowEdit file (--data), or 'embedded' for the packaged facts")
    requests = localization_requests(hparams)
    wanted = "" if len(requests) == hparams.localization_size else f" ({hparams.localization_size} wanted)"
    print(f"model {hparams.model_name}, {len(requests)} facts{wanted} of {hparams.localization_data}", flush=True)
    model, tokenizer = load_model(hparams)
    found = study(model, tokenizer, requests, hparams)
    save_study(found, folder, model, hparams, str(hparams.localization_data))
    print_study(found)
    print(f"\nWritten to {folder}: ensemble.json, scores.safetensors, summary.json, ensemble.png")
    return found
