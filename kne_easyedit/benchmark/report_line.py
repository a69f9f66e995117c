"""What a report keeps of a result line: its figures and texts in a compact form, for reports over many lines."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from kne_easyedit._util.means import number_of
from kne_easyedit.benchmark.result_line import ResultLine
from kne_easyedit.metrics import categories_of, easyedit_metrics, own_metrics


class Texts:
    """Texts without lone surrogates (halves of a character), which no file can hold: question marks stand for them.

    Equal texts are one object: lines of several methods share their prompts and answers before the edit.
    """

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, found: str) -> str:
        """The text."""
        if (known := self._known.get(found)) is None:
            known = self._known[found] = found if found.isascii() else found.encode("utf-8", "replace").decode()
        return known

    def within(self, value: Any) -> Any:
        """A value of JSON with its texts and names so."""
        if isinstance(value, dict):
            return {self(name): self.within(its) for name, its in value.items()}
        if isinstance(value, list):
            return [self.within(its) for its in value]
        return self(value) if isinstance(value, str) else value


class ReportLine(Mapping[str, Any]):
    """A `ResultLine` without what no report shows; read like it. One object without a table of names.

    ``neighbours`` are `Neighbours`, ``losses`` is an array, ``metrics`` has one number where EasyEdit has lists
    (`reduce_metrics`); ``aliases`` and the probabilities are None.
    """

    __slots__ = (*ResultLine.__annotations__, "_more")

    _more: Mapping[str, Any]
    """Fields of metrics that the schema lacks."""

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key) if key in _NAMES else self._more[key]

    def get(self, key: str, default: Any = None) -> Any:
        """As of any mapping."""
        return getattr(self, key) if key in _NAMES else self._more.get(key, default)

    def __iter__(self) -> Iterator[str]:
        yield from _NAMES
        yield from self._more

    def __len__(self) -> int:
        return len(_NAMES) + len(self._more)


_NAMES = dict.fromkeys(ResultLine.__annotations__)
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Neighbours(Sequence[Mapping[str, Any]]):
    """Neighbours of a result line, as columns; an entry has ``prompt``, ``before``, ``after``, ``forced_before``."""

    __slots__ = ("after", "before", "forced_before", "prompts")

    prompts: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    forced_before: tuple[float | None, ...]

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[its] for its in range(*i.indices(len(self)))]
        return {
            "prompt": self.prompts[i],
            "before": self.before[i],
            "after": self.after[i],
            "forced_before": self.forced_before[i],
        }

    def __len__(self) -> int:
        return len(self.prompts)


def report_line(line: ResultLine, texts: Texts, *, data: str, method: str) -> ResultLine:
    """What a report keeps of a line. The line itself can be forgotten then.

    Args:
        line: As `result_line.parse_result` returns it.
        texts: Of all lines of the report.
        data: The name of its data set.
        method: Its label in the report.

    Returns:
        A `ReportLine`, which is read like the line.
    """
    found: Mapping[str, Any] = line
    kept = ReportLine()
    for name in _PLAIN:
        value = found[name]
        setattr(kept, name, texts(value) if type(value) is str else value)
    for name, own in (("data", data), ("method", method)):
        setattr(kept, name, texts(own))
    for name in ("ability_before", "ability"):
        setattr(kept, name, texts.within(found[name]))
    for name in _LEFT_OUT:
        setattr(kept, name, None)
    losses, neighbours = found["losses"], found["neighbours"]
    added = {metric.path[0] for metric in own_metrics()} & found.keys() - _NAMES.keys()
    packed = {
        "_more": {name: found[name] for name in added} if added else _NOTHING,
        "losses": None if losses is None else array("d", losses),
        "neighbours": None if neighbours is None else _columns(neighbours, texts),
        "metrics": texts.within(reduce_metrics(found["metrics"])),
    }
    for name, value in packed.items():
        setattr(kept, name, value)
    return cast(ResultLine, kept)


def reduce_metrics(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics of one record without what no `Metric` reads, and with the mean where EasyEdit has lists.

    Every `Metric` and its categories have the same values of it.

    Args:
        metrics: As `metrics.check_metrics` accepts them.

    Returns:
        ``pre`` and ``post``.
    """
    reduced: dict[str, dict[str, Any]] = {"pre": {}, "post": {}}
    for when, kept in reduced.items():
        found = metrics.get(when) or {}
        for metric in easyedit_metrics():
            *sections, last = metric.path[2:]
            source, target = found, kept
            for section in [*sections, *([last] if metric.by_category else [])]:
                source, target = source.get(section) or {}, target.setdefault(section, {})
            if metric.by_category:
                target |= {name: number_of(values) for name, values in categories_of(source)}
            elif (value := number_of(source.get(last))) is not None:
                target[last] = value
    return reduced


_LEFT_OUT = ("aliases", "probabilities_before", "probabilities_after")
_APART = {"data", "method", "ability_before", "ability", "losses", "neighbours", "metrics", *_LEFT_OUT}
_PLAIN = tuple(name for name in _NAMES if name not in _APART)


def _columns(neighbours: Sequence[Mapping[str, Any]], texts: Texts) -> Neighbours:
    return Neighbours(
        tuple([texts(its["prompt"]) for its in neighbours]),
        tuple([texts(its["before"]) for its in neighbours]),
        tuple([texts(its["after"]) for its in neighbours]),
        tuple([its.get("forced_before") for its in neighbours]),
    )
