"""Localise: facts in, ensemble out, through the score cache. Done once a model and reused for every edit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from tqdm import tqdm

from kne_easyedit.attribution import attribute_facts
from kne_easyedit.batching import Fact, demand_length, encode_request
from kne_easyedit.cache import ScoreCache
from kne_easyedit.ensemble import NeuronEnsemble, aggregate, select_ensemble
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.layout import Target, resolve_target
from kne_easyedit.records import load_requests

logger = logging.getLogger(__name__)

_ENSEMBLES: WeakKeyDictionary[nn.Module, dict[tuple, NeuronEnsemble]] = WeakKeyDictionary()
"""Loaded model -> settings -> ensemble. By object, not by weights: sequential edits change the weights, but the
neurons are those that were found in the model as it came."""


def find_ensemble(model: nn.Module, tokenizer, requests: Sequence[Mapping], hparams: KNEHyperParams) -> NeuronEnsemble:
    """The ensemble that ``hparams`` ask for: read from a file, localised on a data file, or on ``requests``.

    With ``localization_data`` set it is computed once for each loaded model and then reused, through sequential
    edits too (`forget` ends that); with neither set it depends on ``requests`` and on the weights as they are.
    """
    if hparams.ensemble is not None:
        return NeuronEnsemble.load(hparams.ensemble)
    if hparams.localization_data is None:
        return localize(model, tokenizer, requests, hparams)
    settings = (
        *hparams.target_modules, *hparams.layers, hparams.p, hparams.attribution_steps, hparams.aggregation,
        hparams.localization_data, hparams.localization_size,
    )  # fmt: skip
    found = _ENSEMBLES.setdefault(model, {})
    if settings not in found:
        facts = load_requests(hparams.localization_data, hparams.localization_size)
        if len(facts) < hparams.localization_size:
            logger.warning(
                "localization_size: %s wanted, %s holds %s facts", hparams.localization_size, hparams.localization_data, len(facts)
            )
        found[settings] = localize(model, tokenizer, facts, hparams)
    return found[settings]


def forget(model: nn.Module) -> None:
    """Forgets the ensembles found in ``model``: the next edit localises on its weights as they are now."""
    _ENSEMBLES.pop(model, None)


def localize(model: nn.Module, tokenizer, requests: Sequence[Mapping], hparams: KNEHyperParams) -> NeuronEnsemble:
    """Eq. 3-7 on ``requests``: attributes each (or reads its scores from the cache), aggregates, selects.

    Interrupted at any moment, it resumes where it was: every fact is stored as soon as it is done.
    """
    targets = [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]
    facts = [encode_request(tokenizer, request) for request in requests]
    for fact in facts:
        demand_length(fact, model.config)
    cache = ScoreCache(hparams.cache_dir, model)
    scores = {target.template: aggregate(score_facts(model, target, facts, hparams, cache), hparams.aggregation)[0] for target in targets}
    seconds = sum(cache.seconds(target, hparams.attribution_steps, fact) for target in targets for fact in facts)
    return select_ensemble(scores, hparams.p, layers=targets[0].layers, aggregation=hparams.aggregation, facts=len(facts), seconds=seconds)


def score_facts(model: nn.Module, target: Target, facts: Sequence[Fact], hparams: KNEHyperParams, cache: ScoreCache) -> Iterator[Tensor]:
    """The scores ``(layers, d2)`` of each fact in turn, with progress for those that are not in the cache."""
    steps = hparams.attribution_steps
    missing = sum(not cache.path(target, steps, fact).is_file() for fact in facts)
    cache.demand_space(missing, target)
    for fact in tqdm(facts, desc=f"localise {target.template.rsplit('.', 1)[-1]}", unit="fact", disable=not missing):
        scores = cache.get(target, steps, fact)
        if scores is None:
            start = time.perf_counter()
            scores = attribute_facts(model, target, [fact], steps, chunk_rows=hparams.chunk_rows)[0]
            cache.put(target, steps, fact, scores, time.perf_counter() - start)
        yield scores
