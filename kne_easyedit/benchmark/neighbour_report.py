"""The part of a report about neighbours: what was asked of them, and what they answered before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kne_easyedit._util.markdown import literal, table_of_rows
from kne_easyedit.benchmark.answers import begins_with, up_to_stop
from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.result_line import ResultLine

RECORDS, PROMPTS = 3, 4
"""How many records of each data set are shown, and neighbours of each."""


def neighbour_parts(found: Collection) -> list[str]:
    """The paragraphs of the section; nothing if no line has neighbours.

    Args:
        found: The result lines.
    """
    if not any(line["neighbours"] for line in found.lines):
        return []
    asked = [line["probes"] or len(line["neighbours"] or ()) for line in found.lines]
    least, most = min(filter(None, asked)), max(asked)
    return [
        "## Neighbours before and after",
        "Prompts of an edit's relation about other subjects, which it should leave alone: "
        f"{most if least == most else f'{least} to {most}'} a record, from the record itself or made of other facts;"
        " none of them trained. Free greedy answers up to their first end of a sentence or line;"
        " **bold** where one begins with the new answer.",
        _answers(found),
    ]


def shown_neighbours(lines: Mapping[str, ResultLine]) -> Sequence[Mapping[str, Any]]:
    """The neighbours of a record that the report shows: of the first of its lines (`Collection.first_records`)."""
    return (next(iter(lines.values()))["neighbours"] or ())[:PROMPTS]


def _answers(found: Collection) -> str:
    rows = [["data", "new fact", "neighbour", "before", *map(literal, found.methods)]]
    for data in found.data_sets:
        for lines in found.first_records(data, "neighbours", RECORDS):
            one = next(iter(lines.values()))
            target = one["target_new"] or ""
            after = {m: {its["prompt"]: its["after"] for its in line["neighbours"] or ()} for m, line in lines.items()}
            for i, its in enumerate(shown_neighbours(lines)):
                fact = f"{literal(one['prompt'] or '', 90)} → {literal(target, 40)}"
                answers = [_answer(after.get(method, {}), its["prompt"], target) for method in found.methods]
                head = [literal(data), fact] if i == 0 else ["", ""]
                rows.append([*head, literal(its["prompt"], 90), _shown(its["before"], target), *answers])
    return table_of_rows(rows)


def _answer(answers: Mapping[str, str], prompt: str, target: str) -> str:
    """The answer to a prompt; methods that are localised on other facts may have other neighbours."""
    return _shown(answers[prompt], target) if prompt in answers else "-"


def _shown(answer: str, target: str) -> str:
    text = literal(up_to_stop(answer), 40) or "(nothing)"
    return f"**{text}**" if target and begins_with(answer, target) else text
