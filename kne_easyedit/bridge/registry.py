"""Make EasyEdit know KNE, and hand it models that are already loaded."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import logging
import re
from pathlib import Path
from types import ModuleType

import yaml
from torch import nn

from kne_easyedit.bridge.importing import load
from kne_easyedit.editing import apply_kne_to_model
from kne_easyedit.hparams import KNEHyperParams

logger = logging.getLogger(__name__)

NAME = "KNE"
RIGHT_PADDED = ("ROME", "MEMIT", "EMMET", "EAMET", "R-ROME", "AlphaEdit", "CORE", "SPHERE")
"""Methods for which EasyEdit sets right padding; all others get left padding."""


class LoadedModel(str):
    """A model's name that carries the loaded model: what EasyEdit takes in the place of ``model_name``.

    Its editor loads only what is exactly a ``str``; anything else it unpacks as ``model, tokenizer``. The
    evaluators ask for text methods only. So one model serves all methods, under any name.
    """

    model: nn.Module
    tokenizer: object

    def __new__(cls, name: str, model: nn.Module, tokenizer) -> LoadedModel:
        self = super().__new__(cls, name)
        self.model, self.tokenizer = model, tokenizer
        return self

    def __iter__(self):
        return iter((self.model, self.tokenizer))

    def __deepcopy__(self, memo) -> str:
        return str.__str__(self)  # results and settings are copied; the model never should be

    def __reduce__(self):
        return str, (str.__str__(self),)


def register() -> ModuleType:
    """Imports EasyEdit and makes ``alg_name: KNE`` work in it; returns the package. Twice is harmless.

    Raises EasyEditNotFound if there is no EasyEdit, ValueError if something else is registered as KNE.
    """
    easyeditor = load()
    methods = _submodule("util.alg_dict").ALG_DICT
    known = methods.get(NAME)
    if known is not None and getattr(known, "func", known) is not apply_kne_to_model:
        raise ValueError(f"EasyEdit: ALG_DICT[{NAME!r}] is {known!r} already; remove it, or do not register this one")
    if known is None:
        methods[NAME] = functools.partial(apply_kne_to_model, legacy_contract=True) if is_legacy() else apply_kne_to_model
    easyeditor.KNEHyperParams = KNEHyperParams
    easyeditor.apply_kne_to_model = apply_kne_to_model
    batch_editor = _submodule("editors.batch_editor").BatchEditor
    if not batch_editor.is_batchable_method(NAME):
        original = batch_editor.is_batchable_method
        batch_editor.is_batchable_method = staticmethod(lambda alg_name: alg_name == NAME or original(alg_name))
    return easyeditor


def is_legacy() -> bool:
    """Whether this EasyEdit is older than May 2024: ``edit`` takes ``keep_original_weight``, False lets edits accumulate."""
    return "keep_original_weight" in inspect.signature(load().BaseEditor.edit).parameters


def editor_for(hparams, model: nn.Module, tokenizer):
    """EasyEdit's ``BaseEditor`` for a model that is already loaded, under the name in ``hparams.model_name``.

    ``hparams`` may be of any method. Sets the tokenizer's padding side (and a missing pad token) as EasyEdit
    does when it loads a model itself; EasyEdit moves the model to ``hparams.device``.
    """
    easyeditor = register()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    tokenizer.padding_side = "right" if hparams.alg_name in RIGHT_PADDED else "left"
    carrier = LoadedModel(str(hparams.model_name), model, tokenizer)
    return easyeditor.BaseEditor.from_hparams(dataclasses.replace(hparams, model_name=carrier))


def _submodule(name: str) -> ModuleType:
    # Not by attribute: easyeditor.util, for one, is another module by the time the package is imported.
    return importlib.import_module(f"easyeditor.{name}")


def load_method(method: str, path: str | Path):
    """The hyperparameters of an EasyEdit method (or KNE) from a YAML file, as an object of the method's own class.

    Settings that this version's class does not know are dropped with a warning: versions differ, files are shared.
    Raises ValueError for an unknown method or a file of another method.
    """
    kind = demand_method(method)
    if kind is KNEHyperParams:
        return KNEHyperParams.from_hparams(path)
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.get("alg_name") != method:
        raise ValueError(f"{path}: alg_name is {config.get('alg_name') if isinstance(config, dict) else None!r}, wanted is {method!r}")
    fields = {f.name for f in dataclasses.fields(kind)}
    dropped = sorted(set(config) - fields)
    if dropped:
        logger.warning("%s: this EasyEdit's %s does not know %s; left out", path, kind.__name__, ", ".join(dropped))
    return kind(**{name: _number(value) for name, value in config.items() if name in fields})


def demand_method(method: str) -> type:
    """The hyperparameter class of a method. Raises ValueError, with the nearest names, if EasyEdit has no such method."""
    easyeditor = register()
    known = _submodule("util.alg_dict").ALG_DICT
    kind = getattr(easyeditor, f"{method.replace('-', '_')}HyperParams", None)
    if method not in known or kind is None:
        near = difflib.get_close_matches(method.upper(), known, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
        raise ValueError(f"methods: {method!r} is unknown to this EasyEdit; {hint}")
    return kind


def _number(value):
    """YAML reads ``5e-4`` as a text; EasyEdit's classes mean the number."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else value
