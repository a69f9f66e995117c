"""The forward pass of training, without the layers that no trained row can change.

Decoder layers below the first one with trained rows give the same states at every step: their parameters are frozen,
and the model is in evaluation mode. So they run once for each batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kne_easyedit.editing.losses import answer_logits
from kne_easyedit.editing.reading import Reading
from kne_easyedit.facts.encoding import Batch
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.fixed_layers import fixed_outputs

KEPT = 16
"""Batches whose states are kept, ``(texts, tokens, hidden)`` each; those of further ones are computed every time."""

logger = logging.getLogger(__name__)


class TrainingPass:
    """`answer_logits` of a model while rows of ``ensemble`` are trained: bit for bit what the whole model gives.

    This is checked, not assumed: the first batch is run in both ways. A model whose layers are no chain (some share
    keys and values with layers below) or that does not repeat its own bits is run as a whole at every step.

    Args:
        model: A causal language model of transformers, inside `preserve_state`.
        ensemble: The rows that are trained. All others must stay as they are while this object is used.
    """

    def __init__(self, model: nn.Module, ensemble: NeuronEnsemble):
        self._model = model
        self._below = layers_below(model, ensemble)
        self._kept: dict[tuple, Any] = {}
        self._checked = False

    def answer_logits(self, batch: Batch | Reading) -> tuple[Tensor, Tensor]:
        """The logits that predict the answers' tokens, and these tokens: see `losses.answer_logits`."""
        if not self._below:
            return answer_logits(self._model, batch)
        key = (tuple(batch.input_ids.shape), *(_numbers(t) for t in (batch.input_ids, batch.attention_mask)))
        if key in self._kept:
            return self._above(batch, self._kept[key])
        found: list[Any] = []
        # Copied, here and where it is used: a layer above may change it in place.
        hook = self._below[-1].register_forward_hook(lambda layer, args, out: found.append(_copy(out)))
        try:
            predicted, labels = answer_logits(self._model, batch)
        finally:
            hook.remove()
        if not self._checked:
            self._checked = True
            # The graph of the whole pass is freed before that of the shorter one is built, which is trained with.
            predicted = predicted.detach()
            if (again := self._above_if_equal(batch, found, predicted)) is None:
                self._below = []
                return answer_logits(self._model, batch)
            predicted = again
        if len(self._kept) < KEPT and len(found) == 1:
            self._kept[key] = found[0]
        return predicted, labels

    def _above_if_equal(self, batch: Batch | Reading, found: Sequence[Any], whole: Tensor) -> Tensor | None:
        """The logits without the layers below; None if they are not bit for bit those of the ``whole`` model."""
        kind = type(self._model).__name__
        if len(found) != 1:
            logger.info("%s calls a layer below the edited ones %d times; all layers run", kind, len(found))
            return None
        try:
            predicted, _ = self._above(batch, found[0])
        except Exception as error:  # noqa: BLE001  (whatever a model needs these layers for, running them is right)
            logger.info("%s needs the layers below the edited ones at every step (%s); all run", kind, error)
            return None
        if not torch.equal(predicted, whole):
            logger.info("%s without the layers below the edited ones gives other results; all run", kind)
            return None
        return predicted

    def _above(self, batch: Batch | Reading, states: Any) -> tuple[Tensor, Tensor]:
        with fixed_outputs(self._below, [_copy(states)] * len(self._below)):
            return answer_logits(self._model, batch)


def layers_below(model: nn.Module, ensemble: NeuronEnsemble) -> list[nn.Module]:
    """The decoder layers before the first one with rows of ``ensemble``; none if these are in more than one stack."""
    targets = [target for target, _ in ensemble.targets(model).values()]
    if len({target.layers_path for target in targets}) != 1:
        return []
    layers = cast(nn.ModuleList, model.get_submodule(targets[0].layers_path))
    return list(layers[: min(min(target.layers) for target in targets)])


def _copy(states: Any) -> Any:
    """The output of a layer, a tensor or a tuple with tensors, with tensors of its own."""
    if isinstance(states, tuple):
        return tuple(map(_copy, states))
    return states.clone() if isinstance(states, Tensor) else states


def _numbers(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.flatten().tolist())
