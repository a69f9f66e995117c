"""The points of the paper's four studies on a model and its data, and what these cannot fill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

from kne_easyedit._util.messages import require_one_of
from kne_easyedit.localization.named import MAGNITUDE
from kne_easyedit.localization.selection import SHUFFLED, Selection
from kne_easyedit.models.targets import LinearLayer
from kne_easyedit.studies.definitions import STUDIES, THIRDS, Place, Point, Study

SHARES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
FACTS = (1, 2, 5, 10, 20, 50, 100, 200, 400, 800)
BATCHES = (1, 2, 5, 10, 20, 50, 100)
SEQUENCES = (10, 100, 500)


@dataclass(frozen=True)
class Ground:
    """What a study is planned on: the model's modules, the settings, and how much data there is."""

    linear: Sequence[LinearLayer]
    """The linear layers of the model's decoder layers (`models.targets.find_linear`)."""
    modules: Sequence[str]
    """``target_modules`` of the settings."""
    layers: Sequence[int]
    """``layers`` of the settings; empty: all."""
    p: float
    scale: str
    """``score_scale`` of the settings."""
    localised: bool = True
    """Whether the rows are found by localisation on a file, not named by an ensemble file or found for each edit."""
    facts: range = range(0)
    """Numbers of the facts that may be localised on: none that is edited."""
    records: int = 0
    """Records that are asked for, and are there."""
    refused: Sequence[str] = ()
    """Linear layers that cannot be studied, and why."""


@dataclass(frozen=True)
class Plan:
    """The points of a study on a ground."""

    study: Study
    points: tuple[Point, ...]
    left_out: tuple[str, ...]
    """What cannot be filled, why, and what can be done."""

    def point(self, label: str) -> Point:
        """The point with this label. Raises ValueError if there is none."""
        require_one_of("study.point", label, [each.place.label for each in self.points])
        return next(each for each in self.points if each.place.label == label)


def plan_study(
    name: str,
    ground: Ground,
    method: str = "KNE",
    values: Sequence[str] | None = None,
    draws: int | None = None,
    sequences: Sequence[str] | None = None,
) -> Plan:
    """The points of a study.

    Args:
        name: One of `STUDIES`.
        ground: What there is to study.
        method: The first part of the labels.
        values: The values of the axis; None: the paper's, as far as model and data can fill them.
        draws: Draws of facts (study facts) or of random rows (study share) of a point; None: the study's default.
        sequences: Numbers of edits one after the other (study batch); None: the default, none if ``values`` are given.

    Returns:
        The points, by series and value, and what is left out.

    Raises:
        ValueError: The name is unknown; a value is no value of this axis; a value that was asked for cannot be filled;
            or nothing is left.
    """
    require_one_of("study", name, STUDIES)
    study = STUDIES[name]
    if draws is not None and draws < 1:
        raise ValueError(f"draws: {draws} must be at least 1")
    if not ground.localised and name != "batch":
        raise ValueError(
            f"study {name}: the settings do not localise on a file of facts (ensemble, or no localization_data); "
            f"set ensemble to null and localization_data to a file or 'embedded'"
        )
    points: list[Point] = []
    left_out: list[str] = []
    planned = _PLANS[name](ground, method, values, draws or study.draws)
    if name == "batch":
        planned = chain(planned, _sequences(ground, method, [] if values and sequences is None else sequences))
    for each in planned:
        if isinstance(each, Point):
            points.append(each)
        else:
            left_out.append(each)
    if left_out and (values is not None or sequences is not None or not points):
        raise ValueError(f"study {name}: {left_out[0]}")
    return Plan(study, tuple(points), tuple(left_out))


def _location(ground: Ground, method: str, values: Sequence[str] | None, draws: int) -> Iterator[Point | str]:
    """Every module alone with as many rows, then as many parameters, as the settings' ensemble; thirds of the depth."""
    reference = _reference(ground)
    names = module_names(ground.linear)
    known = [*names.values(), *THIRDS]
    for value in values or ():
        require_one_of("values", value, known)
    wanted = known if values is None else values
    yield from ground.refused if values is None else ()
    rows = Selection(ground.p).budget(len(_layers(ground, reference)) * reference.outputs)
    parameters = rows * reference.inputs
    for series, count in (("rows", lambda its: rows), ("parameters", lambda its: round(parameters / its.inputs))):
        for its in ground.linear:
            value = names[its.template]
            if value in wanted:
                place = Place(method, series, 1, value)
                yield _rows(ground, place, its, _layers(ground, its), count(its))
    layers = _layers(ground, reference)
    for i, third in enumerate(THIRDS):
        part = layers[len(layers) * i // 3 : len(layers) * (i + 1) // 3]
        if third in wanted:
            yield _rows(ground, Place(method, "depth", 1, third), reference, part, rows)


def _rows(ground: Ground, place: Place, its: LinearLayer, layers: Sequence[int], rows: int) -> Point | str:
    """A point with so many rows of one module in some layers."""
    there = len(layers) * its.outputs
    if not 1 <= rows <= there:
        return (
            f"{place.value} ({place.study.series[place.series]}): {rows} rows are needed, {there} are there; "
            f"a smaller share needs fewer (--set p=...)"
        )
    everywhere = {*layers} == {layer for each in ground.linear for layer in each.layers}
    settings = {"target_modules": [its.template], "layers": [] if everywhere else list(layers), "p": rows / there}
    return Point(place, settings)


def _facts(ground: Ground, method: str, values: Sequence[str] | None, draws: int) -> Iterator[Point | str]:
    """N facts, several draws: each begins at a place of its own, and holds those of a smaller N of the same draw."""
    there = ground.facts
    starts = [there.start + int(len(there) * _spread(draw)) for draw in range(draws)]
    pool = {"offset": there.start, "size": max(1, len(there))}
    for n in _numbers(values, FACTS, int, lambda n: n >= 1, "whole numbers of facts, at least 1"):
        if n > len(there):
            yield (
                f"{n} facts: the data to localise on has {len(there)} that are not edited; "
                f"give a larger file (--localization-data), fewer --records, or fewer facts (--values)"
            )
            continue
        taken: list[int] = []
        for draw, start in enumerate(starts, start=1):
            if start + n <= there.stop and all(abs(start - other) >= n for other in taken):  # they share no fact
                taken.append(start)
                settings = {"localization_offset": start, "localization_size": n}
                # The same facts are kept out of the questions of all points.
                yield Point(Place(method, "facts", draw, str(n)), settings, pool)


def _spread(draw: int) -> Fraction:
    """Where a draw begins, in [0, 1): 0, 1/3, 2/3, 1/9, 4/9, ... so that further draws leave the first as they are."""
    place, part = Fraction(0), Fraction(1, 3)
    while draw:
        draw, digit = divmod(draw, 3)
        place, part = place + digit * part, part / 3
    return place


def _share(ground: Ground, method: str, values: Sequence[str] | None, draws: int) -> Iterator[Point | str]:
    """A share of the rows: localised, at random, by a score that needs no integral, and by their weights alone."""
    if ground.scale not in SHUFFLED:
        raise ValueError(
            f"score_scale: {ground.scale!r} is a control itself; the study needs one of {', '.join(SHUFFLED)}"
        )
    controls = SHUFFLED[ground.scale]
    if draws > len(controls):
        raise ValueError(f"draws: {draws} of random rows, at most {len(controls)} can be told apart")
    shares = _numbers(values, SHARES, float, lambda p: 0 < p <= 1, "shares of the rows, in (0, 1]")
    for p in shares:
        yield Point(Place(method, "share", 1, f"{p:g}"), {"p": p})
    for p in shares:
        for i, control in enumerate(controls[:draws], start=1):
            yield Point(Place(method, "random", i, f"{p:g}"), {"p": p, "score_scale": control})
    for p in shares:
        # One step of Eq. 5 is the gradient at the module's own output, times that output.
        yield Point(Place(method, "step", 1, f"{p:g}"), {"p": p, "attribution_steps": 1, "quadrature": "riemann"})
    for p in shares:
        yield Point(Place(method, "magnitude", 1, f"{p:g}"), {"p": p, "ensemble": MAGNITUDE})


def _batch(ground: Ground, method: str, values: Sequence[str] | None, draws: int) -> Iterator[Point | str]:
    """Batches of the same records."""
    for n, records in _filled(ground, values, BATCHES, "facts in one edit", "or fewer facts (--values)"):
        if isinstance(records, str):
            yield records
        else:  # a last batch that is not full would be another point
            its = {"mode": "batch", "batch_size": n}
            yield Point(Place(method, "batch", 1, str(n)), evaluation=its, records=records // n * n)


def _sequences(ground: Ground, method: str, values: Sequence[str] | None) -> Iterator[Point | str]:
    """Sequences of the first records, all of which are asked again at the end."""
    for n, records in _filled(ground, values, SEQUENCES, "edits one after the other", "or fewer edits (--sequences)"):
        if isinstance(records, str):
            yield records
        else:
            its = {"mode": "sequential", "batch_size": 1, "retention_every": n}
            yield Point(Place(method, "sequence", 1, str(n)), evaluation=its, records=n)


def _filled(
    ground: Ground, values: Sequence[str] | None, default: Sequence[int], what: str, instead: str
) -> Iterator[tuple[int, int | str]]:
    """Each number with the records that are there, or with why they do not fill it."""
    for n in _numbers(values, default, int, lambda n: n >= 1, f"whole numbers of {what}, at least 1"):
        enough = n <= ground.records
        yield (
            n,
            ground.records
            if enough
            else (f"{n} {what}: there are {ground.records} records; give more (--records), {instead}"),
        )


_PLANS = {"location": _location, "facts": _facts, "share": _share, "batch": _batch}


def module_names(linear: Sequence[LinearLayer]) -> dict[str, str]:
    """Template -> the model's own name of the module, with what stands before it only where two have the same."""
    paths = {its.template: its.template.split(".{}.", 1)[-1].split(".") for its in linear}
    names = {}
    for template, parts in paths.items():
        others = [its for other, its in paths.items() if other != template]
        length = next(
            (n for n in range(1, len(parts) + 1) if all(its[-n:] != parts[-n:] for its in others)), len(parts)
        )
        names[template] = ".".join(parts[-length:])
    return names


def _reference(ground: Ground) -> LinearLayer:
    """The module of the settings, whose number of rows all others get."""
    found = [its for its in ground.linear if its.template == ground.modules[0]]
    if not found:
        raise ValueError(
            f"target_modules: {ground.modules[0]!r} is no linear layer of this model; "
            f"it has {', '.join(its.template for its in ground.linear) or 'none'}"
        )
    return found[0]


def _layers(ground: Ground, its: LinearLayer) -> list[int]:
    """The layers that have the module, of those of the settings."""
    return [layer for layer in its.layers if not ground.layers or layer in ground.layers]


def _numbers(
    values: Sequence[str] | None, default: Sequence[Any], kind: type, sound: Callable[[Any], bool], what: str
) -> list[Any]:
    """The values as ascending numbers, each once."""
    if values is None:
        return list(default)
    found = set()
    for text in values:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not sound(number):
            raise ValueError(f"values: {text!r} is not right here; expected {what}")
        found.add(number)
    return sorted(found)
