"""The paper's four studies (sections 4.3 to 4.6) as values: what is swept, in which series, each point's settings.

A point is a label and overrides of the benchmark's configuration: its job is one of `config.job_of`, and its results
are lines like all others. A label is ``METHOD-SERIES@VALUE``; of a further draw of facts or rows it is
``METHOD-SERIES.DRAW@VALUE``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from kne_easyedit.benchmark.labels import POINT

THIRDS = ("first third", "middle third", "last third")


@dataclass(frozen=True)
class Study:
    """One study of the paper: what is swept, and the paper's claim."""

    name: str
    title: str
    section: str
    """Of the paper."""
    axis: str
    """What is swept, in words, with its unit."""
    claim: str
    """The paper's, in one sentence."""
    series: Mapping[str, str]
    """Part of a label -> what it means; up to a comma it is the name in a picture."""
    logarithmic: bool = True
    named: bool = False
    """Whether the values are names, not numbers."""
    draws: int = 1
    """How many draws of facts or rows a point has, if nothing else is asked for."""


STUDIES = {
    study.name: study
    for study in (
        Study(
            "location",
            "Where knowledge sits",
            "4.3",
            "module of a decoder layer, alone",
            "down_proj best overall; gate, up and q best for locality and fluency",
            {
                "rows": "same number of rows",
                "parameters": "same number of parameters",
                "depth": "a third of the layers, same number of rows",
            },
            logarithmic=False,
            named=True,
        ),
        Study(
            "facts",
            "How many facts localise it",
            "4.4",
            "facts localised on",
            "200 facts are as good as all, more begin to conflict",
            {"facts": "localised facts"},
            draws=3,
        ),
        Study(
            "share",
            "How many rows are needed",
            "4.5",
            "share p of the rows",
            "more rows: success and portability up, locality down",
            {
                "share": "localised",
                "random": "random rows, as many of each layer",
                "step": "one step, gradient times activation",
                "magnitude": "largest weights, no fact seen",
            },
        ),
        Study(
            "batch",
            "How many facts fit into one edit",
            "4.6",
            "facts",
            "batches: success and portability fall steeply, then level off; locality rises, then falls; fluency rises",
            {"batch": "in one edit", "sequence": "in a row, all asked at the end"},
        ),
    )
}
STUDY_OF = {series: study for study in STUDIES.values() for series in study.series}
"""Part of a label -> the study that it is of."""
_LABEL = re.compile(rf"(.+)-({'|'.join(STUDY_OF)})(?:\.([1-9]\d*))?{re.escape(POINT)}(.+)", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """What a label says: method, series, draw and value of a point."""

    method: str
    series: str
    draw: int
    value: str

    @property
    def study(self) -> Study:
        """The study that it is of."""
        return STUDY_OF[self.series]

    @property
    def label(self) -> str:
        """The label of the point's job."""
        draw = f".{self.draw}" if self.draw > 1 else ""
        return f"{self.method}-{self.series}{draw}{POINT}{self.value}"


def place_of(label: str) -> Place | None:
    """What the label of a study's point says; None for any other label."""
    found = _LABEL.fullmatch(label)
    return Place(found[1], found[2], int(found[3] or 1), found[4]) if found else None


@dataclass(frozen=True)
class Point:
    """One job of a study, as overrides of the configuration (`configured`)."""

    place: Place
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of ``method.settings``."""
    localization: Mapping[str, Any] = field(default_factory=dict)
    """Of ``data.localization``."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    records: int | None = None
    """In place of ``data.records``, if it is another number."""

    def configured(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of the point's job; ``base`` stays as it is."""
        found = deepcopy(dict(base))
        found["method"] |= {"label": self.place.label, "settings": {**base["method"]["settings"], **self.settings}}
        found["data"]["localization"] |= self.localization
        found["evaluation"] |= self.evaluation
        if self.records is not None:
            found["data"]["records"] = self.records
        return found
