"""The section of a report on what models can do beside their facts: tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kne_easyedit._util.markdown import literal, table_of_rows
from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.summary import scores


def general_parts(found: Collection) -> list[str]:
    """The paragraphs of the section; nothing if no task was asked.

    Args:
        found: The result lines.
    """
    rows = [["data", "task", "*no edit*", "standard error", *map(literal, found.methods)]]
    for data in found.data_sets:
        of = {method: found.of(data, method) for method in found.methods}
        lines = [line for its in of.values() for line in its]
        before = scores(lines, "ability_before")
        after = {method: scores(its, "ability") for method, its in of.items()}
        for task in dict.fromkeys([*before, *(task for its in after.values() for task in its)]):
            values = [before.get(task), *(its.get(task) for its in after.values())]
            shown = ["-" if value is None else f"{value:.3f}" for value in values]
            rows.append([literal(data), literal(task), shown[0], _stderr(lines, task), *shown[1:]])
    if len(rows) == 1:
        return []
    return [
        "## General ability",
        "Tasks of lm-evaluation-harness on the model before any edit and on the edited one, in each metric's own unit:"
        " means over edits, in a sequence after the last. The standard error is the harness's, over the documents of"
        " the task, of the model before; a difference over the same documents is surer than that.",
        table_of_rows(rows),
    ]


def _stderr(lines: Sequence[Mapping], task: str) -> str:
    errors = ((line.get("ability_before") or {}).get(task, {}).get("stderr") for line in lines)
    return next((f"{error:.3f}" for error in errors if error is not None), "-")
