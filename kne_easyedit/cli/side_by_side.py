"""Answers before and after an edit, printed side by side."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence

from kne_easyedit._util.messages import percent, printable
from kne_easyedit.benchmark.answers import one_line
from kne_easyedit.benchmark.before_after import Question, Questions, Said, kept

FACTS = 3
"""Facts of an edit that are shown with their neighbours."""


def print_questions(
    questions: Questions, before: Mapping[Question, Said], after: Mapping[Question, Said], wanted: int
) -> None:
    """Prints each fact with the probabilities of its new and old answer, and the answers of its neighbours.

    Args:
        questions: What was asked.
        before: What the unedited model has said.
        after: What the edited one says.
        wanted: How many neighbours of each fact were to be asked.
    """
    for fact, neighbours in zip(questions.facts, questions.neighbours):
        assert fact.new is not None  # noqa: S101  (for the type checker: facts have one)
        was, now = before[fact], after[fact]
        print(f"\n{printable(fact.prompt)}  ->  {printable(fact.new.target)}")
        rows = [("", "before", "after"), ("answer", one_line(was.answer), one_line(now.answer))]
        rows.append((f"P({fact.new.target})", percent(was.new), percent(now.new)))
        if fact.old is not None:
            rows.append((f"P({fact.old.target})", percent(was.old), percent(now.old)))
        print_rows(rows)
        if neighbours:
            print("  neighbours, which one fact's edit should leave alone:")
            print_rows(
                [(one.prompt, one_line(before[one].answer), one_line(after[one].answer)) for one in neighbours],
                indent=4,
            )
            same = sum(kept(before[one].answer, after[one].answer) for one in neighbours)
            print(f"  {same} of {len(neighbours)} begin as before")
        elif wanted:
            print("  no neighbours are known: neither the packaged facts nor the model name other subjects")


def print_rows(rows: Sequence[tuple[str, str, str]], indent: int = 2) -> None:
    """Prints three columns, as wide as the terminal; what is longer goes on in the next line."""
    width = max(40, shutil.get_terminal_size((110, 24)).columns) - indent - 6
    first = min(max(len(row[0]) for row in rows), width // 2)
    second = min(max(len(row[1]) for row in rows), (width - first) // 2)
    third = max(8, width - first - second)
    for row in rows:
        cells = [
            textwrap.wrap(printable(text), size) or [""]
            for text, size in zip(row, (max(1, first), max(8, second), third))
        ]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            print(f"{' ' * indent}{parts[0]:<{first}} | {parts[1]:<{second}} | {parts[2]}".rstrip())
