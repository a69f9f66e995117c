"""Edits in an order, as one."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from kne_easyedit.editing.applying import set_edits, with_edits
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.editing.merging import merge_edits


@dataclass(frozen=True)
class EditStack:
    """Edits of one base, in the order in which they are added."""

    edits: tuple[KNEEdit, ...]

    def apply(self, model: nn.Module, *, force: bool = False) -> None:
        """Makes the weights those without edits plus these edits, in place; any other edit is taken back.

        Args:
            model: The model for which they were trained.
            force: Apply them to another base, too, with a warning. Shapes must fit all the same.

        Raises:
            ValueError: The model is another one (by its fingerprint) or cannot be edited. Nothing was changed.
            OSError: A stored edit cannot be read; the weights were put back.
        """
        set_edits(model, self.edits, force=force)

    def applied(self, model: nn.Module, *, force: bool = False) -> AbstractContextManager[nn.Module]:
        """Inside, the model has exactly these edits; afterwards the weights are bit for bit those from before.

        Args:
            model: The model for which they were trained.
            force: As for `apply`.

        Returns:
            A context that gives ``model``.
        """
        return with_edits(model, self.edits, force=force)

    def merge_into(
        self, model_folder: str | os.PathLike[str], out_folder: str | os.PathLike[str], *, force: bool = False
    ) -> None:
        """Writes a full model with these edits merged, from the files of the base (`merge_edits`)."""
        merge_edits(self.edits, model_folder, out_folder, force=force)
