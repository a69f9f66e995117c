"""General ability by EleutherAI's lm-evaluation-harness (the extra ``ability``), on a model that is loaded already."""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, TypedDict

import numpy
import torch

from kne_easyedit._util.files import expand_path
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.facts.readers import data_digest

EXTRA = "ability"
_FILES = (".yaml", ".yml")


class Score(TypedDict):
    """One figure of a task."""

    value: float
    """In the metric's own unit: accuracies are shares in [0, 1]."""
    stderr: float | None
    """As the harness estimates it; None where it does not."""


def require_tasks(tasks: Sequence[str]) -> None:
    """Checks tasks before any model is loaded.

    Args:
        tasks: Names of the harness's tasks, groups or tags, or YAML files of its format.

    Raises:
        ImportError: The harness is not installed; the message names the extra.
        FileNotFoundError: There is no such file.
        ValueError: A task is unknown, or named twice.
    """
    if twice := sorted({task for task in tasks if list(tasks).count(task) > 1}):
        raise ValueError(f"ability: {twice[0]!r} is named twice")
    if not find_spec("lm_eval"):
        raise ImportError(
            f"ability: {', '.join(tasks)} needs lm-evaluation-harness: pip install 'kne_easyedit[{EXTRA}]'"
        )
    for task in filter(is_file, tasks):
        if not expand_path(task).is_file():
            raise FileNotFoundError(f"ability: {expand_path(task)} does not exist; expected a task's YAML file")
    if names := [task for task in tasks if not is_file(task)]:
        known = _manager(tasks).all_tasks
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                raise ValueError(f"ability: lm-evaluation-harness has no task {name!r}{hint}")


def identity(tasks: Sequence[str], limit: int | None) -> list:
    """What scores depend on beside the model: the harness, the tasks (files by their content), the limit."""
    named = [data_digest(expand_path(task)) if is_file(task) else task for task in tasks]
    return [version("lm_eval"), named, limit]


def ability(model: Any, tokenizer: Tokenizer, tasks: Sequence[str], limit: int | None = None) -> dict[str, Score]:
    """The scores of a model on some tasks of the harness.

    The model is asked as it is in memory, edits included; no second copy is made. Neither the tokenizer nor the state
    of a random number generator is changed.

    Args:
        model: A model of transformers.
        tokenizer: Of the model.
        tasks: As for `require_tasks`.
        limit: Documents of a task at most; None: all.

    Returns:
        ``TASK/METRIC`` (with ``/FILTER``, if the task has one) -> its score; groups have those that they aggregate.

    Raises:
        ValueError: A task cannot be loaded, or has no figures; the message names the tasks.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=1),
                tasks=[str(expand_path(task)) if is_file(task) else task for task in tasks],
                task_manager=_manager(tasks),
                limit=limit,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except (FileNotFoundError, KeyError) as error:
            raise ValueError(f"ability: {', '.join(tasks)}: {error}") from error
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
    scores = _scores({**found["results"], **found.get("groups", {})}) if found else {}
    if not scores:
        raise ValueError(f"ability: {', '.join(tasks)}: the harness gave no figures")
    return scores


def _scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Score]:
    """The harness's ``{task: {"METRIC,FILTER": value, "METRIC_stderr,FILTER": value}}`` by ``TASK/METRIC``."""
    scores: dict[str, Score] = {}
    for task, figures in results.items():
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            name = f"{task}/{metric}" if kind == "none" else f"{task}/{metric}/{kind}"
            scores[name] = {"value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return scores


def is_file(task: str) -> bool:
    """Whether a task is named by a file of its own."""
    return task.lower().endswith(_FILES)


def _manager(tasks: Sequence[str]) -> Any:
    """The harness's index: the folders of the files that are named, and its own tasks only if one is asked for."""
    folders = dict.fromkeys(str(expand_path(task).parent) for task in tasks if is_file(task))
    return _index(tuple(folders), not all(map(is_file, tasks)))


@cache
def _index(folders: tuple[str, ...], defaults: bool) -> Any:
    """Kept, for the harness reads thousands of files for it."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders) or None, include_defaults=defaults)
