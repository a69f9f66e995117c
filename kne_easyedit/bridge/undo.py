"""Undoes edits by what each method returns for it, and after any error, Ctrl-C included.

EasyEdit keeps the originals of an edit in a local variable while it evaluates: an interrupt then leaves an edited model
that cannot be restored. The patch ``interrupted-edits`` records what an editor's call applies, and undoes it.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType, ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from kne_easyedit.bridge.importing import is_legacy
from kne_easyedit.bridge.methods import NAME, traits_of
from kne_easyedit.bridge.patches import runtime_patch
from kne_easyedit.bridge.runtime_patches import switches_restorer
from kne_easyedit.editing.row_edit import RowEdit, restore
from kne_easyedit.models.weights import weight_of

Result = TypeVar("Result")
EDITS = ("edit", "batch_edit", "edit_requests", "normal_edit", "generate_edit", "edit_dataset")
"""Methods of EasyEdit's editor that edit, as far as a version has them."""


class Undo:
    """Originals of all edits of a model so far. What several edits change is kept once, as it was before the first."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._steps: list[Callable[[], None]] = []
        self._layers = [(module, dict(module._modules)) for module in model.modules()]

    def __bool__(self) -> bool:
        return bool(self._steps)

    def remember_rows(self, edit: RowEdit) -> None:
        """Keeps the rows that KNE is about to write, before they are written: the edit can be undone at any moment."""
        self._last(_Rows).keep(edit)

    def expect(self, alg_name: str) -> None:
        """Prepares for an edit that is about to begin: one that is interrupted may have replaced a layer already."""
        if traits_of(alg_name).replaces_layer and not self._steps:
            self._steps.append(self._restore_layers)

    def remember(self, edited: Any, originals: Any, alg_name: str = "") -> bool:
        """Keeps what a method of EasyEdit has returned for undoing its edit. False if that is nothing."""
        if traits_of(alg_name).replaces_layer:
            self.expect(alg_name)
        elif callable(originals):
            self._steps.append(torch.no_grad()(originals))
        elif hasattr(edited, "peft_config"):
            if edited is not self.model:  # else the adapter of an edit before was trained on
                self._steps.append(lambda: self._unload(edited))
        elif isinstance(originals, Mapping) and originals:
            self._last(_Matrices).keep(originals)
        else:
            return False
        return True

    def restore_all(self) -> None:
        """Undoes every edit, the last one first. A step that fails is repeated by the next call, which is harmless."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def _last(self, kind: Any) -> Any:
        if not self._steps or type(self._steps[-1]) is not kind:
            self._steps.append(kind(self.model))
        return self._steps[-1]

    def _restore_layers(self) -> None:
        for module, layers in self._layers:
            module._modules.update(layers)

    def _unload(self, adapted: Any) -> None:
        adapted.unload()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config


class _Matrices:
    """Whole matrices by parameter name, those of the first edit that gives them."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.originals: dict[str, torch.Tensor] = {}

    def keep(self, originals: Mapping[str, torch.Tensor]) -> None:
        for name, value in originals.items():
            self.originals.setdefault(name, value)

    def __call__(self) -> None:
        restore(self.model, self.originals)


class _Rows:
    """Rows of matrices, each as it was before the first edit that writes it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.known: dict[str, set[int]] = {}
        self.originals: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def keep(self, edit: RowEdit) -> None:
        for name, (chosen, _) in edit.deltas.items():
            known = self.known.setdefault(name, set())
            new = [row for row in chosen if row not in known]
            if new:
                index = torch.tensor(new)
                self.originals.append((name, index, weight_of(self.model, name)[index]))
                known.update(new)

    @torch.no_grad()
    def __call__(self) -> None:
        for name, index, values in self.originals:
            weight_of(self.model, name)[index] = values


# After any error


@runtime_patch(
    "interrupted-edits",
    "an error while an edit is evaluated, Ctrl-C too, leaves the edit in the model: its originals are lost",
)
def _interrupted_edits(easyeditor: ModuleType) -> bool:
    editor = easyeditor.BaseEditor
    legacy = is_legacy(editor)
    for name in EDITS:
        if hasattr(editor, name):
            setattr(editor, name, _safe(getattr(editor, name), legacy))
    return True


def _safe(method: Callable, legacy: bool) -> Callable:
    @functools.wraps(method)
    def safe(self, *args, **kwargs):
        if not isinstance(self.model, nn.Module) or isinstance(
            self.apply_algo, _Recorder
        ):  # edit() calls edit_requests()
            return method(self, *args, **kwargs)
        model, apply, put_back = self.model, self.apply_algo, switches_restorer(self.model)
        recorder = _Recorder(apply, Undo(model), self.alg_name, legacy)

        def work():
            self.apply_algo = recorder
            return method(self, *args, **kwargs)

        def undo() -> None:
            recorder.undo.restore_all()
            self.model = model
            put_back()

        def finish() -> None:
            self.apply_algo = apply

        return undo_on_errors(work, undo, finish)

    return safe


class _Recorder:
    """An editor's method that records how to undo its edits."""

    def __init__(self, apply: Callable, undo: Undo, alg_name: str, legacy: bool) -> None:
        self.apply, self.undo, self.alg_name, self.legacy = apply, undo, alg_name, legacy

    def __call__(self, *args, **kwargs):
        if self.alg_name == NAME:
            return self.apply(*args, **{**kwargs, "on_rows": self.undo.remember_rows})
        # Before May 2024 originals were given only to who asked for them, and written back by the editor if it got any.
        asked = not self.legacy or kwargs.get("keep_original_weight")
        if not asked or traits_of(self.alg_name).originals_if_asked:
            kwargs = {**kwargs, "keep_original_weight": True}
        self.undo.expect(self.alg_name)
        result = self.apply(*args, **kwargs)
        if not (isinstance(result, tuple) and len(result) == 2):  # prompts of in-context editing
            return result
        edited, originals = result
        self.undo.remember(edited, originals, self.alg_name)
        return edited, originals if asked or callable(originals) else {}


def undo_on_errors(
    work: Callable[[], Result], undo: Callable[[], None], finish: Callable[[], None] = lambda: None
) -> Result:
    """Calls ``work()``, and ``undo()`` after any exception in it, Ctrl-C included.

    A SIGINT in ``undo`` or ``finish``, or between them, waits until they are done: only ``work`` is interrupted. One
    after ``work``, but before its result is returned, undoes it, too.

    Args:
        work: The work.
        undo: Undoes it, also in part.
        finish: Always called at the end.

    Returns:
        The result of ``work``.
    """
    waiting = _Waiting(sys._getframe())
    undone = False
    try:
        waiting.begin()
        result = work()
        waiting.closing = True
    except BaseException:
        waiting.closing = undone = True
        undo()
        raise
    finally:
        waiting.closing = True
        finish()
        if waiting.came and not undone:
            undo()
        waiting.end()
    return result


class _Waiting:
    """A handler of SIGINT that passes it on to the previous one while ``work`` runs, and else makes it wait.

    Python calls it with the frame that it interrupts: if that is ``frame`` itself, ``work`` has not begun or has ended.
    """

    def __init__(self, frame: FrameType) -> None:
        self.frame: FrameType | None = frame
        self.closing = self.came = False
        self.before: Callable[[int, FrameType | None], Any] | None = None

    def begin(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        # Elsewhere no signal arrives, or it is ignored, or it ends the process.
        if threading.current_thread() is threading.main_thread() and callable(before):
            self.before = before
            signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.closing or frame is self.frame:
            self.came = True
        elif self.before is not None:
            self.before(number, frame)

    def end(self) -> None:
        """Restores the previous handler, and passes on a signal that has waited."""
        frame, self.frame = self.frame, None
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            if self.came:
                self.before(signal.SIGINT, frame)
