"""Whether the methods of a plan can serve one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kne_easyedit.bridge.together import require_one_separator, wanted_of_the_run
from kne_easyedit.doctor.findings import WARNING, Finding, failure

NAME = "settings"


def together(plan: Mapping[str, Any]) -> Iterator[Finding]:
    """Reports settings that exclude each other, and warns of those that only a certain kind of run obeys.

    Args:
        plan: Label of a method -> its hyperparameters.
    """
    try:
        require_one_separator(plan)
    except ValueError as error:
        yield failure(NAME, error)
    for message in wanted_of_the_run(plan, "single", False):
        text, _, way_out = message.partition("; ")
        yield Finding(NAME, WARNING, f"a run of single edits in plain prompts refuses these: {text}", way_out)
