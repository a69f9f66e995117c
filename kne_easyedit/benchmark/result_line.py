"""The schema of the lines that a run writes: of ``results.jsonl`` and of ``retention.jsonl``. Built and read only here.

Lines without ``schema_version`` were written before there was one; `parse_result` brings them to the present schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict, cast

from kne_easyedit.benchmark.ability import Score
from kne_easyedit.benchmark.answers import FreeAnswer, begins_with, is_whole
from kne_easyedit.benchmark.checks import LONGEST, is_int, require
from kne_easyedit.benchmark.general import General
from kne_easyedit.benchmark.job import Run
from kne_easyedit.benchmark.neighbourhood import AliasLine, Figures, NeighbourLine
from kne_easyedit.benchmark.unedited import Probabilities, Unedited
from kne_easyedit.metrics import check_metrics, is_number, own_metrics

VERSION = 1
"""Of the schema. It goes up when a field changes its meaning; a field that is only added leaves it as it is."""

_SAID = ("prompt", "subject", "target_new", "before", "after", "answer_before", "answer_after")
TEXTS_OF_DATA = (*_SAID, "neighbours", "aliases")
"""The fields with texts of the data file, and of models."""


class LineHead(TypedDict):
    """The run, method and record of a line."""

    schema_version: int
    fingerprint: str
    """Digest of everything that the method's results depend on, the single record apart."""
    settings: str | None
    """The fingerprint without the seed. None in lines written before it was added."""
    method: str
    """Its label in the run."""
    index: int
    """Number of the record in its file."""
    record: str
    """Digest of the record's content."""


class SharesBefore(TypedDict):
    """Of the unedited model, from 0 to 1. Lines of earlier versions lack these fields: their texts tell them."""

    exact_match_before: float | None
    whole_answer_before: float | None
    bleed_forced_before: float | None


class ResultLine(LineHead, SharesBefore):
    """One record edited by one method. What lines of earlier versions may lack is None there."""

    data: str | None
    """Name of the data file without its ending; in a `Collection` the data set's name."""
    seed: int | None
    mode: str | None
    batch_size: int | None
    chat_template: bool | None
    prompt: str | None
    subject: str | None
    target_new: str | None
    seconds: float | None
    """To compute and write the edit; in a batch, the batch's divided by its size."""
    peak_bytes: int | None
    """Peak memory of the edit above what was held before; measured for a method's first edit only."""
    losses: list[float] | None
    """Of the training steps."""
    before: str | None
    """The free greedy answer of the unedited model."""
    after: str | None
    """The free greedy answer after the edit."""
    exact_match: float | None
    """1.0 if ``after`` begins with ``target_new``, else 0.0."""
    answer_before: str | None
    """The free greedy answer of the unedited model to its natural stop (`answers.FreeAnswer`)."""
    answer_after: str | None
    whole_answer: float | None
    """1.0 if ``answer_after`` is ``target_new`` up to its natural stop, else 0.0."""
    probabilities_before: Probabilities | None
    """Of the whole new and old answer after the prompt."""
    probabilities_after: Probabilities | None
    probes: int | None
    """Number of neighbours that were asked."""
    neighbourhood: float | None
    """This and the next fields: `neighbourhood.Figures`."""
    neighbourhood_free: float | None
    bleed: float | None
    bleed_forced: float | None
    alias_beyond_bleed: float | None
    alias_beyond_bleed_forced: float | None
    neighbours: list[NeighbourLine] | None
    aliases: list[AliasLine] | None
    denial_before: float | None
    denial: float | None
    perplexity_before: float | None
    """Of the run's text (`general.Examination`), by the unedited model. In a sequence the edited model is asked where
    facts edited earlier are: retention lines have it, and a `Collection` puts that of the last here."""
    perplexity: float | None
    ability_before: dict[str, Score] | None
    """Scores of the run's tasks, likewise."""
    ability: dict[str, Score] | None
    metrics: dict[str, Any]
    """EasyEdit's, before (``pre``) and after (``post``) the edit."""


class RetentionLine(LineHead):
    """One record of a sequence evaluated again."""

    after: int
    """Number of edits that had been made."""
    probes: int | None
    """This and the next fields as in a `ResultLine`."""
    neighbourhood: float | None
    neighbourhood_free: float | None
    bleed: float | None
    bleed_forced: float | None
    perplexity: float | None
    """This and the next field as in a `ResultLine`."""
    ability: dict[str, Score] | None
    metrics: dict[str, Any]
    """EasyEdit's, after them (``post``)."""


def line_head(*, fingerprint: str, settings: str, method: str, index: int, record: str) -> LineHead:
    """The head of a line of the present schema."""
    return {
        "schema_version": VERSION,
        "fingerprint": fingerprint,
        "settings": settings,
        "method": method,
        "index": index,
        "record": record,
    }


def result_line(
    head: LineHead,
    job: Run,
    request: Mapping[str, Any],
    unedited: Unedited,
    answer: FreeAnswer,
    probabilities: Probabilities,
    figures: Figures,
    general: General,
    post: dict,
    *,
    seconds: float,
    peak_bytes: int | None,
    losses: Sequence[float],
) -> ResultLine:
    """The line of one record edited by one method.

    Args:
        head: Which run, method and record.
        job: The run.
        request: The record as it was edited.
        unedited: Metrics and answer of the unedited model.
        answer: The free greedy answer after the edit.
        probabilities: Of the new and the old answer after the edit.
        figures: Of the neighbours.
        general: What else the model can do after the edit.
        post: EasyEdit's metrics after the edit, compared with those before.
        seconds: To compute and write the edit.
        peak_bytes: Its peak memory; None if it was not measured.
        losses: Of the training steps; empty for a method that has none.
    """
    target, neighbours = request["target_new"], figures["neighbours"]
    return {
        **head,
        **shares_before(target, unedited["answer"], unedited["whole"], neighbours),
        "data": Path(job.data).stem,
        "seed": job.seed,
        "mode": job.mode,
        "batch_size": job.batch_size,
        "chat_template": job.chat_template,
        "prompt": request["prompt"],
        "subject": request["subject"],
        "target_new": target,
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "losses": [round(loss, 4) for loss in losses],
        "before": unedited["answer"],
        "after": answer.beginning,
        "exact_match": float(begins_with(answer.beginning, target)),
        "answer_before": unedited["whole"],
        "answer_after": answer.whole,
        "whole_answer": float(is_whole(answer.whole, target)),
        "probabilities_before": unedited["probabilities"],
        "probabilities_after": probabilities,
        "probes": len(neighbours),
        **figures,
        "perplexity_before": unedited["general"]["perplexity"],
        "perplexity": general["perplexity"],
        "ability_before": unedited["general"]["ability"],
        "ability": general["ability"],
        "metrics": {"pre": _without_outputs(unedited["metrics"]), "post": post},
    }


def shares_before(
    target: str, answer: str | None, whole: str | None, neighbours: Sequence[Mapping] | None
) -> SharesBefore:
    """What the unedited model said of a fact, as shares.

    Args:
        target: The new answer.
        answer: The free greedy answer of the unedited model; None if it is not known.
        whole: The same to its natural stop.
        neighbours: As in `NeighbourLine`.
    """
    forced = [known for its in neighbours or () if (known := its.get("forced_before")) is not None]
    return {
        "exact_match_before": None if answer is None else float(begins_with(answer, target)),
        "whole_answer_before": None if whole is None else float(is_whole(whole, target)),
        "bleed_forced_before": fmean(forced) if forced else None,
    }


def retention_line(head: LineHead, after: int, figures: Figures, general: General, post: dict) -> RetentionLine:
    """The line of one record evaluated again after so many edits."""
    return {
        **head,
        "after": after,
        "probes": len(figures["neighbours"]),
        "neighbourhood": figures["neighbourhood"],
        "neighbourhood_free": figures["neighbourhood_free"],
        "bleed": figures["bleed"],
        "bleed_forced": figures["bleed_forced"],
        "perplexity": general["perplexity"],
        "ability": general["ability"],
        "metrics": {"post": post},
    }


def parse_result(line: Mapping[str, Any]) -> ResultLine:
    """A line of ``results.jsonl`` in the present schema.

    Args:
        line: A JSON object of this version, or of an earlier one: what it lacks is None in the result.

    Raises:
        ValueError: Names the field, for a line that no report can be made of, or one of a later version.
    """
    _check(line, "a results.jsonl of `kne run` or run_benchmark.py", _HEAD, _SAID)
    for name in ("seed", "probes", "batch_size"):
        require(line.get(name) is None or is_int(line[name]), name, line.get(name), "a whole number")
    chat_template = line.get("chat_template")
    require(chat_template is None or isinstance(chat_template, bool), "chat_template", chat_template, "true or false")
    for name in ("neighbours", "aliases"):
        _require_answers(line.get(name), name)
    losses = line.get("losses")
    # A loss may be NaN: an edit that diverges is a finding.
    numbers = losses is None or (isinstance(losses, list) and all(isinstance(x, float) or is_number(x) for x in losses))
    require(numbers, "losses", losses, "a list of numbers")
    return cast(ResultLine, {**dict.fromkeys(ResultLine.__annotations__), **line, "schema_version": VERSION})


def parse_retention(line: Mapping[str, Any]) -> RetentionLine:
    """A line of ``retention.jsonl`` in the present schema.

    Args:
        line: A JSON object of this version, or of an earlier one.

    Raises:
        ValueError: As `parse_result`.
    """
    _check(line, "a retention.jsonl of `kne run` or run_benchmark.py", ("method", "index", "after"))
    require(is_int(line["after"]) and line["after"] > 0, "after", line["after"], "a number of edits")
    return cast(RetentionLine, {**dict.fromkeys(RetentionLine.__annotations__), **line, "schema_version": VERSION})


def is_readable(line: Mapping[str, Any]) -> bool:
    """Whether a line's version is this one or an earlier one."""
    version = line.get("schema_version", 0)
    return is_int(version) and 0 <= version <= VERSION


_HEAD = ("method", "fingerprint", "index", "record")
_TEXTS = ("fingerprint", "method", "record", "data", "mode", "settings")


def _check(line: Mapping[str, Any], expected: str, required: Sequence[str], said: Sequence[str] = ()) -> None:
    """Raises ValueError, naming the field, unless head, texts and figures are what reports can show."""
    for name in ("metrics", *required):
        if name not in line:
            raise ValueError(f"has no {name!r}; expected {expected}")
    if not is_readable(line):
        found = line.get("schema_version")
        raise ValueError(f"schema_version: {found!r}; this version of kne_easyedit reads up to {VERSION}: update it")
    for name in (*_TEXTS, *said):
        require(line.get(name) is None or isinstance(line[name], str), name, line.get(name), "a text")
    for name in ("method", "fingerprint", "record"):
        require(name not in required or bool(line[name]), name, line.get(name), "a text that is not empty")
    for name in ("method", "data", "mode"):
        text = line.get(name) or ""
        require(len(text) <= LONGEST and text.isprintable(), name, text, f"one line of at most {LONGEST} characters")
    require(is_int(line["index"]), "index", line["index"], "a number of a record")
    for name in (*(metric.path[0] for metric in own_metrics()), *SharesBefore.__annotations__, "denial_before"):
        require(line.get(name) is None or is_number(line[name]), name, line.get(name), "a finite number")
    require_general(line)
    try:
        check_metrics(line["metrics"])
    except ValueError as error:
        raise ValueError(f"has {error}") from error


def _require_answers(found: object, field: str) -> None:
    """Raises ValueError, naming the field, unless it is None or a list of what a report shows of prompts."""
    require(found is None or isinstance(found, list), field, found, "a list")
    for i, its in enumerate(found if isinstance(found, list) else ()):
        if type(its) is not dict:
            require(False, f"{field}[{i}]", its, "a mapping")
        for name in ("prompt", "before", "after"):
            if type(its.get(name)) is not str:  # the message is made of bad lines only: there are many neighbours
                require(False, f"{field}[{i}].{name}", its.get(name), "a text")
        for name in ("kept", "forced_before", "forced_after"):
            if (value := its.get(name)) is not None and not is_number(value):
                require(False, f"{field}[{i}].{name}", value, "a number")


def require_general(line: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, unless perplexities and scores are what reports can show."""
    for name in ("perplexity_before", "perplexity"):
        require(line.get(name) is None or is_number(line[name]), name, line.get(name), "a finite number")
    for name in ("ability_before", "ability"):
        scores = line.get(name) or {}
        require(isinstance(scores, dict), name, scores, "a mapping")
        for task, score in scores.items():
            where = f"{name}.{task}"
            require(len(task) <= 2 * LONGEST and task.isprintable(), name, task, "the name of a task")
            require(isinstance(score, dict) and is_number(score.get("value")), where, score, "a score with its value")
            require(score.get("stderr") is None or is_number(score["stderr"]), f"{where}.stderr", score, "a number")


def _without_outputs(metrics: dict) -> dict:
    """The metrics without the predicted tokens, which only serve the comparison."""
    locality = {name: values for name, values in metrics.get("locality", {}).items() if not name.endswith("_output")}
    return {**metrics, "locality": locality}
