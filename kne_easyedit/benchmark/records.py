"""The lines of a report without the texts of the data: published beside it, read again by `kne report`.

So a report grows by methods that are run later or elsewhere, and others compare with it over the same records.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.markdown_report import ANSWERS
from kne_easyedit.benchmark.neighbour_report import RECORDS as WITH_NEIGHBOURS
from kne_easyedit.benchmark.neighbour_report import shown_neighbours
from kne_easyedit.benchmark.result_line import TEXTS_OF_DATA
from kne_easyedit.benchmark.tables import shares_before_edit


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
    for line in found.lines:
        figures = {name: value for name, value in line.items() if name not in TEXTS_OF_DATA}
        texts: dict[str, Any] = {}
        if id(line) in answered or id(line) in neighbours:
            texts = {name: line[name] for name in ("prompt", "target_new", "before", "after")}
            texts["neighbours"] = neighbours.get(id(line))
        whole = {**figures, **shares_before_edit(line), **texts}
        yield {
            name: list(value) if isinstance(value, array) else value
            for name, value in whole.items()
            if value is not None
        }


def _shown(neighbours: Sequence[Mapping[str, Any]], prompts: Sequence[str]) -> list[dict[str, str]]:
    fields = ("prompt", "before", "after")
    return [{name: its[name] for name in fields} for its in neighbours if its["prompt"] in prompts]
