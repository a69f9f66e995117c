"""The report of studies: Markdown, the same as a self-contained HTML page, pictures, all numbers as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.markdown import literal, table_of_rows
from kne_easyedit.benchmark.intervals import FEW, Interval
from kne_easyedit.benchmark.markdown_report import setting, what_was_run
from kne_easyedit.benchmark.publish import page
from kne_easyedit.studies.ensembles import overlap_table, overlaps
from kne_easyedit.studies.figures import draw_study, few_points
from kne_easyedit.studies.findings import Check, checks, findings, named, verdict
from kne_easyedit.studies.numbers import BY_KEY, Cell, Curves, StudyResults, as_rows, ensembles_of


def publish_studies(results: StudyResults, folder: Path, title: str = "The paper's studies") -> Path:
    """Writes ``studies.md``, ``studies.html``, ``studies.json``, ``studies.csv`` and the pictures.

    Args:
        results: The curves.
        folder: Where the files are written.
        title: Of the report.

    Returns:
        The path of the page.

    Raises:
        ImportError: If matplotlib, scipy or markdown-it-py is missing.
    """
    pictures: dict[str, str] = {}
    parts = [f"# {literal(title)}", setting(results.found), _HEAD]
    content = []
    for number, curves in enumerate(results.curves, start=1):
        name = f"{curves.study.name}-{number}.png"  # labels of others are no names of files
        draw_study(curves, folder / name)
        pictures[name] = (
            f"{curves.study.title}: {curves.method} on {curves.data}, means with 95 % intervals over records"
            f"{' and draws' if any(cell.draws > 1 for cell in curves.cells.values()) else ''}."
        )
        of_ensembles = overlaps(ensembles_of(results, curves))
        claim, sentences = checks(curves), findings(curves)
        picture = f"![{literal(pictures[name])}]({name})"
        parts += _section(curves, picture, claim, sentences, of_ensembles)
        content.append(_as_json(curves, claim, sentences, of_ensembles))
    parts += ["## What was run", what_was_run(results.found)]
    text = "\n\n".join(parts) + "\n"
    rows = as_rows(results)
    atomic_write(folder / "studies.md", text)
    html = page(text, title, folder, pictures)
    # On a narrow screen the pictures are scrolled, not shrunk until nobody can read them.
    html = html.replace("<p><img ", '<p class="wide"><img style="min-width: 56rem" ')
    atomic_write(folder / "studies.html", html)
    atomic_write(folder / "studies.json", json.dumps({"studies": content, "points": rows}, indent=1) + "\n")
    atomic_write(folder / "studies.csv", _csv(rows))
    return folder / "studies.html"


_HEAD = (
    f"Means with 95 % bootstrap intervals over records (10,000 resamples); where a point has several draws (of facts,"
    f" rows or seeds), records and draws are both drawn. Differences are paired over the records that both points have."
    f" A point of fewer than {FEW} records is drawn hollow, and nothing is concluded from it. Intervals are not"
    f" corrected for the number of comparisons. Verdicts and sentences are made from the figures."
)


def _section(
    curves: Curves, picture: str, claim: list[Check], sentences: list[str], of_ensembles: list[dict[str, Any]]
) -> list[str]:
    study = curves.study
    parts = [
        f"## {study.title}: {literal(curves.method)} on {literal(curves.data)}",
        f"**The paper (section {study.section}):** {study.claim}. **Here: {verdict(claim)}.**",
        "\n".join(f"- {literal(check.sentence)}" for check in claim),
        picture,
    ]
    if few := few_points(curves):
        parts.append(f"Hollow, for they have fewer than {FEW} records: {literal('; '.join(few))}.")
    if unequal := _unequal_rows(curves):
        parts.append(
            f"Not all have as many rows, for a score that is not positive is never chosen: {literal(unequal)}."
        )
    if study.name == "batch":
        parts.append(
            "Facts of one batch share an edit: an interval over records says what other facts would have given, not"
            " what other batches would have. A sequence's facts are all asked after its last edit."
        )
    if sentences:
        parts += ["What was found:", "\n".join(f"- {literal(sentence)}." for sentence in sentences)]
    parts.append(_table(curves))
    if ability := _ability(curves):
        parts += [
            "General ability, in each metric's own unit (lm-evaluation-harness; of a sequence at its end):",
            ability,
        ]
    if of_ensembles:
        parts += [
            "How alike the ensembles are (Dice: shared rows over the mean number of rows):",
            overlap_table(of_ensembles),
        ]
    return parts


def _unequal_rows(curves: Curves) -> str:
    """The points that were to have the same number of rows and have not; empty if all have, or nobody knows."""
    cells = [cell for name in ("rows", "depth") for cell in curves.of(name) if cell.rows is not None]
    if len({cell.rows for cell in cells}) < 2:
        return ""
    return ", ".join(f"{named(cell)} {cell.rows:.0f}" for cell in cells)


def _table(curves: Curves) -> str:
    keys = curves.keys
    head = ["series", "value", *(BY_KEY[key].short for key in keys), "records", "draws", "rows", "of all parameters"]
    rows = [
        [
            literal(curves.study.series[cell.series]),
            literal(cell.value),
            *(_shown(cell, key) for key in keys),
            str(cell.records),
            str(cell.draws),
            "-" if cell.rows is None else f"{cell.rows:.0f}",
            "-" if cell.share is None else f"{cell.share:.2%}",
        ]
        for cell in curves.cells.values()
    ]
    return table_of_rows([head, *rows])


def _ability(curves: Curves) -> str:
    """The tasks of general ability, a row for each point that was asked; empty if none was."""
    asked = [cell for cell in curves.cells.values() if cell.ability]
    tasks = list(dict.fromkeys([*curves.ability_before, *(task for cell in asked for task in cell.ability)]))
    if not tasks:
        return ""
    before = (curves.ability_before.get(task) for task in tasks)
    rows = [["*no edit*", "", *("-" if value is None else f"{value:.3f}" for value in before)]]
    for cell in asked:
        means = (cell.ability.get(task) for task in tasks)
        shown = ["-" if its is None else its.shown("{:.3f}") for its in means]
        rows.append([literal(curves.study.series[cell.series]), literal(cell.value), *shown])
    return table_of_rows([["series", "value", *map(literal, tasks)], *rows])


def _shown(cell: Cell, key: str) -> str:
    value, note = cell.mean(key), cell.not_finite(key)
    if value is None:
        return note or "-"
    text = f"{value.mean:.2f}" if key == "seconds_per_edit" else value.shown()
    return f"{text} ({note})" if note else text


def _as_json(
    curves: Curves, claim: list[Check], sentences: list[str], of_ensembles: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "study": curves.study.name,
        "section": curves.study.section,
        "data": curves.data,
        "method": curves.method,
        "claim": curves.study.claim,
        "verdict": verdict(claim),
        "checks": [
            {"text": its.text, "verdict": its.verdict, "sign": its.sign, "border": its.border, **_plain(its.interval)}
            for its in claim
        ],
        "findings": sentences,
        "overlap": of_ensembles,
    }


def _plain(value: Interval | None) -> dict[str, Any]:
    return dict.fromkeys(("mean", "low", "high", "records")) if value is None else value.plain()


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
