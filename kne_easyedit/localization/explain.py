"""Which neurons stand for a fact, and which facts fight for the same ones: the collision table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kne_easyedit.facts.encoding import Fact
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.localization.localizer import Localization
from kne_easyedit.localization.selection import scaled
from kne_easyedit.localization.settings import LocalizationSettings

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


def explain(model: nn.Module, tokenizer, requests: Sequence[Mapping], hparams: LocalizationSettings) -> Explanation:
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
        strongest.append(
            tuple((neuron, value) for _, neuron, value in sorted(members, key=lambda item: -item[0])[:TOP])
        )
    return Explanation(tuple(found.facts), tuple(ensembles), tuple(strongest))
