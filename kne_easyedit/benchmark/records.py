"""The lines of a report without the texts of the data: published beside it, read again by `kne report`.

So a report grows by methods that are run later or elsewhere, and others compare with it over the same records.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.markdown_report import ANSWERS
from kne_easyedit.benchmark.neighbour_report import PROMPTS
from kne_easyedit.benchmark.neighbour_report import RECORDS as WITH_NEIGHBOURS
from kne_easyedit.benchmark.result_line import TEXTS_OF_DATA
from kne_easyedit.benchmark.tables import shares_before_edit


def record_lines(found: Collection) -> Iterator[dict[str, Any]]:
    """The lines of a report, each with its figures, and with texts only where the report shows them.

    Args:
        found: The report's lines.

    Yields:
        Fields of a `ResultLine`, those that are None left out; by data set, method, seed and number of the record.
    """
    answers, neighbours = (
        {id(line) for data in found.data_sets for its in found.first_records(data, *shown) for line in its.values()}
        for shown in (("after", ANSWERS), ("neighbours", WITH_NEIGHBOURS))
    )
    for line in sorted(found.lines, key=lambda its: (its["data"] or "", its["method"], its["seed"] or 0, its["index"])):
        figures = {name: value for name, value in line.items() if name not in TEXTS_OF_DATA}
        texts: dict[str, Any] = {}
        if id(line) in answers | neighbours:
            texts = {name: line[name] for name in ("prompt", "target_new", "before", "after")}
        if id(line) in neighbours:
            texts["neighbours"] = [_shown(its) for its in (line["neighbours"] or ())[:PROMPTS]]
        whole = {**figures, **shares_before_edit(line), **texts}
        yield {
            name: list(value) if isinstance(value, array) else value
            for name, value in whole.items()
            if value is not None
        }


def _shown(neighbour: Mapping[str, Any]) -> dict[str, str]:
    return {name: neighbour[name] for name in ("prompt", "before", "after")}
