"""A trained edit as a thing: applied, taken back, saved in a folder, loaded, merged into a model's files."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from kne_easyedit._util.digest import digest
from kne_easyedit._util.settings import public_settings
from kne_easyedit._util.tensor_files import values_digest
from kne_easyedit._version import __version__
from kne_easyedit.editing.applying import set_edits, with_edits
from kne_easyedit.editing.edit_files import StoredDeltas, plain, read_edit, write_edit
from kne_easyedit.editing.lineage import edited
from kne_easyedit.editing.merging import merge_edits
from kne_easyedit.editing.row_edit import RowEdit
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.base import Base, BaseModule, base_of

__all__ = ["Base", "BaseModule", "KNEEdit"]


@dataclass(frozen=True, kw_only=True, eq=False)
class KNEEdit(RowEdit):
    """A trained edit, with all that is needed to use it elsewhere. Frozen; two are equal if they add the same.

    `compute_edit` gives it, ``apply_kne_to_model(..., on_trained=)`` hands it out. It is a `RowEdit`: `write_rows`
    takes it. `apply` writes it so that it can be taken back among others; see `EditStore` for many.
    """

    requests: tuple[Mapping[str, Any], ...]
    """What was asked for, as JSON holds it."""
    base: Base
    """Fingerprint of the model without this edit and those that it was trained on."""
    scaling: Mapping[str, float] = field(default_factory=dict)
    """Module name -> the scale ``alpha / sqrt(n)`` that ``deltas`` contain."""
    ensemble: NeuronEnsemble | None = None
    """The neurons that were trained."""
    hparams: Mapping[str, Any] = field(default_factory=dict)
    """The settings by name, without secrets."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package -> version with which it was trained."""
    trained_on: tuple[str, ...] = ()
    """Digests of the edits that the model had when this one was trained, in their order."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what it adds, for what, and to which model."""
        modules = {name: [one["rows"], one["dtype"], one["sha256"]] for name, one in self._modules.items()}
        return digest(
            [modules, list(self.requests), list(self.losses), list(self.trained_on), asdict(self.base)["modules"]]
        )

    @cached_property
    def _modules(self) -> dict[str, Any]:
        """The rows as `edit.json` describes them."""
        found = {}
        for name in self.deltas:
            if isinstance(self.deltas, StoredDeltas):  # checked when it was loaded, and not read again for this
                chosen = self.deltas.rows[name]
                shape, dtype, sha256 = self.deltas.described(name)
            else:
                chosen, delta = self.deltas[name]
                shape, dtype, sha256 = list(delta.shape), str(delta.dtype).removeprefix("torch."), values_digest(delta)
            found[name] = {
                "rows": list(chosen),
                "shape": shape,
                "dtype": dtype,
                "sha256": sha256,
                "scaling": self.scaling.get(name, 1.0),
            }
        return found

    @cached_property
    def rows(self) -> Mapping[str, tuple[int, ...]]:
        """Module name -> its rows."""
        return {name: tuple(one["rows"]) for name, one in self._modules.items()}

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Probability of an answer token, the geometric mean over all, before every step and at the end."""
        return tuple(math.exp(-loss) for loss in self.losses)

    @property
    def facts(self) -> tuple[str, ...]:
        """Each request as one line: prompt -> new answer."""
        return tuple(f"{one['prompt']} -> {one.get('target_new', '')}" for one in self.requests)

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(map(len, self.rows.values()))

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, KNEEdit) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def shared_rows(self, other: KNEEdit) -> int:
        """How many rows both change."""
        return sum(len({*chosen} & {*other.rows.get(name, ())}) for name, chosen in self.rows.items())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes it into a new folder: ``edit.json`` and ``rows.safetensors``. Half of it is never seen.

        Args:
            folder: Must not exist, or be empty.

        Raises:
            FileExistsError: The folder holds something.
            OSError: It cannot be written.
        """
        write_edit(folder, self, self._modules)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> KNEEdit:
        """Reads and checks a folder that `save` has written. Rows are read again, module by module, when they are used.

        Args:
            folder: The folder.

        Returns:
            The edit.

        Raises:
            FileNotFoundError: The folder or one of its files is missing.
            ValueError: It is something else, of a later version, truncated or changed; the message names file, field
                and value.
            OSError: It cannot be read.
        """
        fields, wanted = read_edit(folder)
        edit = cls(**fields)
        if edit.digest != wanted:
            raise ValueError(
                f"edit: {Path(folder) / 'edit.json'} cannot be used: its content is not what was written (digest: "
                f"{wanted[:12]}, found {edit.digest[:12]}); take the original"
            )
        return edit

    def apply(self, model: nn.Module, *, force: bool = False) -> None:
        """Adds it to the model, in place, on top of the edits that were applied before.

        The weights are then those without edits plus all deltas, added in order in the deltas' precision and rounded
        once. An edit that is applied already stays where it is.

        Args:
            model: The model for which it was trained.
            force: Apply it to another base, too, with a warning. Shapes must fit all the same.

        Raises:
            ValueError: The model is another one (by its fingerprint), cannot be edited, or has edits whose rows are not
                at hand. Nothing was changed.
        """
        before = edited(model)
        if self.digest not in before.digests:
            set_edits(model, (*before.at_hand(), self), force=force)

    def take_back(self, model: nn.Module) -> None:
        """Takes it back: the weights are bit for bit those with the other applied edits alone.

        Args:
            model: A model to which it was applied.

        Raises:
            ValueError: It is not applied, or the weights were changed since by something else. Nothing was changed.
        """
        before = edited(model)
        if self.digest not in before.digests:
            why = "its rows were changed by something else since" if before.lost else "apply it first"
            raise ValueError(f"edit: {self.digest[:12]} is not applied to this model; {why}")
        others = tuple(one for one in before.edits if one.digest != self.digest)
        set_edits(model, replace(before, edits=others).at_hand())

    @contextmanager
    def applied(self, model: nn.Module, *, force: bool = False) -> Iterator[nn.Module]:
        """Inside, it is applied to ``model``; afterwards the weights are bit for bit those from before.

        So they are if a `KNEEdit` is applied or written inside. Take back any other edit (`restore`) before the end: of
        what it has changed, rows that no `KNEEdit` changes stay.

        Args:
            model: The model for which it was trained.
            force: As for `apply`.

        Yields:
            ``model``.

        Raises:
            ValueError: As `apply`.
        """
        before = edited(model)
        others = before.at_hand()
        with with_edits(model, others if self.digest in before.digests else (*others, self), force=force):
            yield model

    def merge_into(
        self, model_folder: str | os.PathLike[str], out_folder: str | os.PathLike[str], *, force: bool = False
    ) -> None:
        """Writes a full model with the edit merged. As `merge_edits`, of this edit alone."""
        merge_edits([self], model_folder, out_folder, force=force)


def kne_edit(
    edit: RowEdit,
    model: nn.Module,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    ensemble: NeuronEnsemble | None,
) -> KNEEdit:
    """The edit that was just trained, as a thing.

    Args:
        edit: The trained rows.
        model: The model, as it was when they were trained.
        requests: What was asked for.
        hparams: The settings.
        ensemble: The neurons.

    Returns:
        The edit. Its base is ``model`` without the edits that it has (`trained_on`).
    """
    state = edited(model)
    alpha = float(hparams.alpha)
    return KNEEdit(
        edit.deltas,
        edit.losses,
        edit.answers,
        requests=tuple(plain(one) for one in requests),
        base=base_of(model, list(edit.deltas), state.originals),
        scaling={name: alpha / math.sqrt(len(chosen)) for name, (chosen, _) in edit.deltas.items()},
        ensemble=ensemble,
        hparams=plain(public_settings(hparams)),
        versions=_versions(),
        trained_on=state.digests,
    )


def _versions() -> dict[str, str]:
    found = {"kne_easyedit": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # noqa: PERF203  (an unusual installation: no metadata)
            continue
    return found
