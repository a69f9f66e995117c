"""Which neurons stand for a fact, and which facts fight for the same ones: the collision table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from kne_easyedit.batching import Fact
from kne_easyedit.ensemble import NeuronEnsemble, scaled
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization import Localization
from kne_easyedit.paths import atomic_write

TOP = 10
"""Strongest neurons listed of each fact."""

Neuron = tuple[str, int, int]
"""Template, layer, row."""


@dataclass(frozen=True)
class Explanation:
    """The neurons of each of some facts, each fact by itself."""

    facts: tuple[Fact, ...]
    ensembles: tuple[NeuronEnsemble, ...]
    """The ensemble that each fact alone would have."""
    strongest: tuple[tuple[tuple[Neuron, float], ...], ...]
    """For each fact its strongest neurons, in the order in which they are selected (``score_scale``), with their attributions."""

    def collisions(self) -> list[list[float]]:
        """``[i][j]``: the share of fact ``i``'s neurons that fact ``j`` has, too. The diagonal is 1."""
        sets = [ensemble.members() for ensemble in self.ensembles]
        return [[len(own & other) / len(own) for other in sets] for own in sets]

    def hubs(self) -> list[tuple[Neuron, int]]:
        """Neurons that more than one fact has, with the number of facts, most shared first."""
        counted = Counter(neuron for ensemble in self.ensembles for neuron in ensemble.members())
        return sorted(((neuron, n) for neuron, n in counted.items() if n > 1), key=lambda item: (-item[1], item[0]))


def explain(model: nn.Module, tokenizer, requests: Sequence[Mapping], hparams: KNEHyperParams) -> Explanation:
    """Attributes every request (or reads its scores from the cache) and keeps the neurons of each that an edit on it alone would train.

    Raises what `localize` raises, and ValueError for a fact of which no neuron has a positive score.
    """
    found = Localization(model, tokenizer, requests, hparams)
    found.compute()
    ensembles, strongest = [], []
    for fact in found.facts:
        scores = {target.template: next(found.scores(target, [fact])) for target in found.targets}
        try:
            ensembles.append(found.ensemble([fact], scores))
        except ValueError as error:
            raise ValueError(f"{fact.prompt!r} -> {fact.target!r}: {error}") from error
        members = []
        for target in found.targets:
            own = scores[target.template].flatten()
            ranks, places = scaled(scores[target.template], hparams.score_scale).flatten().topk(min(TOP, own.numel()))
            for rank, place in zip(ranks.tolist(), places.tolist()):
                neuron = (target.template, target.layers[place // target.n_neurons], place % target.n_neurons)
                members.append((rank, neuron, own[place].item()))
        strongest.append(tuple((neuron, value) for _, neuron, value in sorted(members, key=lambda item: -item[0])[:TOP]))
    return Explanation(tuple(found.facts), tuple(ensembles), tuple(strongest))


def save_explanation(found: Explanation, folder: Path, hparams: KNEHyperParams) -> None:
    """Writes ``explanation.json`` and ``explanation.png`` into ``folder``."""
    from kne_easyedit.plots import draw_explanation

    content = {
        "model": str(hparams.model_name),
        "p": hparams.p,
        "score_scale": hparams.score_scale,
        "steps": hparams.attribution_steps,
        "quadrature": hparams.quadrature,
        "facts": [
            {
                "prompt": fact.prompt,
                "target_new": fact.target,
                "neurons": ensemble.size,
                "neurons_per_layer": ensemble.counts(),
                "rows": ensemble.neurons,
                "strongest": [{"module": t, "layer": layer, "neuron": row, "attribution": value} for (t, layer, row), value in best],
            }
            for fact, ensemble, best in zip(found.facts, found.ensembles, found.strongest)
        ],
        "collisions": {"meaning": "[i][j]: share of fact i's neurons that fact j has, too", "shares": found.collisions()},
        "hubs": [{"module": t, "layer": layer, "neuron": row, "facts": count} for (t, layer, row), count in found.hubs()],
    }
    atomic_write(folder / "explanation.json", json.dumps(content, indent=1) + "\n")
    draw_explanation(found, folder / "explanation.png", f"{hparams.model_name}: neurons of {len(found.facts)} facts, top {hparams.p:.0%} of each")


def print_explanation(found: Explanation, examples: int = 5) -> None:
    """Layers and strongest neurons of the first facts, the worst collisions, the most shared neurons."""
    for i, (fact, ensemble, best) in enumerate(zip(found.facts[:examples], found.ensembles, found.strongest)):
        print(f"\n[{i}] {fact.prompt}  ->  {fact.target}: {ensemble.size} neurons")
        for template, counts in ensemble.counts().items():
            top = sorted(counts.items(), key=lambda item: -item[1])[:6]
            print(f"    {template}: " + ", ".join(f"layer {layer}: {count}" for layer, count in top if count) + " ...")
        print("    strongest: " + ", ".join(f"{_short(neuron)} {value:.3f}" for neuron, value in best[:5]))
    if len(found.facts) > examples:
        print(f"\n... and {len(found.facts) - examples} facts more (in explanation.json)")
    if len(found.facts) == 1:
        return
    shares = found.collisions()
    pairs = sorted(((shares[i][j], i, j) for i in range(len(shares)) for j in range(len(shares)) if i != j), reverse=True)
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
    text = f"{fact.prompt} -> {fact.target}"
    return text if len(text) <= 48 else f"{text[:45]}..."
