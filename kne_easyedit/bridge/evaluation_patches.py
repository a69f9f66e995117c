"""Patches of EasyEdit's evaluators."""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.patches import runtime_patch

PADDING = "prediction-padding"


def replace_evaluator(new: Any) -> None:
    """Puts a function in the place of the one that predicts answers' tokens, wherever the evaluators find it."""
    for holder in (module("evaluate.evaluate_utils"), module("evaluate.evaluate")):
        if hasattr(holder, "test_prediction_acc"):
            holder.test_prediction_acc = new


@runtime_patch(
    PADDING,
    "ROME, MEMIT, EMMET: probes are padded at the right and read as if at the left: PORT and LOC are of other tokens "
    "where prompts of a category differ in length (before 2025)",
)
def _prediction_padding(easyeditor: ModuleType) -> bool:
    original = module("evaluate.evaluate_utils").test_prediction_acc
    if "padding_side" in inspect.getsource(original):
        return False

    @functools.wraps(original)
    def padded_at_the_left(model, tok, *args, **kwargs):
        side, tok.padding_side = tok.padding_side, "left"
        try:
            return original(model, tok, *args, **kwargs)
        finally:
            tok.padding_side = side

    replace_evaluator(padded_at_the_left)
    return True
