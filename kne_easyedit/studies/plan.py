"""Plans a study of the paper on a model and its data: what they cannot fill is known before the first edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kne_easyedit.benchmark.config import hparams_of, shard_of
from kne_easyedit.doctor.structure import structure_of
from kne_easyedit.facts.readers import read_records, same_data
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.models.targets import LinearLayer, find_linear, resolve_target
from kne_easyedit.studies.points import Ground, Plan, plan_study


def plan_for(
    settings: Mapping[str, Any],
    hparams_folder: Path,
    study: str,
    values: Sequence[str] | None = None,
    draws: int | None = None,
    sequences: Sequence[str] | None = None,
    series: Sequence[str] | None = None,
) -> Plan:
    """The points of a study for a configuration.

    Args:
        settings: The configuration, as for `benchmark.config.job_of`.
        hparams_folder: As there.
        study: One of `definitions.STUDIES`.
        values: As for `points.plan_study`, and so are the next.
        draws: As there.
        sequences: As there.
        series: As there.

    Raises:
        ValueError: Names the setting, or as `points.plan_study`.
        FileNotFoundError: There is no such file.
    """
    if study == "batch" and shard_of(settings["shard"])[1] > 1:
        raise ValueError(f"shard: {settings['shard']}; batches and sequences need all their records in one job: 0/1")
    ground = ground_of(settings, hparams_folder)
    return plan_study(study, ground, settings["method"]["label"], values, draws, sequences, series)


def ground_of(settings: Mapping[str, Any], hparams_folder: Path) -> Ground:
    """What there is to study: the model's modules, the settings, the facts to localise on, the records. Raises as
    `plan_for`.
    """
    hparams = hparams_of(settings, hparams_folder)
    if not isinstance(hparams, KNEHyperParams):
        raise ValueError(f"method.hparams: {settings['method']['hparams']!r}; the studies are of KNE")
    _, model = structure_of(hparams.model_name)
    for template in hparams.target_modules:
        resolve_target(model, template, hparams.layers)
    data = settings["data"]
    first, there = data["offset"], len(read_records(data["file"]))
    if not 0 <= first < there:
        raise ValueError(f"data.offset: {first} out of range; {data['file']} has {there} records")
    records = there - first if data["records"] is None else min(data["records"], there - first)
    faults = {its.template: _fault(model, its) for its in find_linear(model)}
    localised = hparams.ensemble is None and hparams.localization_data is not None
    return Ground(
        [its for its in find_linear(model) if not faults[its.template]],
        hparams.target_modules,
        hparams.layers,
        hparams.p,
        hparams.score_scale,
        localised,
        _facts(hparams, data["file"], range(first, first + records)) if localised else range(0),
        records,
        [fault for fault in faults.values() if fault],
    )


def _fault(model: nn.Module, its: LinearLayer) -> str | None:
    """Why a linear layer cannot be edited; None if it can."""
    try:
        resolve_target(model, its.template, its.layers)
    except ValueError as error:
        return str(error)
    return None


def _facts(hparams: KNEHyperParams, file: str, edited: range) -> range:
    """Numbers of the facts that may be localised on, from the settings' first one; none that is edited."""
    first = hparams.localization_offset
    there = len(read_records(str(hparams.localization_data)))
    if not same_data(str(hparams.localization_data), file):
        return range(first, there)
    return range(first, edited.start) if first < edited.start else range(max(first, edited.stop), there)


def plan_of(settings: Mapping[str, Any], hparams_folder: Path) -> Plan:
    """The plan of a configuration that names a study (hparams/study). Raises as `plan_for`."""
    study = settings["study"]
    values, sequences, series = (
        None if study[name] is None else [f"{value}" for value in study[name]]
        for name in ("values", "sequences", "series")
    )
    return plan_for(without_study(settings), hparams_folder, study["name"], values, study["draws"], sequences, series)


def job_settings(settings: Mapping[str, Any], hparams_folder: Path) -> dict[str, Any]:
    """The configuration of one job: of a study's point, if it names one.

    Raises:
        ValueError: A study is named, but no point of it; or as `plan_for`.
    """
    if "study" not in settings:
        return dict(settings)
    if settings["study"]["point"] is None:
        raise ValueError("study.point: names no point; give -m (--multirun), which takes all of them")
    plan = plan_of(settings, hparams_folder)
    return plan.point(settings["study"]["point"]).configured(without_study(settings))


def without_study(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as any other job has it: the folders of results do not depend on how a point was named."""
    return {name: value for name, value in settings.items() if name != "study"}
