"""What a study has found, as sentences made from its figures, and whether the paper's claim holds.

Every sentence has its paired difference with the 95 % interval. A claim is a list of differences with the sign that it
expects: it holds if all intervals are on that side of 0, does not if one is on the other side, and else cannot be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from kne_easyedit.benchmark.intervals import Interval
from kne_easyedit.benchmark.tables import of_model
from kne_easyedit.studies.definitions import STUDIES
from kne_easyedit.studies.numbers import (
    BY_KEY,
    OVERALL,
    Cell,
    Curves,
    combine,
    contrast,
    difference,
    differences,
    enough,
    mean_difference,
    slope,
)

SHARES = tuple(STUDIES["share"].series)
"""Series whose values are shares of the rows."""
HOLDS, NOT, UNKNOWN = "holds", "does not hold", "cannot be told"
ENOUGH = 200
"""Facts that are as good as all, by the paper's claim."""
MARGIN = 1.0
"""Points that "as good as" may be worse, in percent."""


@dataclass(frozen=True)
class Check:
    """One part of a claim."""

    text: str
    """What is compared, in words."""
    interval: Interval | None
    """The difference; None if it was not measured."""
    sign: int
    """The side of ``border`` on which the claim expects it: 1 or -1."""
    border: float = 0.0

    @property
    def verdict(self) -> str:
        """`HOLDS`, `NOT` or `UNKNOWN`. Fewer than `intervals.FEW` records tell nothing."""
        if self.interval is None or self.interval.is_few:
            return UNKNOWN
        low, high = sorted(self.sign * (its - self.border) for its in (self.interval.low, self.interval.high))
        return HOLDS if low > 0 else NOT if high < 0 else UNKNOWN

    @property
    def sentence(self) -> str:
        """The part with its figures and its verdict."""
        if self.interval is None:
            return f"{self.text}: was not measured; {self.verdict}"
        few = f" ({self.interval.records} records are too few)" if self.interval.is_few else ""
        return f"{self.text}: {shown(self.interval)}; {self.verdict}{few}"


def verdict(checks: Sequence[Check]) -> str:
    """That of a claim, from its parts."""
    found = {check.verdict for check in checks}
    return NOT if NOT in found else HOLDS if found == {HOLDS} else UNKNOWN


def checks(curves: Curves) -> list[Check]:
    """The parts of the paper's claim on these figures."""
    return list(_CLAIMS[curves.study.name](curves))


def findings(curves: Curves) -> list[str]:
    """What was found, one sentence each."""
    return list(_FINDINGS[curves.study.name](curves))


def named(cell: Cell) -> str:
    """A point in words."""
    if cell.series in SHARES:
        return f"p = {100 * float(cell.value):g} %"
    if cell.series == "facts":
        return f"{cell.value} fact{'s' * (cell.value != '1')}"
    if cell.series == "batch":
        return f"{cell.value} an edit"
    return f"{cell.value} in a row" if cell.series == "sequence" else cell.value


def short(key: str) -> str:
    """A metric's name in a sentence."""
    return "the mean of ES, PORT and LOC" if key == OVERALL else BY_KEY[key].short


def shown(value: Interval) -> str:
    """A difference with its interval."""
    return value.shown("{:+.1f}")


def lead(one: str, other: str, key: str, value: Interval | None) -> str | None:
    """Which of two points leads in a metric, from the first minus the second; None if no record has both."""
    if value is None:
        return None
    if value.is_few:
        return f"{one} minus {other} in {short(key)}: {shown(value)}, over {_counted(value, key)} too few to tell"
    if value.low == value.high == 0:
        return f"{one} and {other} are equal in {short(key)}"
    less = key in BY_KEY and BY_KEY[key].better == "down"
    if value.leaves_out_zero:
        if (value.low > 0) == less:
            one, other = other, one
        by, *ends = abs(value.mean), *sorted((abs(value.low), abs(value.high)))
        leads = "lead" if one.endswith(("facts", "rows", "activation", "alone")) else "leads"
        return f"{one} {leads} {other} in {short(key)} by {by:.1f} [{ends[0]:.1f}, {ends[1]:.1f}]" + (
            " (less is better)" if less else ""
        )
    return f"{one} and {other} cannot be told apart in {short(key)}: {shown(value)}"


def _counted(value: Interval, key: str) -> str:
    """How many were drawn, and what they are."""
    return f"{value.records} {'edited models' if key in BY_KEY and of_model(BY_KEY[key]) else 'records'}"


def _compared(curves: Curves) -> list[str]:
    """The metrics of sentences: all but seconds."""
    return [key for key in curves.keys if key != "seconds_per_edit"]


# Findings


def _of_names(curves: Curves) -> Iterator[str]:
    """For each series and metric: which is first, which it surely leads, and which not."""
    for series in curves.series:
        for key in _compared(curves):
            sound = [cell for cell in curves.of(series) if not cell.not_finite(key)]
            means = [(cell, its.mean) for cell in sound if (its := cell.mean(key))]
            if len(means) < 2:
                continue
            sign = -1 if BY_KEY[key].better == "down" else 1
            best = max(sign * value for _, value in means)
            firsts = [cell for cell, value in means if sign * value == best]
            led: list[str] = []
            not_led: list[str] = []
            for cell, _ in means:
                found = None if cell in firsts else difference(firsts[0], cell, key)
                if found is None:
                    continue
                low, high = sorted((sign * found.low, sign * found.high))
                text = f"{named(cell)} by {sign * found.mean:.1f} [{low:.1f}, {high:.1f}]"
                (led if low > 0 and not found.is_few else not_led).append(text)
            parts = [f"it leads {', '.join(led)}"] if led else []
            parts += [f"it is not surely ahead of {', '.join(not_led)}"] if not_led else []
            names = " and ".join(map(named, firsts))
            yield "; ".join(
                [
                    f"{short(key)}, {curves.study.series[series]}: {names} {'are' if len(firsts) > 1 else 'is'} first "
                    f"with {sign * best:.1f}{' (less is better)' if sign < 0 else ''}",
                    *parts,
                    *(["too few records to tell"] if any(cell.few for cell, _ in means) else []),
                ]
            )


def _of_facts(curves: Curves) -> Iterator[str]:
    """The slope over the facts, from how many on a metric cannot be told from that of the most, and how 200 do against
    them.
    """
    if len(curves.of("facts")) < 2:
        return
    *fewer, most = curves.of("facts")
    for key in _compared(curves):
        if fewer[1:] and (sloping := slope(curves.of("facts"), key)):
            yield _sloping(key, "the facts", sloping)
        found = [(cell, its) for cell in fewer if (its := difference(cell, most, key))]
        alike = []
        for cell, its in reversed(found):
            if its.low > 0 or its.high < 0:
                break
            alike.append(cell)
        if alike and not any(its.is_few for _, its in found):
            yield f"{short(key)}: from {named(alike[-1])} on it cannot be told from that of {named(most)}"
        chosen = next((its for its in found if int(its[0].value) == ENOUGH), found[-1] if found else None)
        if chosen and (sentence := lead(named(chosen[0]), named(most), key, chosen[1])):
            yield sentence


def _of_shares(curves: Curves) -> Iterator[str]:
    """The slope over p, and whether it matters which rows these are."""
    for key in _compared(curves):
        if found := slope(curves.of("share"), key):
            yield _sloping(key, "p", found)
    for other in _CONTROLS:
        for key in _compared(curves):
            yield from _against(curves, other, key)


_CONTROLS = {
    "random": "random rows",
    "step": "rows by gradient times activation",
    "magnitude": "rows by their weights alone",
}
"""Series of the study of shares that localised rows are compared with -> what it is called."""


def _against(curves: Curves, other: str, key: str) -> Iterator[str]:
    """Localised rows against others of the same number, over all shares that both have."""
    pairs = [
        (cell, curves.cells[other, cell.value])
        for cell in enough(curves.of("share"))
        if (other, cell.value) in curves.cells
    ]
    tables = [differences(one.values(key), two.values(key)) for one, two in pairs]
    shared = [its for its in tables[0] if all(its in table for table in tables)] if tables else []
    means = {its: fmean(table[its] for table in tables) for its in shared}
    found = contrast(means, [cell for pair in pairs for cell in pair], key)
    ends = [named(pairs[place][0]) for place in (0, -1)] if pairs else ["", ""]
    where = ends[0] if len(pairs) < 2 else f"mean over {len(pairs)} shares, {ends[0]} to {ends[1]}"
    if sentence := lead("localised rows", _CONTROLS[other], key, found):
        sure = [named(one) for one, two in pairs if (its := difference(one, two, key)) and its.leaves_out_zero]
        alone = (
            f"; told apart at {'each' if len(sure) == len(pairs) else ', '.join(sure)}" if sure and pairs[1:] else ""
        )
        yield f"{sentence} ({where}{alone})"


def _of_batches(curves: Curves) -> Iterator[str]:
    """The change from the first point to the middle one, and from there to the last."""
    for series in curves.series:
        cells = curves.of(series)
        steps = [*pairwise(cells if len(cells) < 3 else _three(cells))]
        for key in _compared(curves):
            for one, other in steps:
                if found := difference(other, one, key):
                    few = f" ({_counted(found, key)} are too few to tell)" if found.is_few else ""
                    yield f"{short(key)} changes from {named(one)} to {named(other)} by {shown(found)}{few}"


def _sloping(key: str, what: str, found: Interval) -> str:
    few = f" ({_counted(found, key)} are too few to tell)" if found.is_few else ""
    return f"with every doubling of {what}, {short(key)} changes by {shown(found)}{few}"


_FINDINGS: dict[str, Callable[[Curves], Iterator[str]]] = {
    "location": _of_names,
    "facts": _of_facts,
    "share": _of_shares,
    "batch": _of_batches,
}


# The paper's claims


def _location(curves: Curves) -> Iterator[Check]:
    cells = curves.of("rows")
    down = [cell for cell in cells if cell.role == "MLP output"]
    others = [cell for cell in cells if cell.role != "MLP output"]
    if not down or not others:
        yield Check("the MLP's output against the other modules", None, 1)
    for cell in others if down else ():
        yield Check(f"{named(down[0])} minus {named(cell)} in {short(OVERALL)}", difference(down[0], cell, OVERALL), 1)
    wanted = ("gate", "MLP input", "gate and input", "query", "query, key, value")
    first = [cell for cell in cells if cell.role in wanted]
    rest = [cell for cell in cells if cell.role not in wanted]
    for key in ("locality", "fluency"):
        if first and rest:
            names = [", ".join(map(named, its)) for its in (first, rest)]
            value = mean_difference(first, rest, key)
            yield Check(f"the mean of {names[0]} minus that of {names[1]} in {short(key)}", value, 1)
        else:
            yield Check(f"gate, up and q against the other modules in {short(key)}", None, 1)


def _facts(curves: Curves) -> Iterator[Check]:
    cells = curves.of("facts")
    chosen = next((cell for cell in cells if int(cell.value) == ENOUGH), None)
    most = cells[-1] if cells and int(cells[-1].value) > ENOUGH else None
    value = difference(chosen, most, OVERALL) if chosen and most else None
    names = f"{ENOUGH} facts minus {named(most) if most else 'more'} in {short(OVERALL)}"
    yield Check(f"{names}, as good if it is above {-MARGIN:+g}", value, 1, -MARGIN)
    yield Check(f"{names}, more conflict if it is above 0", value, 1)


def _share(curves: Curves) -> Iterator[Check]:
    for key, sign in (("edit_success", 1), ("portability", 1), ("locality", -1)):
        way = "up" if sign > 0 else "down"
        yield Check(f"{short(key)} {way} with every doubling of p", slope(curves.of("share"), key), sign)


def _batch(curves: Curves) -> Iterator[Check]:
    cells = curves.of("batch")
    if len(cells) < 3:
        yield Check("three sizes of batches", None, 1)
        return
    one, two, three = _three(cells)
    for key in ("edit_success", "portability"):
        yield Check(f"{short(key)} falls from {named(one)} to {named(two)}", difference(two, one, key), -1)
        # Levelling off: the second step lies between the first one, a fall, and a rise of the same size.
        steps = f"from {named(two)} to {named(three)} with every doubling"
        yield Check(f"{short(key)} falls less {steps}", _second_step([one, two, three], key, -1), 1)
        yield Check(f"{short(key)} rises less {steps} than it fell", _second_step([one, two, three], key, 1), -1)
    yield Check(f"LOC rises from {named(one)} to {named(two)}", difference(two, one, "locality"), 1)
    yield Check(f"LOC falls from {named(two)} to {named(three)}", difference(three, two, "locality"), -1)
    yield Check("FLU up with every doubling", slope(cells, "fluency"), 1)


def _second_step(cells: Sequence[Cell], key: str, sign: int) -> Interval | None:
    """The change with every doubling from the second of three points to the third, plus ``sign`` times that before."""
    first, second = (math.log2(float(b.value) / float(a.value)) for a, b in pairwise(cells))
    return combine(cells, key, lambda its: (its[2] - its[1]) / second + sign * (its[1] - its[0]) / first)


def _three(cells: Sequence[Cell]) -> list[Cell]:
    """The first point, the one nearest to the middle on a logarithmic axis, and the last."""
    middle = (math.log2(float(cells[0].value)) + math.log2(float(cells[-1].value))) / 2
    return [cells[0], min(cells[1:-1], key=lambda cell: abs(math.log2(float(cell.value)) - middle)), cells[-1]]


_CLAIMS: dict[str, Callable[[Curves], Iterator[Check]]] = {
    "location": _location,
    "facts": _facts,
    "share": _share,
    "batch": _batch,
}
