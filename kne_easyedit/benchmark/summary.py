"""Figures of a method from the lines of its records."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from kne_easyedit.metrics import summarize_metrics

METRICS = {
    "edit_success": "share of the new answer's tokens that the edited model predicts, the right ones before it given",
    "exact_match": "share of records whose free greedy answer begins with the new answer",
    "portability": "as edit_success, for what follows from the edit: aliases, reasoning, inverse relations",
    "locality": "share of predicted tokens that the edit left as they were, on unrelated facts",
    "fluency": "entropy of the 2- and 3-grams of free text (EasyEdit's ngram_entropy x 100); near the unedited model's is good",
    "seconds_per_edit": "time to compute and write one edit, median; localisation, second moments and evaluation apart",
}


def summarize(lines: Sequence[dict]) -> dict[str, float | None]:
    """The figures of one method from its lines: those of `summarize_metrics`, exact match (percent), seconds per edit (median), peak memory.

    None where no line has one.
    """
    figures = summarize_metrics([line["metrics"] for line in lines])
    exact = _mean(line.get("exact_match") for line in lines)
    seconds = [line["seconds"] for line in lines if line.get("seconds") is not None]
    peaks = [line["peak_bytes"] for line in lines if line.get("peak_bytes") is not None]
    return {
        **figures,
        "exact_match": None if exact is None else 100 * exact,
        "seconds_per_edit": median(seconds)
        if seconds
        else None,  # a first edit warms up, a machine may pause: not the mean
        "peak_bytes": max(peaks, default=None),
    }


def retention(lines: Sequence[dict]) -> list[dict]:
    """A sequential run's facts evaluated again: one entry for each number of edits after which that was done."""
    counts = sorted({line["after"] for line in lines})
    return [{"edits": count, **_retained([line for line in lines if line["after"] == count])} for count in counts]


def _retained(lines: Sequence[dict]) -> dict:
    figures = summarize_metrics([line["metrics"] for line in lines])
    return {name: figures[name] for name in ("edit_success", "portability", "locality", "records")}


def _mean(values) -> float | None:
    values = [value for value in values if value is not None]
    return fmean(values) if values else None
