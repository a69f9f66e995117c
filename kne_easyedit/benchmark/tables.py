"""The numbers of a report: means, intervals, and differences of KNE to the other methods over the same records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean

from kne_easyedit.benchmark.collect import Collection, records_of, seeds_of
from kne_easyedit.benchmark.intervals import Interval, interval, paired
from kne_easyedit.benchmark.summary import summarize
from kne_easyedit.metrics import begins_with, by_category, summarize_metrics

SECTIONS = ("portability", "locality")
"""The figures that are means over categories."""
QUALITY = ("edit_success", "exact_match", "portability", "locality", "fluency")
SHORT = {"edit_success": "ES", "exact_match": "EM", "portability": "PORT", "locality": "LOC", "fluency": "FLU"}


def figures(found: Collection) -> dict:
    """All numbers of the report: data set -> method -> figures, intervals, and each KNE variant's lead over it."""
    result: dict = {}
    for data in found.data_sets:
        result[data] = {"no edit": summarize(unedited(found, data))}
        for method in found.methods:
            if lines := found.of(data, method):
                result[data][method] = {
                    **summarize(lines),
                    "records": records_of(lines),
                    "seeds": seeds_of(lines),
                    "categories": {
                        section: {name: fmean(its) for name, its in found_in.items()}
                        for section, found_in in categories(lines).items()
                    },
                    "intervals": {name: _plain(mean(lines, name)) for name in QUALITY},
                    "lead_of": {
                        ours: {name: _plain(lead(found, data, ours, method, name)) for name in QUALITY}
                        for ours in rivals(found, data, method)
                    },
                }
    return result


def categories(lines: Sequence[Mapping]) -> dict[str, dict[str, list[float]]]:
    """Section (portability, locality) -> category -> one figure a line that has it."""
    return {section: by_category([line["metrics"] for line in lines], section) for section in SECTIONS}


def category_records(lines: Sequence[Mapping], section: str) -> dict[str, int]:
    """Category of a section -> how many records have it."""
    found: dict[str, set[str]] = {}
    for line in lines:
        for name in by_category([line["metrics"]], section):
            found.setdefault(name, set()).add(line["record"])
    return {name: len(records) for name, records in found.items()}


def unedited(found: Collection, data: str) -> list[dict]:
    """Lines of the model before any edit, over the records of all methods. They have no locality: it is measured against them."""
    once = {line["record"]: line for line in found.lines if line["data"] == data}
    return [
        {
            "metrics": {"post": line["metrics"].get("pre") or {}},
            "exact_match": float(begins_with(line.get("before") or "", line.get("target_new") or "")),
        }
        for line in once.values()
    ]


def baselines_mean(found: Collection, data: str, name: str) -> float | None:
    """The mean of a figure over the methods that are not KNE; None for fewer than two."""
    values = [
        summarize(lines)[name] for method in found.methods if not is_kne(method) and (lines := found.of(data, method))
    ]
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if len(values) > 1 else None


def per_record(lines: Sequence[Mapping], name: str) -> dict[tuple, float]:
    """A figure of every line that has it, in percent (fluency: entropy x 100), by record, its number and seed."""
    values = {}
    for line in lines:
        value = (
            100 * line["exact_match"]
            if name == "exact_match" and "exact_match" in line
            else summarize_metrics([line["metrics"]]).get(name)
        )
        if value is not None:
            values[line["record"], line["index"], line.get("seed")] = value
    return values


def mean(lines: Sequence[Mapping], name: str) -> Interval | None:
    """The mean of a figure over the records that have it, with its interval; None if there are none."""
    values = per_record(lines, name)
    return interval(list(values.values()), [record for record, *_ in values])


def is_kne(method: str) -> bool:
    """Whether a label is KNE's or that of a variant of it."""
    return method == "KNE" or method.startswith("KNE-")


def rivals(found: Collection, data: str, method: str) -> list[str]:
    """KNE and its variants that have lines of this data set, the method itself apart."""
    return [ours for ours in found.methods if is_kne(ours) and ours != method and found.of(data, ours)]


def lead(found: Collection, data: str, ours: str, method: str, name: str) -> Interval | None:
    """The figure of ``ours`` minus that of ``method``, over the records that both have; None if there are none."""
    return paired(per_record(found.of(data, ours), name), per_record(found.of(data, method), name), lambda key: key[0])


def _plain(value: Interval | None) -> dict | None:
    return None if value is None else asdict(value)
