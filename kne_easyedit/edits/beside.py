"""Edits of quantised bases: nothing can be added to the weights, so what they add is computed beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from kne_easyedit.editing.applying import require_base
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.edits.low_rank import Rows, summed
from kne_easyedit.models.layer_kinds import is_bitsandbytes
from kne_easyedit.models.targets import resolve_target
from kne_easyedit.models.weights import linear_module


def rows_beside(model: nn.Module, edits: Sequence[KNEEdit], *, force: bool = False) -> Mapping[str, Rows] | None:
    """What edits add to a quantised base, for `kept_answers.rows_added`; None if they can be applied instead.

    Args:
        model: A loaded model.
        edits: The edits, in their order.
        force: Take edits of another base, too, with a warning. Shapes must fit all the same.

    Raises:
        ValueError: The base is quantised, and an edit is of another one.
    """
    names = {name for edit in edits for name in edit.rows}
    if not any(is_bitsandbytes(linear_module(model, name)) for name in names):
        return None
    require_base(model, edits, force=force)
    return summed(edits)


def kept_beside(model: nn.Module, hparams: Any) -> bool:
    """Whether edits under these settings are kept beside the model's weights, since these are quantised."""
    targets = [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]
    return any(is_bitsandbytes(module) for target in targets for module in target.modules)
