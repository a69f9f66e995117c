"""The neurons of single facts, and which facts share them (collisions)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kne_easyedit.facts.encoding import Fact, Tokenizer
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.localization.localizer import Localization, Scores
from kne_easyedit.localization.selection import Selection
from kne_easyedit.localization.settings import LocalizationSettings

TOP = 10
"""Number of strongest neurons of each fact."""

Neuron = tuple[str, int, int]
"""Template, layer, row."""


@dataclass(frozen=True)
class Explanation:
    """The neurons of some facts, each fact by itself."""

    selection: Selection
    """The rules by which they were chosen; its ``layers`` are those that were attributed."""
    facts: tuple[Fact, ...]
    ensembles: tuple[NeuronEnsemble, ...]
    """The ensemble of each fact alone."""
    strongest: tuple[tuple[tuple[Neuron, float], ...], ...]
    """For each fact its strongest neurons, in the order in which they are selected, with their attributions."""

    def collisions(self) -> list[list[float]]:
        """A square matrix: ``[i][j]`` is the share of fact ``i``'s neurons that fact ``j`` also has, in [0, 1]."""
        sets = [ensemble.members() for ensemble in self.ensembles]
        return [[len(own & other) / len(own) for other in sets] for own in sets]

    def hubs(self) -> list[tuple[Neuron, int]]:
        """Neurons of more than one fact with their numbers of facts, most shared first."""
        counted = Counter(neuron for ensemble in self.ensembles for neuron in ensemble.members())
        return sorted(((neuron, n) for neuron, n in counted.items() if n > 1), key=lambda item: (-item[1], item[0]))


def explain(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Mapping | Fact], hparams: LocalizationSettings
) -> Explanation:
    """The neurons that an edit on each request alone would train, and its strongest ones.

    Args:
        model: A causal language model; it is left as it is.
        tokenizer: Its tokenizer.
        requests: Mappings with ``prompt`` and ``target_new``, or encoded facts.
        hparams: The settings.

    Returns:
        What was found, in the order of ``requests``.

    Raises:
        ValueError: As `localize`; the message names the fact of which no neuron has a positive score.
        FloatingPointError: As `localize`.
        OSError: As `localize`.
    """
    found = Localization(model, tokenizer, requests, hparams)
    ensembles, strongest = [], []
    for fact, scores in zip(found.facts, found.scores()):
        try:
            ensembles.append(found.select(scores))
        except ValueError as error:
            raise ValueError(f"{fact.prompt!r} -> {fact.target!r}: {error}") from error
        strongest.append(_strongest(found, scores))
    return Explanation(found.selection, tuple(found.facts), tuple(ensembles), tuple(strongest))


def _strongest(found: Localization, scores: Scores) -> tuple[tuple[Neuron, float], ...]:
    """The `TOP` neurons of a fact by their scaled scores, with their attributions."""
    ranked = []
    for target in found.targets:
        values = scores.values[target.template]
        own = values.flatten()
        ranks, places = found.selection.scaled(values).flatten().topk(min(TOP, own.numel()))
        for rank, place in zip(ranks.tolist(), places.tolist()):
            neuron = (target.template, target.layers[place // target.n_neurons], place % target.n_neurons)
            ranked.append((rank, neuron, own[place].item()))
    ranked.sort(key=lambda item: -item[0])
    return tuple((neuron, value) for _, neuron, value in ranked[:TOP])
