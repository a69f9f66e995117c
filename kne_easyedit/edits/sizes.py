"""How large an edit is, against the weights that it changes and beside other edits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kne_easyedit._util.tensor_files import Place, places, read_tensor
from kne_easyedit.editing.kne_edit import BaseModule, KNEEdit
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.weight_files import candidates


@dataclass(frozen=True)
class ModuleSize:
    """The change of one module."""

    module: str
    rows: int
    """Number of rows that are changed."""
    outputs: int
    """Number of rows that it has."""
    change: float
    """Frobenius norm of what is added."""
    weights: float | None = None
    """Frobenius norm of the same rows of the base; None if its file is not at hand."""

    @property
    def share(self) -> float | None:
        """``change`` as a share of ``weights``."""
        return self.change / self.weights if self.weights else None


@dataclass(frozen=True)
class Shared:
    """What two edits share."""

    rows: int
    """Rows that both change."""
    cosine: float
    """Of the two changes in these rows, in [-1, 1]: near 1 they pull alike, near -1 against each other; 0 without."""
    modules: tuple[tuple[str, int], ...]
    """Modules with such rows and their numbers, most first."""


def sizes_of(edit: KNEEdit, folder: Path | None = None) -> list[ModuleSize]:
    """How much an edit changes of each module.

    Args:
        edit: The edit.
        folder: The base's files; of these only the touched modules are read, one at a time, from safetensors.

    Returns:
        One entry for each module, in the edit's order.

    Raises:
        ValueError: A file of the base is damaged; the message names it.
        OSError: One cannot be read.
    """
    paths = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()] if folder is not None else []
    files = {path: places(path) for path in paths}
    found = []
    for name in edit.deltas:
        chosen, delta = edit.deltas[name]
        base = edit.base.modules[name]
        weight = _weight(files, name, base)
        norm = None
        if weight is not None:
            norm = torch.linalg.vector_norm(weight[torch.tensor(chosen)].double()).item()
        size = torch.linalg.vector_norm(delta.double()).item()
        found.append(ModuleSize(name, len(chosen), base.shape[0], size, norm))
    return found


def shared_rows(edit: KNEEdit, other: KNEEdit) -> Shared:
    """The rows that two edits change both, and whether they change them alike."""
    counts: dict[str, int] = {}
    product = ours = theirs = 0.0
    for name, numbers in edit.rows.items():
        common = sorted({*numbers} & {*other.rows.get(name, ())})
        if not common:  # the values are not read
            continue
        (chosen, delta), (rows, change) = edit.deltas[name], other.deltas[name]
        if delta.shape[1] != change.shape[1]:
            continue
        counts[name] = len(common)
        one, two = _of(common, chosen, delta), _of(common, rows, change)
        product += (one * two).sum().item()
        ours, theirs = ours + one.square().sum().item(), theirs + two.square().sum().item()
    scale = (ours * theirs) ** 0.5
    most = tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return Shared(sum(counts.values()), product / scale if scale else 0.0, most)


def shared_counts(edits: Sequence[KNEEdit]) -> list[list[int]]:
    """How many rows each edit changes that each other does, all pairs at once: a store may hold a thousand edits.

    Args:
        edits: The edits, ``n``.

    Returns:
        ``(n, n)``, symmetric; each edit's own number of rows on the diagonal.
    """
    counts = torch.zeros(len(edits), len(edits), dtype=torch.float32)  # exact: far below 2 ** 24
    for name in dict.fromkeys(name for edit in edits for name in edit.rows):
        chosen = [edit.rows.get(name, ()) for edit in edits]
        member = torch.zeros(len(edits), 1 + max(max(its, default=0) for its in chosen), dtype=torch.float32)
        for i, its in enumerate(chosen):
            member[i, list(its)] = 1
        counts += member @ member.T
    return counts.long().tolist()


def ensemble_of(edit: KNEEdit) -> NeuronEnsemble:
    """The neurons that an edit changes, for pictures: those that it says, else those of its rows."""
    if edit.ensemble is not None:
        return edit.ensemble
    neurons: defaultdict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    widths = {}
    for name in edit.deltas:
        number = re.search(r"\.(\d+)\.", name)
        if number is None:
            raise ValueError(f"edit: {name} is in no layer that has a number")
        template = f"{name[: number.start(1)]}{{}}{name[number.end(1) :]}"
        neurons[template][int(number[1])] = edit.deltas[name][0]
        widths[template] = edit.base.modules[name].shape[0]
    return NeuronEnsemble(dict(neurons), widths)


def _of(common: list[int], chosen: tuple[int, ...], delta: Tensor) -> Tensor:
    place = {row: i for i, row in enumerate(chosen)}
    return delta[torch.tensor([place[row] for row in common])].double()


def _weight(files: Mapping[Path, Mapping[str, Place]], name: str, base: BaseModule) -> Tensor | None:
    """A module's weight, ``(d2, d1)``; None if no tensor, or more than one, may be it."""
    found = candidates(name, base.shape[::-1] if base.transposed else base.shape, files)
    if not found or (len(found) > 1 and found[0][1] != f"{name}.weight"):
        return None
    path, key = found[0]
    with path.open("rb") as file:
        weight = read_tensor(file, files[path][key])
    return weight.t() if base.transposed else weight
