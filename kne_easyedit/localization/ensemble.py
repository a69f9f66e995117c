"""Eq. 6-7: from scores to the ensemble, the value between localising and editing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.messages import shorten
from kne_easyedit.localization.selection import AGGREGATIONS, SCALES, Selection, aggregate
from kne_easyedit.models.targets import Target, check_template, count_parameters, in_features, resolve_target

FORMAT = "kne-ensemble-1"
LARGEST = 2**31
"""Upper bound of a neuron's or layer's number."""
LARGEST_FILE = 2**30
"""Bytes of an ensemble file at most: the largest models have less."""


@dataclass(frozen=True)
class NeuronEnsemble:
    """Which output neurons of which layers are edited (Eq. 7). Frozen; row indices are plain integers.

    Training and editing take any ensemble, whether localised, random or made by hand.

    Raises:
        ValueError: A field has a wrong type or value; there is no neuron; rows are not ascending, distinct and in
            ``[0, d2)``.
    """

    neurons: Mapping[str, Mapping[int, tuple[int, ...]]]
    """Template -> layer -> ascending row indices; layers without neurons are left out."""
    widths: Mapping[str, int]
    """Template -> neurons of a layer (``d2``)."""
    layers: tuple[int, ...] = ()
    """The layers that were attributed."""
    thresholds: Mapping[str, float] | None = None
    """Template -> ``t_p`` (Eq. 6)."""
    p: float | None = None
    """`Selection.p`, if it is recorded."""
    aggregation: str | None = None
    """`Selection.aggregation`, if it is recorded."""
    facts: int | None = None
    """Number of facts whose scores were aggregated."""
    seconds: float | None = None
    """How long their attribution took when it was computed; the score cache stores it."""
    scale: str | None = None
    """`Selection.scale`, if it is recorded; older files do not have it."""

    def __post_init__(self) -> None:
        self._require_types()
        if not self.size:
            raise ValueError("ensemble: empty, there is nothing to train; raise p or localise on other facts")
        for template, layers in self.neurons.items():
            width = self.widths.get(template)
            for layer, rows in layers.items():
                if width is None or list(rows) != sorted(set(rows)) or not rows or rows[0] < 0 or rows[-1] >= width:
                    raise ValueError(
                        f"ensemble: rows of {template.format(layer)} must be ascending, distinct and in [0, {width}); "
                        f"got {shorten(list(rows)[:8])}"
                    )

    def _require_types(self) -> None:
        """Raises ValueError, naming field and value. A string of digits is no list of rows; 1.7 or True is no row."""
        _require(isinstance(self.neurons, Mapping), "neurons", self.neurons, "a mapping of templates")
        for template, layers in self.neurons.items():
            try:
                check_template(template)
            except ValueError as error:
                raise ValueError(f"ensemble: neurons: {error}") from error
            _require(isinstance(layers, Mapping), f"neurons of {template}", layers, "a mapping of layers to rows")
            for layer, rows in layers.items():
                _require(_is_index(layer), f"neurons of {template}", layer, "a layer's number")
                _require(
                    isinstance(rows, (tuple, list)), f"neurons of {template.format(layer)}", rows, "a list of rows"
                )
                for row in rows:
                    _require(
                        type(row) is int and abs(row) <= LARGEST,
                        f"neurons of {template.format(layer)}",
                        row,
                        "a row's number",
                    )
        _require(
            isinstance(self.widths, Mapping), "widths", self.widths, "a mapping of templates to numbers of neurons"
        )
        for template, width in self.widths.items():
            _require(
                isinstance(template, str) and _is_index(width),
                "widths",
                {template: width},
                "a template's number of neurons",
            )
        numbers = isinstance(self.layers, (tuple, list)) and all(map(_is_index, self.layers))
        _require(numbers, "layers", self.layers, "a list of layers' numbers")
        _require(
            self.thresholds is None or isinstance(self.thresholds, Mapping),
            "thresholds",
            self.thresholds,
            "a mapping of templates",
        )
        for template, threshold in (self.thresholds or {}).items():
            _require(
                template in self.neurons and _is_finite(threshold),
                f"thresholds of {shorten(template)}",
                threshold,
                "a finite number",
            )
        for name in ("p", "seconds"):
            value = getattr(self, name)
            _require(value is None or _is_finite(value), name, value, "a finite number")
        _require(self.facts is None or _is_index(self.facts), "facts", self.facts, "a number of facts")
        for name, known in (("aggregation", AGGREGATIONS), ("scale", SCALES)):
            value = getattr(self, name)
            known_name = isinstance(value, str) and value in known
            _require(value is None or known_name, name, value, f"one of {tuple(known)}")

    @property
    def selection(self) -> Selection | None:
        """The rules by which the neurons were chosen; None if one is not recorded (made by hand, or an older file)."""
        if self.p is None or self.aggregation is None or self.scale is None:
            return None
        return Selection(self.p, self.aggregation, self.scale, self.layers)

    @property
    def size(self) -> int:
        """Number of neurons."""
        return sum(len(rows) for layers in self.neurons.values() for rows in layers.values())

    def counts(self) -> dict[str, dict[int, int]]:
        """Template -> layer -> number of neurons, zeros included."""
        return {
            template: {layer: len(found.get(layer, ())) for layer in sorted({*self.layers, *found})}
            for template, found in self.neurons.items()
        }

    def overlap(self, other: NeuronEnsemble) -> float:
        """Dice coefficient of two ensembles, in [0, 1]: shared neurons over the mean number of neurons."""
        return 2 * len(self.members() & other.members()) / (self.size + other.size)

    def members(self) -> set[tuple[str, int, int]]:
        """Every neuron as ``(template, layer, row)``."""
        return {
            (template, layer, row)
            for template, layers in self.neurons.items()
            for layer, rows in layers.items()
            for row in rows
        }

    def targets(self, model: nn.Module) -> dict[str, tuple[Target, list[tuple[int, ...]]]]:
        """Resolves the ensemble in a model.

        Returns:
            Template -> its modules in ``model``, and the rows of each.

        Raises:
            ValueError: ``model`` lacks a module or has it in another width: the ensemble is of another model.
        """
        found = {}
        for template, layers in self.neurons.items():
            if not layers:
                continue
            target = resolve_target(model, template, sorted(layers))
            if target.n_neurons != self.widths[template]:
                raise ValueError(
                    f"ensemble: {template} has {self.widths[template]} neurons a layer, but {target.n_neurons} in this "
                    f"model; it was made for another model"
                )
            found[template] = (target, [layers[i] for i in target.layers])
        return found

    def parameter_share(self, model: nn.Module) -> float:
        """Share of the model's parameters that are in the ensemble's rows, in [0, 1]; biases are not trained.

        Raises:
            ValueError: As `targets`.
        """
        chosen = 0
        for target, rows in self.targets(model).values():
            chosen += sum(len(r) * in_features(m) for m, r in zip(target.modules, rows))
        return chosen / count_parameters(model)

    def save(self, path: str | Path) -> None:
        """Writes the ensemble as JSON, atomically. Raises OSError if the file cannot be written."""
        atomic_write(Path(path), json.dumps(self.to_json()) + "\n")

    def to_json(self) -> dict[str, Any]:
        """The ensemble as a file of it holds it: values of JSON."""
        return {
            "format": FORMAT,
            "neurons": {
                t: {str(layer): list(rows) for layer, rows in found.items()} for t, found in self.neurons.items()
            },
            "widths": dict(self.widths),
            "layers": list(self.layers),
            "thresholds": None if self.thresholds is None else dict(self.thresholds),
            "p": self.p,
            "aggregation": self.aggregation,
            "facts": self.facts,
            "seconds": self.seconds,
            "scale": self.scale,
        }

    @classmethod
    def load(cls, path: str | Path) -> NeuronEnsemble:
        """Reads an ensemble file, of this or an older version.

        Args:
            path: A file that `save` has written.

        Returns:
            The ensemble.

        Raises:
            ValueError: It is another file; the message names file, field and value.
            OSError: It cannot be read.
        """
        path = Path(path)
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise ValueError(f"{path.stat().st_size} bytes are more than any ensemble has")
            return cls.from_json(json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct))
        except (ValueError, RecursionError) as error:  # also of decoding, of JSON, and of __post_init__
            nested = isinstance(error, RecursionError)
            reason = "nested too deeply" if nested else str(error).removeprefix("ensemble: ")
            raise ValueError(f"ensemble: {path} is no ensemble file ({FORMAT}): {reason}") from error

    @classmethod
    def from_json(cls, content: object) -> NeuronEnsemble:
        """The ensemble that `to_json` gave, of this or an older version.

        Raises:
            ValueError: It is something else; the message names field and value.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("its field 'format' is missing or another one")
        content = {name: value for name, value in content.items() if name != "format"}
        if unknown := sorted(set(content) - {f.name for f in fields(cls)}):
            raise ValueError(f"unknown field {shorten(unknown[0])}")
        for name in ("neurons", "widths"):
            _require(isinstance(content.get(name), dict), name, content.get(name), "a mapping")
        content["neurons"] = {template: _rows_of(template, found) for template, found in content["neurons"].items()}
        layers = content.pop("layers", [])
        _require(isinstance(layers, list), "layers", layers, "a list of layers' numbers")
        return cls(**content, layers=tuple(layers))


def _rows_of(template: str, found: Any) -> dict[int, tuple]:
    """Rows by layer. In JSON layers are strings of digits."""
    _require(isinstance(found, dict), f"neurons of {shorten(template)}", found, "a mapping of layers to rows")
    for layer, rows in found.items():
        digits = layer.isascii() and layer.isdigit() and layer == str(int(layer[:20]))
        _require(digits, f"neurons of {shorten(template)}", layer, "a layer's number")
        _require(isinstance(rows, list), f"neurons of {shorten(template)}, layer {layer}", rows, "a list of rows")
    return {int(layer): tuple(rows) for layer, rows in found.items()}


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose names are distinct; ``json`` would silently take the last of two."""
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"{shorten(max(names, key=names.count))} occurs twice")
    return dict(pairs)


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"ensemble: {name}: {shorten(value)} is not {expected}")


def _is_index(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def select_ensemble(
    scores: Tensor | Mapping[str, Tensor],
    selection: Selection | float | None = None,
    *,
    target_module: str | None = None,
    facts: int | None = None,
    seconds: float | None = None,
    **rules: Any,
) -> NeuronEnsemble:
    """Eq. 6-7: keeps the top ``p`` of the neurons over all layers, and of these the positive ones.

    Args:
        scores: Attributions ``(layers, d2)``, in probability; or ``(facts, layers, d2)``, which are aggregated first;
            or a mapping of templates to such tensors. Each template has its own threshold.
        selection: The rules; its ``layers`` are the layers of the rows of ``scores``, in ascending order, which is that
            of `attribute` (empty: 0, 1, ...). A number is ``p``, with the defaults of `Selection`.
        target_module: The template, if ``scores`` is a tensor.
        facts: How many facts ``scores`` were aggregated from, if that is done already.
        seconds: How long their attribution took.
        rules: Fields of `Selection` by name, in place of those of ``selection``: ``p``, ``aggregation``, ...

    Returns:
        The ensemble, which records the selection.

    Raises:
        ValueError: A rule is out of range, ``scores`` has another shape than ``(layers, d2)``, ``layers`` are not in
            ascending order, or no score is positive (an empty ensemble).
        FloatingPointError: Scores are not finite.
        TypeError: A rule's name is unknown.
    """
    if isinstance(selection, Selection):
        selection = replace(selection, **rules)
    else:
        selection = Selection(**rules) if selection is None else Selection(selection, **rules)
    if isinstance(scores, Tensor):
        if target_module is None:
            raise ValueError("target_module: name the template that the scores belong to, or pass {template: scores}")
        scores = {target_module: scores}
    if (ordered := sorted(set(selection.layers))) != list(selection.layers):
        raise ValueError(
            f"layers: {list(selection.layers)} are not in ascending order, as the rows of scores are; give {ordered}, "
            f"and the rows in that order"
        )
    neurons, widths, thresholds, layers = {}, {}, {}, selection.layers
    for template, values in scores.items():
        if values.ndim == 3:
            values, facts = aggregate(values, selection.aggregation)
        if values.ndim != 2 or (selection.layers and len(values) != len(selection.layers)):
            raise ValueError(
                f"scores: {template} has shape {tuple(values.shape)}, expected shape (layers, d2) for layers "
                f"{list(selection.layers)}"
            )
        if not values.isfinite().all():
            raise FloatingPointError(
                f"scores: those of {template} are not finite; load the model in float32 or bfloat16"
            )
        layers = selection.layers or tuple(range(len(values)))
        chosen, thresholds[template] = selection.choose(values)
        rows = {layer: tuple(mask.nonzero().flatten().tolist()) for layer, mask in zip(layers, chosen)}
        neurons[template] = {layer: found for layer, found in rows.items() if found}
        widths[template] = values.shape[1]
    return NeuronEnsemble(
        neurons, widths, layers, thresholds, selection.p, selection.aggregation, facts, seconds, selection.scale
    )
