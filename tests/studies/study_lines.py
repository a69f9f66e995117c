"""Results of studies made by hand: lines whose figures are known, as a run writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy
from made_results import MANIFEST

from kne_easyedit.studies.definitions import place_of

RECORDS = 24
FIELDS = {"ES": "rewrite_acc", "PORT": "portability", "LOC": "locality"}


def line(label: str, index: int, figures: Mapping[str, float], **changes) -> dict:
    """``figures``: ES, PORT, LOC, EM, NBH, BLEED in shares, FLU as an entropy; what is not given is not measured."""
    post = {}
    if "ES" in figures:
        post["rewrite_acc"] = [figures["ES"]]
    if "PORT" in figures:
        post["portability"] = {"R_acc": [figures["PORT"]]}
    if "LOC" in figures:
        post["locality"] = {"L_acc": [figures["LOC"]]}
    if "FLU" in figures:
        post["fluency"] = {"ngram_entropy": figures["FLU"]}
    own = {"EM": "exact_match", "NBH": "neighbourhood", "BLEED": "bleed"}
    return {
        "fingerprint": label,
        "method": label,
        "index": index,
        "record": f"r{index}",
        "data": "test_cf",
        "seed": 42,
        "mode": "single",
        "seconds": 2.0,
        **{field: figures[name] for name, field in own.items() if name in figures},
        "metrics": {"pre": {"rewrite_acc": [0.2], "fluency": {"ngram_entropy": 6.0}}, "post": post},
        **changes,
    }


def write_points(
    folder: Path,
    points: Mapping[str, Mapping[str, float]],
    records: int | Mapping[str, int] = RECORDS,
    noise: float = 0.05,
    modules: Mapping[str, str] | None = None,
    rows: Mapping[str, int] | None = None,
    **changes,
) -> Path:
    """A folder of results: a record differs from a point by a deviation that it has in all points, so that pairing
    cancels it, and by a smaller one.
    """
    rng = numpy.random.default_rng(1)
    for label, means in points.items():
        job = folder / label
        job.mkdir(parents=True)
        count = records if isinstance(records, int) else records[label]
        shared = numpy.random.default_rng(2).normal(0, noise, (count, 16))
        lines = []
        for i in range(count):
            own = rng.normal(0, noise / 10, 16)
            figures = {name: value + shared[i, j] + own[j] for j, (name, value) in enumerate(means.items())}
            lines.append(line(label, i, figures, **changes))
        (job / "results.jsonl").write_text("".join(json.dumps(its) + "\n" for its in lines))
        if modules and (place := place_of(label)):
            found = manifest(label, modules.get(place.value))
            found["localization"][label]["neurons"] = rows.get(label, 20) if rows else 20
            (job / "manifest.json").write_text(json.dumps(found))
    return folder


def manifest(label: str, template: str | None) -> dict:
    return {
        **MANIFEST,
        "methods": {label: {"target_modules": [template]} if template else {}},
        "localization": {label: {"facts": 2, "neurons": 20, "parameter_share": 0.01}},
        "second_moments": {},
    }
