"""The points of the paper's four studies on a model and its data, and what these cannot fill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
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
    series: Sequence[str] | None = None,
) -> Plan:
    """The points of a study.

    Args:
        name: One of `STUDIES`.
        ground: What there is to study.
        method: The first part of the labels.
        values: The values of the axis; None: the paper's, as far as model and data can fill them.
        draws: Draws of facts (study facts) or of random rows (study share) of a point; None: the study's default.
        sequences: Numbers of edits one after the other (study batch); None: the default, none if ``values`` are given
            and ``series`` are not.
        series: Some of the study's series; None: all.

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
    if draws is not None and name not in ("facts", "share"):
        raise ValueError(f"draws: {draws}; they belong to the studies facts and share, not to {name}: leave them out")
    if sequences is not None and name != "batch":
        listed = ",".join(sequences)
        raise ValueError(f"sequences: {listed}; they belong to the study batch, not to {name}: leave them out")
    if not ground.localised and name != "batch":
        raise ValueError(
            f"study {name}: the settings do not localise on a file of facts (ensemble, or no localization_data); "
            f"set ensemble to null and localization_data to a file or 'embedded'"
        )
    if series is not None and not series:
        raise ValueError(f"series: an empty list; null, or some of {', '.join(study.series)}")
    for its in series or ():
        require_one_of("series", its, study.series)
    if name == "batch":
        if values and sequences is None and series is None:
            sequences = []
        for option, given, its in (("values", values, "batch"), ("sequences", sequences, "sequence")):
            if given and series is not None and its not in series:
                raise ValueError(
                    f"{option}: {','.join(given)}; they belong to the series {its}, which series leave out"
                )
    wanted = [its for its in study.series if series is None or its in series]
    if study.named and values is not None:
        known = dict.fromkeys(value for its in wanted for value in _known(ground, its))
        for value in values:
            require_one_of("values", value, known)
    points: list[Point] = []
    left_out: dict[str, None] = {}  # two series refuse a module in the same words
    for its in wanted:
        asked = sequences if its == "sequence" else values
        for each in _PLANS[its](ground, Place(method, its, 1, ""), asked, draws or study.draws):
            if isinstance(each, Point):
                points.append(each)
            elif asked is not None:
                raise ValueError(f"study {name}: {each}")
            else:
                left_out[each] = None
    if not points:
        raise ValueError(f"study {name}: {next(iter(left_out))}")
    return Plan(study, tuple(points), tuple(left_out))


def _known(ground: Ground, series: str) -> Sequence[str]:
    """The values of a series of the study location: the model's own names of its modules, or the thirds."""
    return THIRDS if series == "depth" else list(module_names(ground.linear).values())


def _modules(ground: Ground, place: Place, values: Sequence[str] | None, draws: int) -> Iterator[Point | str]:
    """Every module alone, with as many rows or as many parameters as the settings' ensemble."""
    reference = _reference(ground)
    names = module_names(ground.linear)
    rows = _rows_of(ground, reference)
    yield from ground.refused if values is None else ()
    for its in ground.linear:
        name = names[its.template]
        if values is None or name in values:
            count = round(rows * reference.inputs / its.inputs) if place.series == "parameters" else rows
            yield _rows(ground, replace(place, value=name), its, _layers(ground, its), count)


def _depth(ground: Ground, place: Place, values: Sequence[str] | None, draws: int) -> Iterator[Point | str]:
    """The settings' module in a third of its layers, with as many rows as the settings' ensemble."""
    reference = _reference(ground)
    layers, rows = _layers(ground, reference), _rows_of(ground, reference)
    for i, third in enumerate(THIRDS):
        if values is None or third in values:
            part = layers[len(layers) * i // 3 : len(layers) * (i + 1) // 3]
            yield _rows(ground, replace(place, value=third), reference, part, rows)


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


def _facts(ground: Ground, place: Place, values: Sequence[str] | None, draws: int) -> Iterator[Point | str]:
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
                yield Point(replace(place, draw=draw, value=str(n)), settings, pool)


def _spread(draw: int) -> Fraction:
    """Where a draw begins, in [0, 1): 0, 1/3, 2/3, 1/9, 4/9, ... so that further draws leave the first as they are."""
    place, part = Fraction(0), Fraction(1, 3)
    while draw:
        draw, digit = divmod(draw, 3)
        place, part = place + digit * part, part / 3
    return place


def _share(ground: Ground, place: Place, values: Sequence[str] | None, draws: int) -> Iterator[Point | str]:
    """A share of the rows: localised, at random, by a score that needs no integral, or by their weights alone."""
    if ground.scale not in SHUFFLED:
        raise ValueError(
            f"score_scale: {ground.scale!r} is a control itself; the study needs one of {', '.join(SHUFFLED)}"
        )
    controls = SHUFFLED[ground.scale]
    if draws > len(controls):
        raise ValueError(f"draws: {draws} of random rows, at most {len(controls)} can be told apart")
    chosen: Mapping[str, Sequence[Mapping[str, Any]]] = {
        "share": [{}],
        "random": [{"score_scale": control} for control in controls[:draws]],
        # One step of Eq. 5 is the gradient at the module's own output, times that output.
        "step": [{"attribution_steps": 1, "quadrature": "riemann"}],
        "magnitude": [{"ensemble": MAGNITUDE}],
    }
    for p in _numbers(values, SHARES, float, lambda p: 0 < p <= 1, "shares of the rows, in (0, 1]"):
        for draw, settings in enumerate(chosen[place.series], start=1):
            yield Point(replace(place, draw=draw, value=f"{p:g}"), {"p": p, **settings})


def _batch(ground: Ground, place: Place, values: Sequence[str] | None, draws: int) -> Iterator[Point | str]:
    """Batches of the same records."""
    for n, records in _filled(ground, values, BATCHES, "facts in one edit", "or fewer facts (--values)"):
        if isinstance(records, str):
            yield records
        else:  # a last batch that is not full would be another point
            its = {"mode": "batch", "batch_size": n}
            yield Point(replace(place, value=str(n)), evaluation=its, records=records // n * n)


def _sequence(ground: Ground, place: Place, values: Sequence[str] | None, draws: int) -> Iterator[Point | str]:
    """Sequences of the first records, all of which are asked again at the end."""
    for n, records in _filled(ground, values, SEQUENCES, "edits one after the other", "or fewer edits (--sequences)"):
        if isinstance(records, str):
            yield records
        else:
            its = {"mode": "sequential", "batch_size": 1, "retention_every": n}
            yield Point(replace(place, value=str(n)), evaluation=its, records=n)


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


_PLANS = {
    **dict.fromkeys(("rows", "parameters"), _modules),
    "depth": _depth,
    "facts": _facts,
    **dict.fromkeys(("share", "random", "step", "magnitude"), _share),
    "batch": _batch,
    "sequence": _sequence,
}
"""What plans the points of each series (`definitions.STUDY_OF`); its place has the method and the series."""


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


def _rows_of(ground: Ground, reference: LinearLayer) -> int:
    """How many rows the ensemble of the settings has."""
    return Selection(ground.p).budget(len(_layers(ground, reference)) * reference.outputs)


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
