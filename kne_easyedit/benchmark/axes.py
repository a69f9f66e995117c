"""The axes of sweeps that reports know: jobs of one label that differ in these settings alone are points of a curve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kne_easyedit._util.digest import digest
from kne_easyedit.benchmark.labels import POINT, curve_of
from kne_easyedit.bridge.methods import NAME as KNE


@dataclass(frozen=True)
class Axis:
    """One setting that is swept."""

    name: str
    """In words."""
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    """``(manifest, settings of the method)`` -> value; None where there is none."""
    settings: tuple[str, ...]
    """Paths of the configuration (hparams/benchmark.yaml) that set it."""
    shown: Callable[[Any], str] = str


def _modules(templates: Sequence[str]) -> str:
    """The modules' own names."""
    return "+".join(str(template).rpartition(".")[2] for template in templates)


AXES = (
    Axis("p, the share of the rows", lambda _, its: its.get("p"), ("method.settings.p",), lambda value: f"{value:g}"),
    Axis(
        "facts localised on",
        lambda _, its: its.get("localization_size"),
        ("method.settings.localization_size", "data.localization.size"),
    ),
    Axis("facts an edit", lambda manifest, _: manifest.get("batch_size"), ("evaluation.batch_size",)),
    Axis("module", lambda _, its: its.get("target_modules"), ("method.settings.target_modules",), _modules),
)
"""Where several differ, the first is the curve's axis, and the values of the others are part of its name. Seeds need
none: lines of several are one point, with intervals over records."""
_OWN = ("p", "localization_size", "target_modules", "cache_dir", "stats_dir", "chunk_rows")
"""Settings of a method that may differ between points: those of axes, and those without effect."""
_OF_RUN = ("mode", "retention_every", "chat_template", "neighbours", "contradiction", "general", "fluency_variant")
"""Entries of a manifest that must not."""


@dataclass(frozen=True)
class Sweep:
    """A label whose jobs are points of curves."""

    label: str
    axes: tuple[Axis, ...]
    """Those in which its jobs differ, in the order of `AXES`."""

    def point(self, manifest: Mapping[str, Any]) -> str:
        """The label of a job's point."""
        first, *others = (its.shown(its.read(manifest, manifest["methods"][self.label])) for its in self.axes)
        return "-".join([self.label, *others]) + POINT + first


def sweeps(manifests: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Sweep]:
    """The labels that are swept, by the manifests of their jobs.

    A label is, if its jobs on one data set have different settings, and differ in axes alone.

    Args:
        manifests: Name of a data set, and the manifest of a job.

    Returns:
        Label -> the sweep.
    """
    jobs: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for data, manifest in manifests:
        for label in manifest["methods"]:
            jobs.setdefault(label, {}).setdefault(data, []).append(manifest)
    found = {}
    for label, by_data in jobs.items():
        differing: set[int] = set()
        alike = True
        for own in by_data.values():
            values = [[axis.read(its, its["methods"][label]) for axis in AXES] for its in own]
            differing |= {i for i in range(len(AXES)) if any(its[i] != values[0][i] for its in values)}
            alike = alike and len({_beside_axes(label, its) for its in own}) == 1
        if differing and alike and all(_readable(label, its, differing) for own in by_data.values() for its in own):
            found[label] = Sweep(label, tuple(AXES[i] for i in sorted(differing)))
    return found


def renamed(manifest: Mapping[str, Any], labels: Mapping[str, str], swept: Mapping[str, Sweep]) -> dict[str, Any]:
    """A manifest in which methods have other labels; ``curves`` says of those that are points what was swept.

    Args:
        manifest: The manifest.
        labels: Label -> the new one; others stay.
        swept: Label -> the sweep that it is a point of.
    """
    of_methods = ("methods", "fingerprints", "settings", "localization", "second_moments")
    curves = {curve_of(point): swept[label].axes[0].name for label, point in labels.items()}
    return {
        name: {labels.get(label, label): its for label, its in value.items()} if name in of_methods else value
        for name, value in manifest.items()
    } | ({"curves": curves} if curves else {})


def is_axis(path: str, job: Mapping[str, Any]) -> bool:
    """Whether a setting of the configuration, by its path, is one of an axis; but for batches they are KNE's alone."""
    own = job["method"]["hparams"] == KNE
    return any(path in axis.settings for axis in AXES) and (own or path.startswith("evaluation."))


def _readable(label: str, manifest: Mapping[str, Any], axes: Iterable[int]) -> bool:
    """Whether the manifest has values of these axes that a label can hold."""
    for i in axes:
        value = AXES[i].read(manifest, manifest["methods"][label])
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        names = isinstance(value, list) and bool(value) and all(isinstance(its, str) for its in value)
        if not (names if AXES[i].shown is _modules else number):
            return False
    return True


def _beside_axes(label: str, manifest: Mapping[str, Any]) -> str:
    """Digest of all that points of a curve must share."""
    own = {name: value for name, value in manifest["methods"][label].items() if name not in _OWN}
    environment = {name: its for name, its in manifest["environment"].items() if name not in ("platform", "cpus")}
    of_run = [manifest.get(name) for name in _OF_RUN]
    return digest([own, environment, of_run, manifest["model"]["sha256"], manifest["easyedit"]["version"]])
