"""The lines of a report without the texts of the data: published beside it, read again by `kne report`.

So a report grows by methods that are run later or elsewhere, and others compare with it over the same records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.markdown_report import ANSWERS
from kne_easyedit.benchmark.neighbour_report import RECORDS as WITH_NEIGHBOURS
from kne_easyedit.benchmark.neighbour_report import shown_neighbours
from kne_easyedit.benchmark.result_line import TEXTS_OF_DATA, ResultLine
from kne_easyedit.benchmark.tables import shares_before_edit
from kne_easyedit.metrics import own_metrics

_FIGURES = tuple(name for name in ResultLine.__annotations__ if name not in TEXTS_OF_DATA)
_SHOWN = ("prompt", "target_new", "before", "after")


def record_lines(found: Collection) -> Iterator[dict[str, Any]]:
    """The lines of a report, each with its figures, and with texts only where the report shows them.

    Args:
        found: The report's lines.

    Yields:
        Fields of a `ResultLine`, those that are None left out, in the order of the lines.
    """
    answered: set[int] = set()
    neighbours: dict[int, list[dict[str, str]]] = {}
    for data in found.data_sets:
        answered.update(id(line) for its in found.first_records(data, "after", ANSWERS) for line in its.values())
        for its in found.first_records(data, "neighbours", WITH_NEIGHBOURS):
            prompts = [neighbour["prompt"] for neighbour in shown_neighbours(its)]
            neighbours |= {id(line): _shown(line["neighbours"] or (), prompts) for line in its.values()}
    added = {metric.path[0] for metric in own_metrics()} - ResultLine.__annotations__.keys()
    figures = (*_FIGURES, *sorted(added))
    for line in found.lines:
        found_in: Mapping[str, Any] = line
        before: Mapping[str, Any] = shares_before_edit(line)
        kept = {name: value for name in figures if (value := before.get(name, found_in.get(name))) is not None}
        if "losses" in kept:
            kept["losses"] = list(kept["losses"])
        if id(line) in answered or id(line) in neighbours:
            kept |= {name: value for name in _SHOWN if (value := found_in[name]) is not None}
        if id(line) in neighbours:
            kept["neighbours"] = neighbours[id(line)]
        yield kept


def _shown(neighbours: Sequence[Mapping[str, Any]], prompts: Sequence[str]) -> list[dict[str, str]]:
    fields = ("prompt", "before", "after")
    return [{name: its[name] for name in fields} for its in neighbours if its["prompt"] in prompts]
