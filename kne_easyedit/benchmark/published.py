"""Results that others have published, quoted in a report beside its own: the paper's, and what has superseded them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from kne_easyedit._util.markdown import table_of_rows
from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.summary import summarize
from kne_easyedit.metrics import paper_metrics


def published() -> list[dict[str, Any]]:
    """The contents of ``published.json``, in the order in which they are to be read.

    Returns:
        One mapping a table: ``source``, ``note`` (what a reader must know before comparing), and ``models``: model ->
        data set -> method -> numbers in the order of `metrics.paper_metrics`.
    """
    return json.loads(files("kne_easyedit.benchmark").joinpath("published.json").read_text(encoding="utf-8"))


def quoted_results(found: Collection) -> str:
    """The published tables as Markdown, each with its source and note; beside a model of the report its own KNE.

    Args:
        found: The results that the report is about.
    """
    ours = {Path(str(manifest["model"]["name"])).name.lower() for manifest in found.manifests}
    return "\n\n".join(part for table in published() for part in _parts(table, found, ours))


def _parts(table: Mapping[str, Any], found: Collection, ours: set[str]) -> Iterator[str]:
    yield f"**{table['source']}.** {table['note']}"
    for model, of_model in table["models"].items():
        same = model.lower() in ours
        where = (
            "the model of this report; records, versions and metrics may still differ"
            if same
            else "**another model and other records than above: not to be compared**"
        )
        yield f"{model} ({where}):\n\n{table_of_rows(_rows(of_model, found, same))}"


def _rows(of_model: Mapping[str, Mapping[str, list[float]]], found: Collection, same: bool) -> list[list[str]]:
    columns = list(dict.fromkeys(method for of_data in of_model.values() for method in of_data))
    rows = [["data", "metric", *columns, *(["our KNE"] if same else [])]]
    for data, of_data in of_model.items():
        lines = found.of(data, "KNE") if same else []
        mine = summarize(lines) if lines else {}
        for i, (metric, column) in enumerate(paper_metrics()):
            quoted = [f"{of_data[method][column]:.2f}" if method in of_data else "-" for method in columns]
            value = mine.get(metric.key)
            own = ["-" if value is None else f"{value:.2f}"] if same else []
            rows.append([data if i == 0 else "", metric.short, *quoted, *own])
    return rows
