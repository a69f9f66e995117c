"""One method on one loaded model through EasyEdit: edit, evaluate, undo, in that order or any other.

EasyEdit's own ``edit`` evaluates, edits and undoes in one call, differently in every version. Here the same pieces
(its method, its evaluator) are called one by one, so that records can be edited alone, in batches or in a row, facts
can be evaluated again later, and evaluations before the edit can be shared by all methods.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy
import torch
from torch import nn

from kne_easyedit._util.settings import replace_settings
from kne_easyedit.bridge.importing import is_legacy, module
from kne_easyedit.bridge.methods import (
    ACCUMULATING,
    NAME,
    ONE_FACT,
    ORIGINALS_IF_ASKED,
    SCRIPTS,
    require_request,
    require_undoable,
)
from kne_easyedit.bridge.registry import editor_for, register
from kne_easyedit.bridge.text_source import TextSource, current_text_source, use_text_source
from kne_easyedit.bridge.undo import Undo, undone_on_errors
from kne_easyedit.editing.row_edit import RowEdit
from kne_easyedit.models.state import seed_generators

_LOSS = re.compile(r"^(?:Batch )?loss ([\d.]+(?:e[+-]?\d+)?)", re.MULTILINE)
"""How EasyEdit's FT, LoRA (``Batch loss 1.2``), ROME and MEMIT (``loss 1.2 = ...``) print a step's loss."""


class MethodEditor:
    """EasyEdit's editor of one method, driven step by step. ``hparams`` are of that method's class.

    Raises ValueError, with the reason, for a method whose edits could not be undone, or that lacks what it needs.
    """

    def __init__(self, hparams, model: nn.Module, tokenizer, *, text_source: TextSource | None = None):
        register()
        require_undoable(hparams)
        self.editor = editor_for(hparams, model, tokenizer)
        self.hparams, self.tokenizer = self.editor.hparams, tokenizer
        self.text_source = text_source or current_text_source()
        """Text for second moments; without the argument that of the enclosing `use_text_source`, or the default one."""
        self.original = model
        self.model = model
        """What evaluations see: the model, or the adapted model that a method has put around it."""
        self.losses: list[float] = []
        """Losses of the last edit's training, step by step; EasyEdit's methods print theirs. Empty for methods without."""
        self.on_step: Callable[[int, float], None] | None = None
        """Is told KNE's training steps and their losses; other methods tell nothing before they end."""
        self.keeps_earlier_edits = False
        """Whether the edits of a sequence stay when a later one fails."""
        self._undo = Undo(model)

    def require_batch(self, size: int) -> None:
        """Raises ValueError if this method cannot edit ``size`` facts at once; tells it how many otherwise."""
        alg_name = self.hparams.alg_name
        if size > 1 and (
            alg_name in ONE_FACT or not module("editors.batch_editor").BatchEditor.is_batchable_method(alg_name)
        ):
            raise ValueError(
                f"batch_size: {alg_name} edits one fact at a time, not {size}; EasyEdit counts it among the singleton methods"
            )
        if hasattr(self.hparams, "batch_size"):
            self.hparams.batch_size = size

    def require_sequence(self) -> None:
        """Raises ValueError if this method cannot edit on top of an edit of its own."""
        if self.hparams.alg_name == "LoRA" and is_legacy():
            raise ValueError(
                "mode: LoRA of the EasyEdit of 2023 begins a new adapter with every edit and loses those before; take a newer EasyEdit"
            )

    def apply(self, requests: Sequence[Mapping]) -> None:
        """Edits all requests at once, on top of the edits before. After an error all of them are undone, unless
        `keeps_earlier_edits`; after an interrupt always.

        What a method of EasyEdit has changed when it fails half-way, it does not tell: compare the model's digest.
        """
        alg_name = self.hparams.alg_name
        for request in requests:
            require_request(alg_name, request)
        if self._undo:
            self.require_sequence()
        printed = _Tee(sys.stdout)
        own = {"on_trained": self._trained, "on_step": self.on_step} if alg_name == NAME else {}
        if alg_name in ACCUMULATING:
            own["reset_cache"] = not self._undo  # else it goes by edits that were undone
        self.losses = []

        failed: list[Exception] = []

        def edit() -> None:
            try:
                with contextlib.redirect_stdout(printed), use_text_source(self.text_source):
                    edited, originals = self.editor.apply_algo(
                        self.original,
                        self.tokenizer,
                        [dict(request) for request in requests],
                        self.hparams,
                        copy=False,
                        return_orig_weights=alg_name != NAME,
                        keep_original_weight=is_legacy() or alg_name in ORIGINALS_IF_ASKED,
                        **own,
                    )
                if alg_name != NAME and not self._undo.remember(edited, originals, alg_name):
                    raise ValueError(f"methods: {alg_name} gives nothing by which its edit could be undone; {SCRIPTS}")
                self.losses = self.losses or [float(loss) for loss in _LOSS.findall(printed.getvalue())]
                self.model = edited
            except Exception as error:
                if not self.keeps_earlier_edits:
                    raise
                failed.append(error)

        undone_on_errors(edit, self.undo)
        if failed:
            raise failed[0]

    def _trained(self, edit: RowEdit) -> None:
        self.losses.extend(edit.losses)
        self._undo.remember_rows(edit)

    def undo(self) -> None:
        """Takes every edit back, the last one first."""
        self._undo.take_back()
        self.model = self.original

    def evaluate(self, request: Mapping, *, generation: bool, seed: int) -> dict:
        """EasyEdit's figures for one request on the model as it is: its ``compute_edit_quality``.

        ``generation`` adds fluency, which samples text: under ``seed``, whatever ran before.
        """
        seed_generators(seed)
        evaluate = module("evaluate").compute_edit_quality
        with torch.no_grad():
            return evaluate(
                self.model,
                self.editor.model_name,
                self._evaluation_hparams(),
                self.tokenizer,
                dict(request),
                self.hparams.device,
                test_generation=generation,
            )

    def _evaluation_hparams(self):
        # Prompts arrive with their template (see records.with_chat_template); EasyEdit's evaluator must not add it again.
        if getattr(self.hparams, "use_chat_template", False):
            return replace_settings(self.hparams, use_chat_template=False)
        return self.hparams


class _Tee(io.StringIO):
    """Keeps what is written and passes it on."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        return super().write(text)


def compare(pre: Mapping, post: dict) -> dict:
    """``post`` with every locality category's ``_acc`` in the place of its ``_output``: the share of tokens as in ``pre``.

    Where texts were generated (``_gen_content``, by ``evaluation_type``) they stay, and ``_acc`` is 1 for the same text, else 0.
    """
    locality = {}
    for name, outputs in post.get("locality", {}).items():
        if name.endswith("_gen_content"):
            texts = zip(outputs, pre["locality"][name], strict=True)
            locality |= {
                name: outputs,
                f"{name.removesuffix('_gen_content')}_acc": [float(now == before) for now, before in texts],
            }
        elif name.endswith("_output"):
            before = pre["locality"][name]
            if len(before) != len(outputs):
                raise ValueError(f"{name}: {len(before)} outputs before the edit, {len(outputs)} after it")
            locality[f"{name.removesuffix('_output')}_acc"] = [
                float(numpy.mean(numpy.equal(a, b))) for a, b in zip(outputs, before)
            ]
        else:
            locality[name] = outputs
    return {**post, "locality": locality}
