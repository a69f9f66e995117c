"""One method on one loaded model through EasyEdit: edit, evaluate, undo, in any order.

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
from typing import Any

import numpy
import torch
from torch import nn

from kne_easyedit._util.settings import replace_settings
from kne_easyedit.bridge.importing import is_legacy, module
from kne_easyedit.bridge.methods import NAME, SCRIPTS, require_request, require_undoable, traits_of
from kne_easyedit.bridge.registry import editor_for, register
from kne_easyedit.bridge.text_source import TextSource, current_text_source, use_text_source
from kne_easyedit.bridge.undo import Undo, undo_on_errors
from kne_easyedit.bridge.unrelated import with_unrelated
from kne_easyedit.editing.row_edit import RowEdit
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.models.state import seed_generators

_LOSS = re.compile(r"^(?:Batch )?loss ([\d.]+(?:e[+-]?\d+)?)", re.MULTILINE)
"""How EasyEdit's FT, LoRA (``Batch loss 1.2``), ROME and MEMIT (``loss 1.2 = ...``) print a step's loss."""


class MethodEditor:
    """EasyEdit's editor of one method, called step by step.

    Args:
        hparams: An object of the method's class.
        model: The loaded model. EasyEdit moves it to ``hparams.device``.
        tokenizer: That of the model. The editor has a copy (``tokenizer``), padded as the method needs it.
        text_source: The text for second moments (MEMIT and related methods). None: that of the enclosing
            `use_text_source`, or the default one.

    Raises:
        ValueError: The method's edits cannot be undone, or it lacks something that it needs.
    """

    def __init__(
        self, hparams: Any, model: nn.Module, tokenizer: Tokenizer, *, text_source: TextSource | None = None
    ) -> None:
        register()
        require_undoable(hparams)
        self.editor = editor_for(hparams, model, tokenizer)
        self.hparams, self.tokenizer = self.editor.hparams, self.editor.tok
        self.text_source = text_source or current_text_source()
        self.original = model
        self.model = model
        """The model of evaluations: the original, or the adapted model that a method has put around it."""
        self.losses: list[float] = []
        """Losses of the last edit's training, step by step, as far as the method prints them."""
        self.on_step: Callable[[int, float], None] | None = None
        """Called with KNE's training steps and their losses. Other methods report nothing before they end."""
        self.keeps_earlier_edits = False
        """Whether the edits of a sequence stay when a later one fails."""
        self._undo = Undo(model)

    def require_batch(self, size: int) -> None:
        """Sets the number of facts of an edit. Raises ValueError if this method cannot edit so many at once."""
        alg_name = self.hparams.alg_name
        if size > 1 and not is_batchable(alg_name):
            raise ValueError(
                f"batch_size: {alg_name} edits one fact at a time, not {size}; "
                f"EasyEdit counts it among the singleton methods"
            )
        if hasattr(self.hparams, "batch_size"):
            self.hparams.batch_size = size

    def require_sequence(self) -> None:
        """Raises ValueError if this method cannot edit on top of an edit of its own."""
        alg_name = self.hparams.alg_name
        if traits_of(alg_name).restarts_in_2023 and is_legacy():
            raise ValueError(
                f"mode: {alg_name} of the EasyEdit of 2023 begins a new adapter with every edit and loses those "
                f"before; take a newer EasyEdit"
            )

    def apply(self, requests: Sequence[Mapping]) -> None:
        """Edits all requests at once, on top of earlier edits.

        After an error all edits are undone, unless `keeps_earlier_edits`; after an interrupt always. A method of
        EasyEdit that fails half-way does not report what it has changed: compare the model's digest.

        Args:
            requests: Facts as EasyEdit's methods take them.

        Raises:
            ValueError: A request lacks a field, or the method returns nothing by which it could be undone.
        """
        alg_name = self.hparams.alg_name
        method = traits_of(alg_name)
        requests = [with_unrelated(alg_name, request) for request in requests]
        for request in requests:
            require_request(alg_name, request)
        if self._undo:
            self.require_sequence()
        printed = _Tee(sys.stdout)
        own: dict[str, Any] = {"on_rows": self._trained, "on_step": self.on_step} if alg_name == NAME else {}
        if method.accumulates:
            own["reset_cache"] = not self._undo  # else it would use edits that were undone
        self.losses = []

        failed: list[Exception] = []

        def edit() -> None:
            try:
                self._undo.expect(alg_name)
                with contextlib.redirect_stdout(printed), use_text_source(self.text_source):
                    edited, originals = self.editor.apply_algo(
                        self.original,
                        self.tokenizer,
                        [dict(request) for request in requests],
                        self.hparams,
                        copy=False,
                        return_orig_weights=alg_name != NAME,
                        keep_original_weight=is_legacy() or method.originals_if_asked,
                        **own,
                    )
                if alg_name != NAME and not self._undo.remember(edited, originals, alg_name):
                    raise ValueError(f"methods: {alg_name} gives nothing by which its edit could be undone; {SCRIPTS}")
                self.losses = self.losses or [float(loss) for loss in _LOSS.findall(printed.getvalue())]
                # A replaced layer works in the model itself, which evaluators know better than a wrapper around it.
                self.model = self.original if method.replaces_layer else edited
            except Exception as error:
                if not self.keeps_earlier_edits:
                    raise
                failed.append(error)

        undo_on_errors(edit, self.undo)
        if failed:
            raise failed[0]

    def _trained(self, edit: RowEdit) -> None:
        self.losses.extend(edit.losses)
        self._undo.remember_rows(edit)

    def undo(self) -> None:
        """Undoes every edit, the last one first."""
        self._undo.restore_all()
        self.model = self.original

    def evaluate(self, request: Mapping, *, generation: bool, seed: int) -> dict:
        """Evaluates one request on the model as it is, by EasyEdit's ``compute_edit_quality``.

        Args:
            request: A fact with its probes.
            generation: Whether to sample text for the fluency metric.
            seed: Seed of all generators, so that samples do not depend on earlier ones.

        Returns:
            EasyEdit's metrics.
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

    def _evaluation_hparams(self) -> Any:
        # Prompts have their template already (records.with_chat_template); EasyEdit's evaluator must not add it again.
        if getattr(self.hparams, "use_chat_template", False):
            return replace_settings(self.hparams, use_chat_template=False)
        return self.hparams


def is_batchable(alg_name: str) -> bool:
    """Whether a method edits several facts at once."""
    batchable = module("editors.batch_editor").BatchEditor.is_batchable_method
    return not traits_of(alg_name).one_fact and batchable(alg_name)


class _Tee(io.StringIO):
    """Records what is written and passes it on."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        return super().write(text)


def compare(pre: Mapping, post: dict) -> dict:
    """Computes locality from two evaluations.

    Args:
        pre: Metrics before the edit.
        post: Metrics after it.

    Returns:
        ``post``, where every locality category has ``_acc``, the share of tokens as in ``pre``, instead of its
        ``_output``. Generated texts (``_gen_content``, by ``evaluation_type``) stay; their ``_acc`` is 1 for the same
        text, else 0.

    Raises:
        ValueError: The two have different numbers of outputs.
    """
    locality: dict[str, Any] = {}
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
