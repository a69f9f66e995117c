"""What a model can do beside its facts, before an edit and after it: the perplexity of a text, and general ability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import expand_path
from kne_easyedit.benchmark.ability import Score, ability, identity, is_file, require_tasks
from kne_easyedit.benchmark.perplexity import perplexity, read_text
from kne_easyedit.facts.encoding import Tokenizer


class General(TypedDict):
    """The figures of a model in one state; None for what is not measured."""

    perplexity: float | None
    ability: dict[str, Score] | None


NOTHING: General = {"perplexity": None, "ability": None}


@dataclass(frozen=True)
class Examination:
    """What is measured of a model beside its facts; false if it is nothing."""

    text: str | Path | None = None
    """A text file whose perplexity is taken."""
    tasks: Sequence[str] = ()
    """Of lm-evaluation-harness (`ability.require_tasks`)."""
    limit: int | None = None
    """Documents of a task at most; None: all."""

    def __bool__(self) -> bool:
        return self.text is not None or bool(self.tasks)

    def resolved(self) -> Examination:
        """The same with absolute paths: EasyEdit works in another folder."""
        text = None if self.text is None else expand_path(self.text)
        return Examination(
            text, tuple(str(expand_path(its)) if is_file(its) else its for its in self.tasks), self.limit
        )

    def require(self) -> None:
        """Checks everything that can be checked without a model.

        Raises:
            ValueError, FileNotFoundError, ImportError: As `perplexity.read_text` and `ability.require_tasks`; or the
                limit is out of range.
        """
        if self.limit is not None and (self.limit < 1 or not self.tasks):
            why = "must be at least 1" if self.tasks else "belongs to tasks, and none is named"
            raise ValueError(f"ability_limit: {self.limit} {why}")
        if self.text is not None:
            read_text(self.text)
        if self.tasks:
            require_tasks(self.tasks)

    def identity(self) -> list:
        """What the figures depend on beside the model; files count by their content."""
        return [
            None if self.text is None else digest(read_text(self.text)),
            identity(self.tasks, self.limit) if self.tasks else None,
        ]

    def described(self) -> dict[str, Any]:
        """The same for a manifest, by names."""
        return {
            "perplexity": None if self.text is None else str(self.text),
            "ability": [str(task) for task in self.tasks],
            "ability_limit": self.limit,
        }

    def of(self, model: Any, tokenizer: Tokenizer) -> General:
        """The figures of a model as it is in memory.

        Raises:
            ValueError: As `perplexity.perplexity` and `ability.ability`.
        """
        return {
            "perplexity": None if self.text is None else perplexity(model, tokenizer, read_text(self.text)),
            "ability": ability(model, tokenizer, self.tasks, self.limit) if self.tasks else None,
        }


def is_general(found: object) -> bool:
    """Whether it is a `General`, as a file holds it."""
    return isinstance(found, dict) and found.keys() == NOTHING.keys()


def general_rows(before: General, after: General) -> list[tuple[str, str, str]]:
    """A table of three columns: what was measured, before, after.

    Args:
        before: Of the unedited model.
        after: Of the edited one, by the same examination.
    """
    rows = []
    if before["perplexity"] is not None:
        rows.append(("perplexity", _number(before["perplexity"]), _number(after["perplexity"])))
    scores = [its["ability"] or {} for its in (before, after)]
    names = dict.fromkeys([*scores[0], *scores[1]])
    return rows + [(name, *(_score(its.get(name)) for its in scores)) for name in names]  # type: ignore[misc]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"


def _score(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score['value']:.3f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.3f}")
