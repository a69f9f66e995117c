"""Patches of GRACE and WISE, which put a layer of their own in the place of one.

GRACE replaces what its layer gives at one token of a prompt, the last one; the layer must be told which that is.
EasyEdit tells it by the length of the prompt that was edited, whatever prompt is evaluated.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import nn

from kne_easyedit._util.settings import replace_settings
from kne_easyedit.bridge.evaluation_patches import replace_evaluator
from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.patches import runtime_patch

_LAST = -1
"""The last token of what a layer is given."""
_POSITION = "kne_position"
"""The attribute by which a layer knows the token that it looks at."""
_WHOLE = "kne_whole_texts"
"""The attribute of layers that decide by a text from its beginning."""


def _of(name: str) -> Any:
    """A module of EasyEdit's below ``easyeditor``, if this version has it."""
    return sys.modules.get(f"easyeditor.{name}")


@runtime_patch(
    "codebook-position",
    "GRACE: evaluators compare generated tokens with the answer's without the blank before it, one prompt's position "
    "serves all prompts: figures that no other method's can be compared with",
)
def _codebook_position(easyeditor: ModuleType) -> bool:
    grace, evaluators = _of("models.grace.GRACE"), module("evaluate.evaluate_utils")
    if grace is None:
        return False
    layer, editor = grace.GRACEAdapter, grace.GRACE
    forward, generate = layer.forward, editor.generate

    @functools.wraps(forward)
    def at_its_position(self, *args):
        if not self.training:
            self.key_id = getattr(self, _POSITION)
        return forward(self, *args)

    @functools.wraps(generate)
    def generate_after(self, *args, **kwargs):
        with at_position(self.model, _prompt_of(args, kwargs).shape[1] - 1):
            return generate(self, *args, **kwargs)

    setattr(layer, _POSITION, _LAST)
    setattr(layer, _WHOLE, True)
    layer.forward, editor.generate = at_its_position, generate_after
    replace_evaluator(_prompt_by_prompt(evaluators.test_prediction_acc, layer))
    evaluate = module("evaluate.evaluate")
    original = evaluate.compute_edit_quality

    @functools.wraps(original)
    def compute_edit_quality(model, model_name, hparams, *args, **kwargs):
        if isinstance(hparams, easyeditor.GraceHyperParams):  # the evaluators know the method by its name
            hparams = replace_settings(hparams, alg_name=f"{hparams.alg_name}, teacher-forced")
        return original(model, model_name, hparams, *args, **kwargs)

    holders: list[Any] = [m for name, m in sorted(sys.modules.items()) if name.startswith("easyeditor.")]
    for holder in holders:
        if getattr(holder, "compute_edit_quality", None) is original:
            holder.compute_edit_quality = compute_edit_quality
    return True


@contextlib.contextmanager
def at_position(model: nn.Module, position: int) -> Iterator[None]:
    """Inside, GRACE's layer in a model looks at one token of what the model is given, instead of the last one.

    Teacher-forced passes need it: there the last token of the prompt is not the last of the text. It changes nothing in
    a model without such a layer.

    Args:
        model: The edited model.
        position: Of the prompt's last token, in all rows.
    """
    layers: list[Any] = [part for part in model.modules() if hasattr(type(part), _POSITION)]
    try:
        for layer in layers:
            setattr(layer, _POSITION, position)
        yield
    finally:
        for layer in layers:
            setattr(layer, _POSITION, _LAST)


def reads_whole_texts(model: nn.Module) -> bool:
    """Whether a layer of the model decides by a text from its beginning: GRACE's by its prompt, WISE's by all of it.

    Token by token, from a cache of the tokens before, such a layer would see only the last one. Texts of such a model
    are generated one by one, without a cache, as EasyEdit's evaluators do, and `at_position` of the prompt's end.
    """
    return any(hasattr(type(part), _WHOLE) for part in model.modules())


def _prompt_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return kwargs["input_ids"] if "input_ids" in kwargs else args[0]


def _prompt_by_prompt(original: Any, kind: type) -> Any:
    """EasyEdit's evaluator; a model with a layer of a kind gets its prompts one by one, each with its own position."""

    @functools.wraps(original)
    def test_prediction_acc(model, tok, hparams, prompts, targets, *args, **kwargs):
        if not any(isinstance(part, kind) for part in model.modules()):
            return original(model, tok, hparams, prompts, targets, *args, **kwargs)
        found: list[Any] = []
        for prompt, target in zip(*([x] if isinstance(x, str) else x for x in (prompts, targets))):
            with at_position(model, len(tok(prompt)["input_ids"]) - 1):
                found += original(model, tok, hparams, prompt, target, *args, **kwargs)
        return found

    return test_prediction_acc


@runtime_patch(
    "mask-seed", "WISE draws the mask of its weights from numpy's generator: an edit depends on what was drawn before"
)
def _mask_seed(easyeditor: ModuleType) -> bool:
    wise = _of("models.wise.WISE")
    if wise is None:
        return False
    layer = wise.WISEAdapter
    original = layer.generate_activation_mask

    @functools.wraps(original)
    def generate_activation_mask(self, mask_ratio):
        """By a seed that torch's generator gives, as every other draw of an edit."""
        state = numpy.random.get_state()
        numpy.random.seed(int(torch.randint(2**31, (1,))))
        try:
            return original(self, mask_ratio)
        finally:
            numpy.random.set_state(state)

    layer.generate_activation_mask = generate_activation_mask
    return True


@runtime_patch("wrapper-name", "WISE: text for the fluency metric is asked of a wrapper without a name: AttributeError")
def _wrapper_name(easyeditor: ModuleType) -> bool:
    wise = _of("models.wise.WISE")
    if wise is None or hasattr(wise.WISE, "name_or_path"):
        return False
    wise.WISE.name_or_path = property(lambda self: self._modules["model"].name_or_path)
    return True


@runtime_patch(
    "sequence-of-layers",
    "WISE: every edit of a sequence begins anew and loses those before, unless its settings have an attribute that its "
    "class does not know",
)
def _sequence_of_layers(easyeditor: ModuleType) -> bool:
    wise = _of("models.wise.WISE")
    if wise is None or "sequential_edit" not in inspect.getsource(wise.WISE.__init__):
        return False
    original = wise.WISE.__init__

    @functools.wraps(original)
    def init(self, config, *args, **kwargs):
        if not hasattr(config, "sequential_edit"):
            # An edit that is undone takes its layer away: one that is there belongs to an edit that stays.
            config.sequential_edit = True
        original(self, config, *args, **kwargs)

    wise.WISE.__init__ = init
    return True


@runtime_patch(
    "decision-for-each-prompt",
    "WISE decides by the mean over all prompts of a batch, padding included, whether they get the edited weights",
)
def _decision_for_each_prompt(easyeditor: ModuleType) -> bool:
    wise, evaluators = _of("models.wise.WISE"), module("evaluate.evaluate_utils")
    if wise is None:
        return False
    layer = wise.WISEAdapter
    forward = layer.forward

    @functools.wraps(forward)
    def one_by_one(self, inputs):
        if self.editing or len(inputs) == 1:
            return forward(self, inputs)
        return torch.cat([forward(self, row) for row in inputs.split(1)])

    layer.forward = one_by_one
    setattr(layer, _WHOLE, True)
    replace_evaluator(_prompt_by_prompt(evaluators.test_prediction_acc, layer))
    return True
