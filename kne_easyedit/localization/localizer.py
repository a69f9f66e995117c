"""Localise: facts in, ensemble out, through the score cache. Two functions do it: `find_ensemble` and `localize`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from tqdm import tqdm

from kne_easyedit._util.digest import digest
from kne_easyedit._util.interrupts import safe_point
from kne_easyedit._util.workers import run_parallel
from kne_easyedit.attribution.engine import attribute_facts, rows_in_flight
from kne_easyedit.attribution.replay import ReplayMismatch, UnsupportedModel
from kne_easyedit.attribution.score_cache import ScoreCache
from kne_easyedit.facts.encoding import Fact, Tokenizer
from kne_easyedit.localization.batches import Sweep, batches, tokens_of, unique_facts
from kne_easyedit.localization.data import encode_facts, localization_requests
from kne_easyedit.localization.ensemble import NeuronEnsemble, select_ensemble
from kne_easyedit.localization.named import MAGNITUDE, named_ensemble, named_targets
from kne_easyedit.localization.selection import Selection
from kne_easyedit.localization.settings import LocalizationSettings
from kne_easyedit.models.editable import require_bare, require_editable
from kne_easyedit.models.targets import Target, resolve_target

logger = logging.getLogger(__name__)


PAUSE = 0.2
"""Seconds until facts that another process has claimed are looked at again."""


@dataclass(frozen=True)
class _Key:
    """All that the ensemble of a loaded model depends on."""

    selection: Selection
    target_modules: tuple[str, ...]
    attribution_steps: int
    quadrature: str
    localization_size: int
    facts: str
    """Digest of their tokens: it identifies data file and tokenizer."""


_ENSEMBLES: WeakKeyDictionary[nn.Module, dict[_Key, NeuronEnsemble]] = WeakKeyDictionary()
"""The ensembles of each loaded model. By object, not by weights: sequential edits change the weights, but the neurons
stay those that were found in the model as it was loaded."""


def find_ensemble(
    model: nn.Module,
    tokenizer: Tokenizer,
    requests: Sequence[Mapping | Fact],
    hparams: LocalizationSettings,
    workers: int = 1,
    jobs: int = 1,
) -> NeuronEnsemble:
    """The ensemble for an edit under ``hparams``: from a file, localised on a data file, or localised on ``requests``.

    With ``localization_data`` set it is computed once for each loaded model and then reused, also through sequential
    edits (`forget` ends that), as long as file and tokenizer give the same facts in tokens. With neither that nor
    ``ensemble`` set it depends on ``requests`` and on the weights as they are. An ensemble file is read each time; rows
    by the size of their weights (`named.MAGNITUDE`) are found once, too.

    Args:
        model: A causal language model; it is left as it is.
        tokenizer: Its tokenizer.
        requests: What is edited, as requests or as encoded facts. Used only where neither file is set.
        hparams: The settings.
        workers: Processes that attribute side by side.
        jobs: See `Localization`.

    Returns:
        The ensemble.

    Raises:
        ValueError: The model or a module cannot be edited (`require_editable_by`), before anything is computed; a file
            or fact cannot be used; no neuron has a positive score.
        UnsupportedModel: The layers cannot be replayed, and ``attribution_engine`` is ``sweep``.
        ReplayMismatch: They give other results than the model itself.
        FloatingPointError: Scores are not finite.
        OSError: A file or the score cache cannot be read or written.
    """
    require_editable_by(model, hparams, beside=True)
    if hparams.ensemble is not None:
        if hparams.ensemble != MAGNITUDE:
            return named_ensemble(model, hparams)
        key = _Key(hparams.selection, tuple(hparams.target_modules), 0, "", 0, MAGNITUDE)
        found = _ENSEMBLES.setdefault(model, {})
        if key not in found:
            found[key] = named_ensemble(model, hparams)
        return found[key]
    if hparams.localization_data is None:
        return localize(model, tokenizer, requests, hparams)
    facts = encode_facts(model, tokenizer, localization_requests(hparams), hparams)
    key = _Key(
        hparams.selection,
        tuple(hparams.target_modules),
        hparams.attribution_steps,
        hparams.quadrature,
        hparams.localization_size,
        digest([tokens_of(fact) for fact in facts]),
    )
    found = _ENSEMBLES.setdefault(model, {})
    if key not in found:
        if len(facts) < hparams.localization_size:
            logger.warning(
                "localization_size: %s wanted, %s holds %s facts",
                hparams.localization_size,
                hparams.localization_data,
                len(facts),
            )
        found[key] = localize(model, tokenizer, facts, hparams, workers, jobs)
    return found[key]


def forget(model: nn.Module) -> None:
    """Forgets the ensembles found in ``model``: the next edit localises on its weights as they are now.

    Args:
        model: A loaded model; one that nothing was found in is no error.
    """
    _ENSEMBLES.pop(model, None)


def inherit(copy: nn.Module, model: nn.Module) -> None:
    """Reuses the ensembles found in ``model`` for ``copy``, which was copied from it."""
    _ENSEMBLES[copy] = dict(_ENSEMBLES.get(model, {}))


def localize(
    model: nn.Module,
    tokenizer: Tokenizer,
    requests: Sequence[Mapping | Fact],
    hparams: LocalizationSettings,
    workers: int = 1,
    jobs: int = 1,
) -> NeuronEnsemble:
    """Eq. 3-7: attributes each request (or reads its scores from the cache), aggregates, selects.

    Interrupted at any moment, it resumes where it stopped: scores are stored as soon as their sweep is done.

    Args:
        model: A causal language model; it is left as it is.
        tokenizer: Its tokenizer.
        requests: Mappings with ``prompt`` and ``target_new``, or encoded facts.
        hparams: The settings.
        workers: Processes that attribute side by side.
        jobs: See `Localization`.

    Returns:
        The ensemble.

    Raises:
        ValueError: A request or module cannot be used, or no neuron has a positive score.
        UnsupportedModel: The layers cannot be replayed, and ``attribution_engine`` is ``sweep``.
        ReplayMismatch: They give other results than the model itself.
        FloatingPointError: Scores are not finite.
        OSError: The score cache cannot be read or written.
    """
    return Localization(model, tokenizer, requests, hparams, jobs).ensemble(workers)


@dataclass(frozen=True)
class Scores:
    """The scores of one fact, or of several facts aggregated to one."""

    values: Mapping[str, Tensor]
    """Template -> ``(layers, d2)``, in probability."""
    facts: int
    seconds: float
    """How long they took when they were computed; each fact counts once."""


class Localization:
    """The scores of some facts under some settings, read from the cache or computed into it.

    In a warm run each entry of the cache is read once, however many aggregates it is part of: `aggregate`
    adds it to all of them in one pass. In memory are one fact's scores and the aggregates, not the scores of all facts.

    Any number of processes may do so at once, on one machine or on many that share the cache: each fact is attributed
    by one of them, the others wait for its scores. Those of a process that was killed go to another one.

    Args:
        model: A causal language model; it is left as it is.
        tokenizer: Its tokenizer.
        requests: Mappings with ``prompt`` and ``target_new``, or encoded facts.
        hparams: The settings.
        jobs: How many processes elsewhere are expected to do so at once, this one included: sweeps have so few facts
            that each gets a part.

    Raises:
        ValueError: A request or module cannot be used; nothing has been computed yet.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        requests: Sequence[Mapping | Fact],
        hparams: LocalizationSettings,
        jobs: int = 1,
    ) -> None:
        self.model, self.hparams, self.jobs = model, hparams, jobs
        self.targets = [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]
        self.selection = replace(hparams.selection, layers=self.targets[0].layers)
        self.facts = encode_facts(model, tokenizer, requests, hparams)
        self.cache = ScoreCache(hparams.cache_dir, model, hparams.attribution_steps, hparams.quadrature)
        self.computed = 0
        """Facts that this process and its workers have attributed."""
        self._complete = False

    def compute(self, workers: int = 1, start: int = 0) -> int:
        """Attributes the facts whose scores are not in the cache, with a progress bar.

        Args:
            workers: Processes that do it side by side (`run_parallel`); the scores come through the cache.
            start: The facts before this one are known to be in the cache.

        Returns:
            The number of facts that were attributed.

        Raises:
            OSError: The cache cannot be read or written, or has no space for all of them.
        """
        missing = self._missing(self.facts[start:])
        count = sum(map(len, missing.values()))
        self.cache.require_space(count, *self.targets)
        sweeps = [
            Sweep(tuple(targets), tuple(batch))
            for layers, facts in missing.items()
            for targets, batch in self._sweeps(layers, facts, workers * self.jobs)
        ]
        before = self.computed
        with tqdm(total=count, desc="localise", unit="fact", disable=not count) as progress:
            claimed_elsewhere = self._attribute_all(sweeps, max(1, min(workers, len(sweeps))), progress)
            while claimed_elsewhere:
                progress.set_postfix_str("the last ones are done by other processes")
                waiting = len(claimed_elsewhere)
                claimed_elsewhere = self._attribute_all(claimed_elsewhere, 1, progress)
                if len(claimed_elsewhere) == waiting:
                    time.sleep(PAUSE)
        self._complete = True
        return self.computed - before

    def scores(self, workers: int = 1) -> Iterator[Scores]:
        """The scores of each fact in turn.

        An entry of the cache is read as its turn comes. At the first fact that has none, all missing scores are
        computed (`compute`), for which the entries that follow are read once more. Scores that the cache has lost
        since then are computed again.
        """
        for i, fact in enumerate(self.facts):
            safe_point()
            entries = [self.cache.entry(target, fact) for target in self.targets]
            if not self._complete and any(e is None or e.missing(t) for e, t in zip(entries, self.targets)):
                self.compute(workers, i)
                entries = [self.cache.entry(target, fact) for target in self.targets]
            values, seconds = {}, 0.0
            for target, entry in zip(self.targets, entries):
                if entry is None or entry.missing(target):
                    values[target.template] = self._attribute([target], [fact])[0][0]
                    entry = self.cache.entry(target, fact)
                else:
                    values[target.template] = entry.scores_of(target)
                seconds += 0.0 if entry is None else entry.seconds
            yield Scores(values, 1, seconds)

    def aggregate(self, *parts: slice, workers: int = 1) -> list[Scores]:
        """The aggregated scores (section 4.4) of all facts, or of several parts of them in one pass.

        Args:
            parts: Slices of the list of facts; none: one of all facts.
            workers: As in `compute`.

        Returns:
            The aggregate of each part.

        Raises:
            ValueError: A part holds no fact.
        """
        members = [range(len(self.facts))[part] for part in parts or (slice(None),)]
        totals = [{target.template: self.selection.running() for target in self.targets} for _ in members]
        seconds: list[dict[tuple, float]] = [{} for _ in members]
        for i, (fact, scores) in enumerate(zip(self.facts, self.scores(workers))):
            for part, total, spent in zip(members, totals, seconds):
                if i in part:
                    spent[tokens_of(fact)] = scores.seconds
                    for template, values in scores.values.items():
                        total[template].add(values)
        return [
            Scores({template: one.result() for template, one in total.items()}, len(part), sum(spent.values()))
            for part, total, spent in zip(members, totals, seconds)
        ]

    def select(self, scores: Scores) -> NeuronEnsemble:
        """Eq. 6-7 on scores of these facts. Raises ValueError if none is positive."""
        return select_ensemble(scores.values, self.selection, facts=scores.facts, seconds=scores.seconds)

    def ensemble(self, workers: int = 1) -> NeuronEnsemble:
        """Eq. 3-7 on all facts. Raises ValueError if no score is positive."""
        (scores,) = self.aggregate(workers=workers)
        return self.select(scores)

    def _sweeps(
        self, layers: Sequence[tuple[int, ...]], facts: Sequence[Fact], processes: int
    ) -> Iterator[tuple[list[Target], list[Fact]]]:
        """What is attributed together: targets in their missing layers, and facts."""
        targets = [resolve_target(self.model, t.template, some) for t, some in zip(self.targets, layers) if some]
        rows = self.hparams.chunk_rows or self._rows_in_flight(targets, facts[0])
        points = sum(len(target.layers) for target in targets) * self.hparams.attribution_steps
        yield from ((targets, batch) for batch in batches(facts, points, rows, processes))

    def _attribute_all(self, sweeps: Sequence[Sweep], workers: int, progress: tqdm) -> list[Sweep]:
        """Attributes what no other process has claimed; returns the other sweeps."""
        left = dict.fromkeys(sweeps)
        for number, attributed in run_parallel(self._sweep, list(enumerate(sweeps)), workers):
            self.computed += attributed
            progress.update(len(sweeps[number].facts))
            del left[sweeps[number]]
        return list(left)

    def _sweep(self, numbered: tuple[int, Sweep]) -> Iterator[tuple[int, int]]:
        """Attributes what other processes have not stored meanwhile.

        Yields:
            The sweep's number and the number of facts that were attributed; nothing if another process is at them.
        """
        safe_point()
        number, sweep = numbered
        with self.cache.claim(sweep.targets, sweep.facts) as ours:
            if not ours:
                return
            todo = [f for f in sweep.facts if any(self.cache.missing(target, f) for target in sweep.targets)]
            if todo:
                self._attribute(sweep.targets, todo)
        yield number, len(todo)

    def _missing(self, facts: Sequence[Fact]) -> dict[tuple, list[Fact]]:
        """Missing layers of each target -> the facts that lack them, each once."""
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
            quadrature=hparams.quadrature,
            engine=hparams.attribution_engine,
        )
        seconds = (time.perf_counter() - start) / (len(targets) * len(facts))
        for target, of_target in zip(targets, found):
            for fact, scores in zip(facts, of_target):
                self.cache.put(target, fact, scores, seconds)
        return found


def require_editable_by(model: nn.Module, hparams: LocalizationSettings, beside: bool = False) -> None:
    """Checks that an edit under ``hparams`` can be written to ``model``, or trained beside its weights.

    Raises:
        ValueError: The model is not bare (`require_bare`), or a module of the edit cannot be written to
            (`require_editable`).
    """
    require_bare(model)
    if hparams.ensemble is not None:
        targets = [target for target, _ in named_targets(model, hparams)]
    else:
        targets = [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]
    modules = {name: module for target in targets for name, module in zip(target.names, target.modules)}
    require_editable(model, modules, beside)
