"""Figures from EasyEdit's lists of metrics, whoever made them: its editors, its example scripts, or a run of ours.

Standard library only, so that a table of results costs no import of torch.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from statistics import fmean

from kne_easyedit._util.files import parse_json

FIGURES = ("edit_success", "rephrase", "portability", "locality", "fluency")


def summarize_metrics(metrics: Sequence[Mapping]) -> dict[str, float | int | None]:
    """The figures of one method: means over records, in percent (fluency: n-gram entropy x 100), and ``records``.

    As in EasyEdit's run_knowedit_llama2.py: a record's portability (locality) is the mean over its categories of the
    mean over a category's prompts; what a record lacks is left out. None where no record has it. Only keys that end
    in ``_acc`` count: EasyEdit leaves token ids and descriptions of metrics beside them.
    """
    posts = [record["post"] for record in metrics]
    figures = {
        "edit_success": _mean(post.get("rewrite_acc") for post in posts),
        "rephrase": _mean(post.get("rephrase_acc") for post in posts),
        "portability": _mean(_section(post, "portability") for post in posts),
        "locality": _mean(_section(post, "locality") for post in posts),
        "fluency": _mean((post.get("fluency") or {}).get("ngram_entropy") for post in posts),
    }
    return {**{name: None if value is None else 100 * value for name, value in figures.items()}, "records": len(posts)}


def by_category(metrics: Sequence[Mapping], section: str) -> dict[str, list[float]]:
    """What ``portability`` or ``locality`` (the ``section``) is the mean of: category -> one figure (percent) a record that has it."""
    found: dict[str, list[float]] = {}
    for record in metrics:
        for name, values in (record["post"].get(section) or {}).items():
            if name.endswith("_acc") and (value := _mean(values)) is not None:
                found.setdefault(name.removesuffix("_acc"), []).append(100 * value)
    return found


def begins_with(answer: str, target: str) -> bool:
    """Whether a free answer begins with the wanted one: blanks and capitals do not count, but words end where they end."""
    answer, target = " ".join(answer.split()).casefold(), " ".join(target.split()).casefold()
    following = answer[len(target) :][:1]
    return answer.startswith(target) and (not following.isalnum() or is_unspaced_script(following))


def is_unspaced_script(character: str) -> bool:
    """Whether it is of a script that sets no blanks between words: Chinese, Japanese, Thai and their kin."""
    return unicodedata.east_asian_width(character) in "WF" or unicodedata.name(character, "").startswith(
        ("THAI ", "LAO ", "KHMER ", "MYANMAR ")
    )


def read_results(path: str | Path) -> list[dict]:
    """The records of a results file, each as ``{"method": str | None, "metrics": {...}}``.

    Takes the JSON list that EasyEdit's scripts dump (no method stands in it) and the ``results.jsonl`` of ``kne run``.
    Raises FileNotFoundError, or ValueError that says what was found and what is wanted.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results file {path} does not exist")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"no text ({error.reason})") from error
    try:
        found = parse_json(text)
    except ValueError:
        return _read_lines(path, text)
    if isinstance(found, list):
        return [_record(path, f"entry {i}", None, metrics) for i, metrics in enumerate(found)]
    return _read_lines(path, json.dumps(found))  # a results.jsonl of one line, maybe


def check_metrics(metrics) -> None:
    """Raises ValueError, naming the field, for metrics that no figure can be made of; fields that no figure reads may be anything.

    Wanted is a mapping whose ``post`` (and ``pre``, if it is there) maps names to finite numbers, lists of them, and sections of these.
    """
    if not isinstance(metrics, dict) or not isinstance(metrics.get("post"), dict):
        raise ValueError(f"metrics that are {_describe(metrics)}")
    for when in ("pre", "post"):
        figures = metrics.get(when) or {}
        if not isinstance(figures, dict):
            raise ValueError(f"metrics.{when} that is {_describe(figures)}")
        for name in ("rewrite_acc", "rephrase_acc"):
            _require_numbers(figures.get(name), f"metrics.{when}.{name}")
        for section in ("portability", "locality", "fluency"):
            found = figures.get(section) or {}
            if not isinstance(found, dict):
                raise ValueError(f"metrics.{when}.{section} that is {_describe(found)}")
            for name, values in found.items():
                if name.endswith("_acc") or name == "ngram_entropy":
                    _require_numbers(values, f"metrics.{when}.{section}.{name}")


def is_number(value) -> bool:
    """Whether it is a finite number, no larger than a float can be."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return False


def _require_numbers(values, where: str, depth: int = 0) -> None:
    if isinstance(values, list) and depth < 4:
        for value in values:
            _require_numbers(value, where, depth + 1)
    elif values is not None and not is_number(values):
        raise ValueError(
            f"{where} that is {_describe(values)}{'' if not isinstance(values, Real) else ' and not finite'}, wanted are numbers"
        )


def table(rows: Mapping[str, Mapping]) -> str:
    """Summaries as a Markdown table, one row a label. The exact match of free answers has a column if any row has it."""
    extra = ["exact_match"] if any(figures.get("exact_match") is not None for figures in rows.values()) else []
    columns = [*FIGURES, *extra, "records"]
    width = max(map(len, ["method", *rows]))
    header = f"| {'method':<{width}} | " + " | ".join(columns) + " |"
    rule = f"|{'-' * (width + 2)}|" + "|".join("-" * (len(name) + 1) + ":" for name in columns) + "|"
    lines = [
        f"| {label:<{width}} | " + " | ".join(f"{_cell(figures.get(n)):>{len(n)}}" for n in columns) + " |"
        for label, figures in rows.items()
    ]
    return "\n".join([header, rule, *lines])


def _read_lines(path: Path, text: str) -> list[dict]:
    records = []
    for number, line in enumerate(
        text.removesuffix("\n").split("\n") if text else [], start=1
    ):  # U+2028 and its kin end no line
        where = f"line {number}"
        try:
            found = parse_json(line)
        except ValueError as error:
            half = "; a run that was killed leaves half a line, the same `kne run` puts it right" if records else ""
            raise _unreadable(path, f"{where}: {error}{half}") from error
        if not isinstance(found, dict) or not isinstance(found.get("method"), str) or "metrics" not in found:
            raise _unreadable(path, f"{where}: {_describe(found)}")
        records.append(_record(path, where, found["method"], found["metrics"]))
    if not records:
        raise _unreadable(path, "an empty file")
    return records


def _record(path: Path, where: str, method: str | None, metrics) -> dict:
    try:
        check_metrics(metrics)
    except ValueError as error:
        raise _unreadable(path, f"{where}: {error}") from error
    return {"method": method, "metrics": metrics}


def _unreadable(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{path}: found {found}; wanted is a JSON list of EasyEdit's metrics (each with 'post'), as its scripts write it, "
        f"or a results.jsonl of `kne run` (each line with 'method' and 'metrics')"
    )


def _describe(value) -> str:
    if isinstance(value, dict):
        return f"a mapping of {', '.join(map(repr, list(value)[:4])) or 'nothing'}"
    return f"a {type(value).__name__}"


def _section(post: Mapping, section: str) -> float | None:
    return _mean(values for name, values in (post.get(section) or {}).items() if name.endswith("_acc"))


def _mean(values: Iterable) -> float | None:
    """The mean of numbers, or of means where they are lists; what is None or empty is left out."""
    numbers = [number for number in map(_number, values) if number is not None]
    return fmean(numbers) if numbers else None


def _number(value) -> float | None:
    return value if value is None or isinstance(value, Real) else _mean(value)


def _cell(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
