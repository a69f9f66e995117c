"""A trial of a planned run: a few records through every method, and from their times the hours of the run."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from kne_easyedit import bridge
from kne_easyedit._util.settings import replace_settings
from kne_easyedit.bridge.output import easyedit_output
from kne_easyedit.doctor.findings import FAILURE, OK, Finding, duration, left_out, listed
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization.batches import unique_facts
from kne_easyedit.localization.data import localization_requests
from kne_easyedit.localization.localizer import Localization, require_editable_by
from kne_easyedit.models.fingerprint import model_digest
from kne_easyedit.models.loading import load_model
from kne_easyedit.models.state import preserve_rng

RECORDS = 2
"""Records to edit, and facts to localise."""
ONCE = 3
"""A first edit that takes this many times as long as the others has computed what they reuse (second moments, say)."""
SEED = 42
LOG = "output.log"
"""The file of `easyedit_output`."""


@dataclass(frozen=True)
class Times:
    """Seconds of one method, one entry per record: evaluations before the edit, edits, evaluations after it."""

    before: list[float] = field(default_factory=list)
    edit: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    def edits(self, records: int) -> float:
        """The seconds that ``records`` edits will take."""
        first, *others = self.edit
        if others and first > ONCE * fmean(others):
            return first + (records - 1) * fmean(others)
        return records * fmean(self.edit)


def try_out(plan: Mapping[str, Any], folder: Path, requests: Sequence[dict]) -> Iterator[Finding]:
    """Edits, evaluates and undoes the first requests with every method, and estimates the time of all of them.

    One loaded model serves all methods, and must be identical after each edit. Scores that are computed here
    stay in the cache, where the run finds them; nothing else is kept.

    Args:
        plan: Label of a method -> its hyperparameters.
        folder: The folder of the model's files.
        requests: All usable requests of the run.

    Yields:
        One finding per method, and the estimate.
    """
    plan = {label: _anywhere(hparams) for label, hparams in plan.items()}
    with tempfile.TemporaryDirectory() as folder_name, easyedit_output(Path(folder_name)) as quiet, preserve_rng():
        scratch = Path(folder_name)
        try:
            with _logged(quiet, scratch):
                model, tokenizer = load_model(replace_settings(next(iter(plan.values())), model_name=str(folder)))
                weights = model_digest(model)
        except Exception as error:  # noqa: BLE001  (of torch, transformers, safetensors)
            yield _broken("trial", error, scratch)
            return
        localisation = 0.0
        times: dict[str, Times] = {}
        for label, hparams in plan.items():
            try:
                if isinstance(hparams, KNEHyperParams) and hparams.ensemble is None:
                    with _logged(quiet, scratch):
                        hparams, finding, seconds = _localised(model, tokenizer, hparams, requests, scratch)
                    localisation += seconds
                    yield finding
                with _logged(quiet, scratch):
                    times[label] = _tried(model, tokenizer, hparams, requests[:RECORDS], weights)
            except Exception as error:  # noqa: BLE001, PERF203  (EasyEdit's methods raise anything; each method is tried)
                yield _broken(f"trial of {label}", error, scratch)
                if model_digest(model) != weights:
                    yield Finding(
                        f"trial of {label}",
                        FAILURE,
                        "the model is not bit for bit what it was, so that the trial ends here",
                    )
                    return
            else:
                yield Finding(f"trial of {label}", OK, _summary(times[label]))
        if len(times) == len(plan):
            yield _estimate(times, localisation, len(requests))
        else:
            yield left_out("estimate", "a trial has failed")


def _localised(
    model: nn.Module, tokenizer: Tokenizer, hparams: KNEHyperParams, requests: Sequence[dict], scratch: Path
) -> tuple[KNEHyperParams, Finding, float]:
    """Localises on a few facts: settings with the ensemble of these, and the seconds that all others will take.

    Facts that are not in the cache go first; the ensemble has as many rows as that of all facts, only others.
    """
    require_editable_by(model, hparams)
    chosen = requests if hparams.localization_data is None else localization_requests(hparams)
    found = Localization(model, tokenizer, chosen, hparams)
    facts = unique_facts(found.facts)
    missing = [fact for fact in facts if any(found.cache.missing(target, fact) for target in found.targets)]
    found.facts = (missing or facts)[:RECORDS]
    start = time.perf_counter()
    tried = found.compute()
    each = (time.perf_counter() - start) / max(1, tried)
    file = scratch / "ensemble.json"
    found.ensemble().save(file)
    text = f"{len(facts) - len(missing)} of {len(facts)} facts are in the cache"
    if tried:
        text += f", {tried} more since now: {duration(each)} each"
    return (
        replace_settings(hparams, ensemble=str(file)),
        Finding("localisation", OK, text),
        each * (len(missing) - tried),
    )


def _tried(model: nn.Module, tokenizer: Tokenizer, hparams: Any, requests: Sequence[dict], weights: str) -> Times:
    """Raises what the method raises, and RuntimeError if the model has changed when an edit is undone."""
    editor = bridge.MethodEditor(deepcopy(hparams), model, deepcopy(tokenizer))
    editor.require_batch(1)
    evaluate, times = partial(editor.evaluate, generation=True, seed=SEED), Times()
    for request in requests:
        _time(times.before, evaluate, request)
        try:
            _time(times.edit, editor.apply, [request])
            _time(times.after, evaluate, request)
        finally:
            editor.undo()
        if model_digest(model) != weights:
            raise RuntimeError(f"the model is not what it was after record {request['index']} was undone")
    return times


def _time(seconds: list[float], function: Callable[..., Any], *arguments: Any) -> None:
    start = time.perf_counter()
    function(*arguments)
    seconds.append(time.perf_counter() - start)


def _summary(times: Times) -> str:
    edits, evaluations = (" and ".join(map(duration, seconds)) for seconds in (times.edit, times.after))
    return f"edits {edits}, evaluations {evaluations}; undone bit for bit"


def _estimate(times: Mapping[str, Times], localisation: float, records: int) -> Finding:
    parts = {"localisation": localisation} if localisation else {}
    # All methods share the evaluations of the unedited model.
    parts["evaluations before"] = records * fmean(seconds for own in times.values() for seconds in own.before)
    for label, own in times.items():
        parts[f"{label}: edits"] = own.edits(records)
        parts[f"{label}: evaluations"] = records * fmean(own.after)
    in_words = listed({name: duration(seconds) for name, seconds in parts.items()})
    return Finding("estimate", OK, f"about {duration(sum(parts.values()))} for {records} records ({in_words})")


@contextmanager
def _logged(quiet: Callable, scratch: Path) -> Iterator[None]:
    """Output of the context, and nothing earlier, is in the log at its end."""
    os.truncate(scratch / LOG, 0)
    with quiet():
        try:
            yield
        finally:
            sys.stdout.flush()


def _broken(name: str, error: Exception, scratch: Path) -> Finding:
    """A failure with the last lines of EasyEdit's output."""
    output = (scratch / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
    return Finding(name, FAILURE, "\n".join([f"{type(error).__name__}: {error}", *(f"| {line}" for line in output)]))


def _anywhere(hparams: Any) -> Any:
    """The settings with absolute paths: EasyEdit's methods run in a folder of their own, since they write into it.

    A path that does not exist yet stays relative, and is removed with that folder.
    """
    paths = {}
    for name in {f.name for f in dataclasses.fields(hparams)} - {"model_name"}:
        value = getattr(hparams, name)
        if isinstance(value, str) and (name == "cache_dir" or (os.sep in value and Path(value).exists())):
            paths[name] = str(Path(value).expanduser().absolute())
    return replace_settings(hparams, **paths)
