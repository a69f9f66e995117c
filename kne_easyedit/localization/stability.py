"""Localisation on a set of facts, and how stable its choice of neurons is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kne_easyedit.facts.encoding import Fact, Tokenizer
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.localization.localizer import Localization
from kne_easyedit.localization.settings import LocalizationSettings
from kne_easyedit.models.targets import count_parameters


@dataclass(frozen=True)
class Study:
    """What `study` found."""

    ensemble: NeuronEnsemble
    scores: Mapping[str, Tensor]
    """Template -> aggregated scores ``(layers, d2)``."""
    halves: tuple[NeuronEnsemble, NeuronEnsemble] | None
    """The ensembles of every other fact and of the rest; None if a half has no ensemble."""
    computed: int
    """Facts that were not in the cache."""
    seconds: float
    """How long it took this time, computing and reading the cache."""
    parameter_share: float
    """Share of the model's parameters that are in the ensemble's rows."""
    parameters: int
    """Parameters of the model."""
    model_digest: str
    """Digest of configuration and weights (`model_digest`)."""

    @property
    def stability(self) -> float | None:
        """Overlap of the two halves' ensembles (Dice), in [0, 1]; None without halves."""
        return None if self.halves is None else self.halves[0].overlap(self.halves[1])

    @property
    def chance(self) -> float:
        """Expected overlap of two ensembles of this size with random neurons, in [0, 1]."""
        drawn = {t: sum(map(len, layers.values())) for t, layers in self.ensemble.neurons.items()}
        return (
            sum(n * n / (self.ensemble.widths[t] * len(self.ensemble.layers)) for t, n in drawn.items())
            / self.ensemble.size
        )


def study(
    model: nn.Module,
    tokenizer: Tokenizer,
    requests: Sequence[Mapping | Fact],
    hparams: LocalizationSettings,
    workers: int = 1,
) -> Study:
    """Localises on ``requests``, and on two halves of them for the stability.

    All three are aggregated in one pass: the score cache is read once, and the three aggregates are held in memory.

    Args:
        model: A causal language model; it is left as it is.
        tokenizer: Its tokenizer.
        requests: Mappings with ``prompt`` and ``target_new``, or encoded facts.
        hparams: The settings.
        workers: Processes that attribute side by side.

    Returns:
        What was found.

    Raises:
        ValueError: As `localize`.
        FloatingPointError: As `localize`.
        OSError: As `localize`.
    """
    start = time.perf_counter()
    found = Localization(model, tokenizer, requests, hparams)
    parts = (slice(None, None, 2), slice(1, None, 2)) if len(found.facts) > 1 else ()
    scores, *of_halves = found.aggregate(slice(None), *parts, workers=workers)
    ensemble = found.select(scores)
    try:
        halves = (found.select(of_halves[0]), found.select(of_halves[1])) if of_halves else None
    except ValueError:  # a half without any positive score
        halves = None
    seconds = time.perf_counter() - start
    return Study(
        ensemble,
        scores.values,
        halves,
        found.computed,
        seconds,
        ensemble.parameter_share(model),
        count_parameters(model),
        found.cache.model_digest,
    )
