"""Checks of the software: packages, EasyEdit, and the patches of EasyEdit."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from kne_easyedit import bridge
from kne_easyedit.bridge import patches
from kne_easyedit.bridge.fluency import PUNKT
from kne_easyedit.doctor.findings import FAILURE, OK, WARNING, Finding, failure


def packages() -> Iterator[Finding]:
    """Checks the packages that setup.cfg requires, and those that some of EasyEdit's methods need."""
    try:
        wanted = requires("kne_easyedit") or []
    except PackageNotFoundError:
        yield Finding(
            "packages",
            WARNING,
            "kne_easyedit is not installed: nothing says which versions it needs",
            "pip install -e .",
        )
        return
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, wanted):
        name, marker, supported = requirement.name, requirement.marker, requirement.specifier
        extra = marker is not None and not marker.evaluate({"extra": ""})
        if extra and marker is not None and not marker.evaluate({"extra": "easyedit"}):
            continue
        try:
            installed = version(name)
        except PackageNotFoundError:
            # Whether this plan needs it, the trial shows.
            yield Finding(
                "packages",
                WARNING if extra else FAILURE,
                f"{name} is not installed",
                f"pip install '{name}{supported}'",
            )
            continue
        if not supported.contains(installed, prereleases=True):
            yield Finding(
                "packages",
                FAILURE,
                f"{name} {installed} is not supported, {supported} is",
                f"pip install '{name}{supported}'",
            )
        elif supported:
            found.append(f"{name} {installed} ({supported})")
    yield Finding("packages", OK, ", ".join(found))


def easyedit() -> Iterator[Finding]:
    """Reports which EasyEdit this is, its patches, and how it splits words for the fluency metric."""
    try:
        bridge.register()
        found = bridge.describe()
    except (ImportError, ValueError, RuntimeError) as error:
        yield failure("EasyEdit", error)
        return
    yield Finding("EasyEdit", OK, f"{found['kind']} {found['version']} in {bridge.locate()}")
    for patch in patches.report():
        off = patch.state == patches.SWITCHED_OFF
        text, way_out = f"{patch.state}: {patch.fault}", f"take it out of {patches.OFF}" if off else ""
        yield Finding(f"patch {patch.name}", WARNING if off else OK, text, way_out)
    try:
        variant = bridge.fluency_variant()
    except (ImportError, RuntimeError) as error:
        yield failure("fluency", error)
        return
    if variant == PUNKT:
        yield Finding("fluency", OK, "nltk's punkt data is there")
    else:
        text = (
            f"nltk's punkt data is not there, words are split without it ({variant}): "
            f"never mix with figures that had it"
        )
        yield Finding("fluency", WARNING, text, "python -m nltk.downloader punkt_tab")
