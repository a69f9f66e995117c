"""What a run knows before its first edit: its records, its methods' settings and ensembles, and their fingerprints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from kne_easyedit import bridge
from kne_easyedit._util.settings import replace_settings, resolve_paths
from kne_easyedit.benchmark.bad_records import usable_records
from kne_easyedit.benchmark.general import Examination
from kne_easyedit.benchmark.job import (
    Run,
    base_fingerprint,
    fingerprint,
    record_digest,
    seedless,
    settings_digest,
    with_own_seed,
)
from kne_easyedit.benchmark.probes import Asked, choose
from kne_easyedit.benchmark.result_line import LineHead, is_readable, line_head
from kne_easyedit.bridge import patches
from kne_easyedit.bridge.methods import NAME as KNE
from kne_easyedit.facts.encoding import SEPARATOR
from kne_easyedit.facts.records import with_chat_template
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.localization.localizer import find_ensemble
from kne_easyedit.models.fingerprint import model_digest


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to edit. Labels of methods are keys."""

    job: Run
    model_name: str
    weights: str
    """Digest of the model's parameters."""
    variant: str
    """Of EasyEdit's fluency metric."""
    requests: list[dict]
    """The records that can be edited, in the chat template if the run asks for it."""
    records: dict[int, str]
    """Number of a record -> digest of its content."""
    asked: dict[int, Asked]
    """Number of a record -> what is asked of it beside EasyEdit's probes."""
    examination: Examination
    """What is measured of the model beside its facts; with absolute paths."""
    base: list
    """`job.base_fingerprint`."""
    hparams: dict[str, Any]
    """Copies of the job's, with absolute paths."""
    ensembles: dict[str, NeuronEnsemble]
    """Of KNE and its variants; a variant that localises on each edit's own request has none."""
    localization: dict[str, dict]
    """Description of the ensembles for manifest and summary."""
    fingerprints: dict[str, str]
    settings: dict[str, str]
    """The fingerprints without the seed."""

    def head(self, method: str, request: Mapping[str, Any]) -> LineHead:
        """The head of a line of this run."""
        return line_head(
            fingerprint=self.fingerprints[method],
            settings=self.settings[method],
            method=method,
            index=request["index"],
            record=self.records[request["index"]],
        )

    def has(self, line: Mapping[str, Any]) -> bool:
        """Whether a line, of whatever file, is of this run's settings and records."""
        method, index = line.get("method"), line.get("index")
        if not isinstance(method, str) or not isinstance(index, int) or not is_readable(line):
            return False
        same_settings = self.fingerprints.get(method) == line.get("fingerprint")
        if not same_settings or self.records.get(index) != line.get("record"):
            return False
        # Other facts in the data file make other neighbours. A retention line does not name them.
        asked = [neighbour.prompt for neighbour in self.asked[index].neighbours]
        return line.get("neighbours") is None or [its.get("prompt") for its in line["neighbours"]] == asked


def prepare(job: Run) -> PreparedRun:
    """Everything that a run needs before its first edit; KNE's localisation, too, so that no edit pays for it.

    Args:
        job: A valid run (`Run.validate`). Complaints about records that cannot be edited are added to it.

    Raises:
        ValueError: If no record can be edited, or for settings that this EasyEdit cannot follow.
        BadRecord: For a record that cannot be edited, if such records are not to be skipped.
    """
    bridge.register()
    job = with_own_seed(job, job.seed)
    weights, variant = model_digest(job.model), bridge.fluency_variant()
    if job.separator != SEPARATOR and "evaluation-separator" not in patches.applied():
        raise ValueError(
            f"separator: {job.separator!r} reaches EasyEdit's evaluators by the patch evaluation-separator, "
            f"which {patches.OFF} switches off"
        )
    in_template = [with_chat_template(request, job.tokenizer) for request in job.requests if job.chat_template]
    requests = usable_records(job, in_template or job.requests)
    base, of_any_seed = (base_fingerprint(its, weights, variant) for its in (job, seedless(job)))
    hparams = {method: _own_settings(job, its) for method, its in job.hparams.items()}
    ensembles, localization = _localize(job, hparams)
    asked = choose(job)
    keys = {index: its.key for index, its in asked.items()}
    usable = {request["index"] for request in requests}
    left_out = sorted({request["index"] for request in job.requests} - usable)
    fingerprints, settings = {}, {}
    for method in hparams:
        ensemble = ensembles.get(method)
        fingerprints[method] = fingerprint(job, method, base, ensemble, keys, left_out)
        settings[method] = settings_digest(job, method, of_any_seed, ensemble, left_out)
    return PreparedRun(
        job,
        model_name=str(next(iter(job.hparams.values())).model_name),
        weights=weights,
        variant=variant,
        requests=requests,
        records={request["index"]: record_digest(request) for request in requests},
        asked=asked,
        examination=job.examination.resolved(),
        base=base,
        hparams=hparams,
        ensembles=ensembles,
        localization=localization,
        fingerprints=fingerprints,
        settings=settings,
    )


def _own_settings(job: Run, hparams: Any) -> Any:
    """A copy, so that the caller's stays as it is; paths are resolved before EasyEdit works in another folder."""
    if hparams.alg_name == KNE:
        own = replace_settings(hparams, use_chat_template=job.chat_template)
    else:
        own = deepcopy(hparams)
    resolve_paths(own)
    return own


def _localize(job: Run, hparams: Mapping[str, Any]) -> tuple[dict[str, NeuronEnsemble], dict[str, dict]]:
    """The ensembles of KNE and its variants, and a description of each."""
    ensembles: dict[str, NeuronEnsemble] = {}
    described: dict[str, dict] = {}
    for method, its in hparams.items():
        if its.alg_name != KNE:
            continue
        if its.ensemble is None and its.localization_data is None:
            described[method] = {"facts": None, "note": "every edit localises on its own request"}
            continue
        start = time.perf_counter()
        ensemble = ensembles[method] = find_ensemble(job.model, job.tokenizer, [], its, job.workers, job.jobs)
        seconds = time.perf_counter() - start
        described[method] = {
            "facts": ensemble.facts,
            "seconds": seconds,
            "seconds_per_fact": ensemble.seconds / ensemble.facts
            if ensemble.seconds is not None and ensemble.facts
            else None,
            "neurons": ensemble.size,
            "parameter_share": ensemble.parameter_share(job.model),
            "neurons_per_layer": {
                template: {str(layer): n for layer, n in found.items()} for template, found in ensemble.counts().items()
            },
        }
    return ensembles, described
