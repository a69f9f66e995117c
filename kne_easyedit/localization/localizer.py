"""Localise: facts in, ensemble out, through the score cache. Done once a model and reused for every edit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from tqdm import tqdm

from kne_easyedit._util.digest import digest
from kne_easyedit._util.interrupts import safe_point
from kne_easyedit._util.workers import run_parallel
from kne_easyedit.attribution.engine import attribute_facts, rows_in_flight
from kne_easyedit.attribution.quadrature import QUADRATURES
from kne_easyedit.attribution.replay import ReplayMismatch, UnsupportedModel
from kne_easyedit.attribution.score_cache import ScoreCache
from kne_easyedit.facts.encoding import Fact, encode_request, require_length
from kne_easyedit.facts.readers import data_digest
from kne_easyedit.facts.records import load_requests
from kne_easyedit.localization.ensemble import NeuronEnsemble, select_ensemble
from kne_easyedit.localization.selection import aggregate
from kne_easyedit.localization.settings import LocalizationSettings
from kne_easyedit.models.editable import require_bare, require_editable
from kne_easyedit.models.targets import Target, resolve_target

logger = logging.getLogger(__name__)

_ENSEMBLES: WeakKeyDictionary[nn.Module, dict[tuple, NeuronEnsemble]] = WeakKeyDictionary()
"""Loaded model -> settings and the facts' tokens -> ensemble. By object, not by weights: sequential edits change the weights, but
the neurons are those that were found in the model as it came."""


def find_ensemble(
    model: nn.Module, tokenizer, requests: Sequence[Mapping], hparams: LocalizationSettings, workers: int = 1
) -> NeuronEnsemble:
    """The ensemble that ``hparams`` ask for: read from a file, localised on a data file, or on ``requests``.

    With ``localization_data`` set it is computed once for each loaded model and then reused, through sequential
    edits too (`forget` ends that), as long as file and tokenizer give the same facts in tokens; with neither set it
    depends on ``requests`` and on the weights as they are. A file is read anew each time. ``workers``: as in `localize`.

    It is for an edit: raises ValueError, before anything is computed, for a model or module that cannot be edited
    (`require_editable_by`). `localize` takes these, too.
    """
    require_editable_by(model, hparams)
    if hparams.ensemble is not None:
        return NeuronEnsemble.load(hparams.ensemble)
    if hparams.localization_data is None:
        return localize(model, tokenizer, requests, hparams)
    data = hparams.localization_data
    facts = list(_requests(data, data_digest(data), hparams.localization_size, hparams.localization_offset))
    encoded = [
        encode_request(tokenizer, fact, hparams.use_chat_template, hparams.separator) for fact in facts
    ]  # the tokenizer is what it makes of them
    settings = (
        *hparams.target_modules,
        *hparams.layers,
        hparams.p,
        hparams.attribution_steps,
        hparams.quadrature,
        hparams.aggregation,
        hparams.score_scale,
        hparams.localization_size,
        digest([(fact.ids, fact.prompt_length) for fact in encoded]),
    )
    found = _ENSEMBLES.setdefault(model, {})
    if settings not in found:
        if len(facts) < hparams.localization_size:
            logger.warning(
                "localization_size: %s wanted, %s holds %s facts",
                hparams.localization_size,
                hparams.localization_data,
                len(facts),
            )
        found[settings] = localize(model, tokenizer, facts, hparams, workers)
    return found[settings]


@lru_cache(maxsize=4)
def _requests(path: str, content: str | None, size: int, offset: int) -> tuple[dict, ...]:
    return tuple(load_requests(path, size, offset))


def localization_requests(hparams: LocalizationSettings) -> list[dict]:
    """The usable facts of ``localization_data`` that the settings ask for."""
    return load_requests(hparams.localization_data, hparams.localization_size, hparams.localization_offset)


def forget(model: nn.Module) -> None:
    """Forgets the ensembles found in ``model``: the next edit localises on its weights as they are now."""
    _ENSEMBLES.pop(model, None)


def inherit(copy: nn.Module, model: nn.Module) -> None:
    """``copy`` was copied from ``model``: what was found in ``model`` holds for it as well."""
    _ENSEMBLES[copy] = dict(_ENSEMBLES.get(model, {}))


def localize(
    model: nn.Module, tokenizer, requests: Sequence[Mapping], hparams: LocalizationSettings, workers: int = 1
) -> NeuronEnsemble:
    """Eq. 3-7 on ``requests``: attributes each (or reads its scores from the cache), aggregates, selects.

    ``workers``: processes that attribute side by side.

    Interrupted at any moment, it resumes where it was: scores are stored as soon as their sweep is done.
    """
    scores = Localization(model, tokenizer, requests, hparams)
    scores.compute(workers)
    return scores.ensemble()


class Localization:
    """The scores of some facts under some settings: in the cache, or computed into it.

    Checks everything (facts, modules, space) when it is built, before anything is computed.
    """

    def __init__(self, model: nn.Module, tokenizer, requests: Sequence[Mapping], hparams: LocalizationSettings):
        self.model, self.hparams = model, hparams
        self.targets = [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]
        self.facts = [
            encode_request(tokenizer, request, hparams.use_chat_template, hparams.separator) for request in requests
        ]
        for fact in self.facts:
            require_length(fact, model.config)
        self.cache = ScoreCache(hparams.cache_dir, model, hparams.attribution_steps, hparams.quadrature)

    def compute(self, workers: int = 1) -> int:
        """Attributes the facts whose scores are not in the cache, with progress; returns how many these were.

        ``workers``: processes that do it side by side (`workers.run_parallel`); the scores come through the cache.
        """
        missing = self._missing(self.facts)
        count = sum(map(len, missing.values()))
        self.cache.require_space(count, *self.targets)
        sweeps = [
            (targets, batch) for layers, facts in missing.items() for targets, batch in self._sweeps(layers, facts)
        ]
        with tqdm(total=count, desc="localise", unit="fact", disable=not count) as progress:
            for done in run_parallel(self._sweep, sweeps, max(1, min(workers, len(sweeps)))):
                progress.update(done)
        return count

    def _sweeps(
        self, layers: Sequence[tuple[int, ...]], facts: Sequence[Fact]
    ) -> Iterator[tuple[list[Target], list[Fact]]]:
        """What is attributed together: targets in their missing layers, and facts."""
        targets = [resolve_target(self.model, t.template, some) for t, some in zip(self.targets, layers) if some]
        rows = self.hparams.chunk_rows or self._rows_in_flight(targets, facts[0])
        points = sum(len(target.layers) for target in targets) * self.hparams.attribution_steps
        yield from ((targets, batch) for batch in batches(facts, points, rows))

    def _sweep(self, sweep: tuple[list[Target], list[Fact]]) -> Iterator[int]:
        """Attributes what of a sweep is still missing: another process may have been here since. Yields its number of facts."""
        safe_point()
        targets, batch = sweep
        todo = [fact for fact in batch if any(self.cache.missing(target, fact) for target in targets)]
        if todo:
            self._attribute(targets, todo)
        yield len(batch)

    def scores(self, target: Target, facts: Sequence[Fact] | None = None) -> Iterator[Tensor]:
        """The scores ``(layers, d2)`` of each fact (of all, if not given) in turn; what the cache has lost is computed again."""
        for fact in self.facts if facts is None else facts:
            safe_point()
            scores = self.cache.get(target, fact)
            yield self._attribute([target], [fact])[0][0] if scores is None else scores

    def aggregate(self, facts: Sequence[Fact] | None = None) -> dict[str, Tensor]:
        """Template -> the aggregated scores ``(layers, d2)`` (section 4.4)."""
        return {
            target.template: aggregate(self.scores(target, facts), self.hparams.aggregation)[0]
            for target in self.targets
        }

    def ensemble(
        self, facts: Sequence[Fact] | None = None, scores: Mapping[str, Tensor] | None = None
    ) -> NeuronEnsemble:
        """Eq. 6-7 on all facts, or on some of them; ``scores``: what `aggregate` gave for these already."""
        facts = self.facts if facts is None else facts
        scores = self.aggregate(facts) if scores is None else scores
        seconds = sum(self.cache.seconds(target, fact) for target in self.targets for fact in unique_facts(facts))
        return select_ensemble(
            scores,
            self.hparams.p,
            layers=self.targets[0].layers,
            aggregation=self.hparams.aggregation,
            facts=len(facts),
            seconds=seconds,
            scale=self.hparams.score_scale,
        )

    def _missing(self, facts: Sequence[Fact]) -> dict[tuple, list[Fact]]:
        """What is to be computed: missing layers of each target -> the facts, each once."""
        found: dict[tuple, list[Fact]] = {}
        for fact in unique_facts(facts):
            safe_point()
            layers = tuple(self.cache.missing(target, fact) for target in self.targets)
            if any(layers):
                found.setdefault(layers, []).append(fact)
        return found

    def _rows_in_flight(self, targets: Sequence[Target], fact: Fact) -> int:
        if self.hparams.attribution_engine != "whole":
            try:
                return rows_in_flight(self.model, targets, fact)
            except ReplayMismatch:
                raise
            except UnsupportedModel:  # `attribute_facts` says so
                pass
        return 1

    def _attribute(self, targets: Sequence[Target], facts: Sequence[Fact]) -> list[Tensor]:
        start = time.perf_counter()
        hparams = self.hparams
        found = attribute_facts(
            self.model,
            targets,
            facts,
            hparams.attribution_steps,
            chunk_rows=hparams.chunk_rows,
            quadrature=QUADRATURES[hparams.quadrature],
            engine=hparams.attribution_engine,
        )
        seconds = (time.perf_counter() - start) / (len(targets) * len(facts))
        for target, of_target in zip(targets, found):
            for fact, scores in zip(facts, of_target):
                self.cache.put(target, fact, scores, seconds)
        return found


def batches(facts: Sequence[Fact], points: int, rows: int) -> Iterator[list[Fact]]:
    """Facts that share sweeps: of equal answer length, so that nothing is padded there, and no more than fill the
    ``rows`` in flight with the ``points`` (paths times steps) that one answer token of one fact has."""
    most = max(1, rows // points)
    for _, alike in groupby(sorted(facts, key=lambda f: (len(f.answer), len(f.ids))), key=lambda f: len(f.answer)):
        alike = list(alike)
        yield from (alike[i : i + most] for i in range(0, len(alike), most))


def unique_facts(facts: Sequence[Fact]) -> list[Fact]:
    """Each fact once. Tokens tell them apart, as in the cache."""
    return list({(fact.ids, fact.prompt_length): fact for fact in facts}.values())


def require_editable_by(model: nn.Module, hparams: LocalizationSettings) -> None:
    """Raises ValueError for a ``model`` that is not bare (`require_bare`), or a module that an edit under ``hparams`` cannot write to."""
    require_bare(model)
    if hparams.ensemble is not None:
        targets = [target for target, _ in NeuronEnsemble.load(hparams.ensemble).targets(model).values()]
    else:
        targets = [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]
    require_editable(model, {name: module for target in targets for name, module in zip(target.names, target.modules)})
