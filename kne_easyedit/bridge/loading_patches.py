"""Patches of how EasyEdit reads settings and loads a model: number type, name, evaluation, unknown settings."""

from __future__ import annotations

import contextvars
import dataclasses
import difflib
import functools
import inspect
import logging
from types import ModuleType
from typing import Any

import torch

from kne_easyedit._util.settings import EVALUATORS, replace_settings
from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.loaded_model import LoadedModel, prepare_tokenizer
from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.bridge.patches import runtime_patch
from kne_easyedit.models.devices import dtype_of
from kne_easyedit.models.loading import load_model

logger = logging.getLogger(__name__)

LOADER = ("fp16", "bf16")
"""Settings of the type that a model is loaded in; most of EasyEdit's classes know one of them or none."""
_wanted: contextvars.ContextVar[torch.dtype | None] = contextvars.ContextVar(
    "type of the model that an editor loads", default=None
)


@runtime_patch(
    "model-type",
    "the loader does not load the type that fp16 and bf16 ask for: it never reads bf16, and before 2024 neither",
)
def _model_type(easyeditor: ModuleType) -> bool:
    editors, editor = module("editors.editor"), easyeditor.BaseEditor
    for name in ("AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM", "T5ForConditionalGeneration"):
        if hasattr(editors, name):
            setattr(editors, name, _typed(getattr(editors, name)))
    original = editor.__init__

    @functools.wraps(original)
    def init(self, hparams):
        own_type = traits_of(str(getattr(hparams, "alg_name", None))).own_type
        token = _wanted.set(None if own_type else dtype_of(hparams))
        try:
            original(self, hparams)
        finally:
            _wanted.reset(token)

    editor.__init__ = init
    return True


def _typed(kind: Any) -> type:
    """A model class as EasyEdit's editor sees it: ``from_pretrained`` gives the wanted type."""

    class Typed(kind):
        @classmethod
        def from_pretrained(cls, name, *args, **settings):
            dtype = _wanted.get()
            if dtype is not None:
                settings.pop("torch_dtype", None)
                settings["dtype"] = dtype
            return kind.from_pretrained(name, *args, **settings)

    return Typed


@runtime_patch(
    "evaluation-type",
    "evaluation_type is not read: teacher-forced figures in the place of those of generated text, without a word "
    "(before 2025)",
)
def _evaluation_type(easyeditor: ModuleType) -> bool:
    if "evaluation_type" in inspect.getsource(module("evaluate.evaluate")):
        return False
    editor = easyeditor.BaseEditor
    original = editor.__init__

    @functools.wraps(original)
    def init(self, hparams):
        wanted = getattr(hparams, "evaluation_type", None)
        if wanted:
            raise ValueError(
                f"evaluation_type: {wanted!r} is unknown to this EasyEdit, whose figures are teacher-forced; "
                f"leave it out, or take one since 2025"
            )
        original(self, hparams)

    editor.__init__ = init
    return True


def hyperparameter_classes(easyeditor: ModuleType) -> list[Any]:
    """EasyEdit's hyperparameter classes, as far as they are reachable from the package."""
    own = [
        v
        for v in vars(easyeditor).values()
        if isinstance(v, type) and dataclasses.is_dataclass(v) and hasattr(v, "from_hparams")
    ]
    return [kind for kind in dict.fromkeys(own) if kind.__module__.startswith("easyeditor.")]


@runtime_patch(
    "unknown-settings",
    "a hyperparameter file of another version fails on a setting that this version's class does not know: TypeError",
)
def _drop_unknown_settings(easyeditor: ModuleType) -> bool:
    for kind in hyperparameter_classes(easyeditor):
        _tolerant(kind)
    return True


def _tolerant(kind: Any) -> None:
    original, names = kind.__init__, [f.name for f in dataclasses.fields(kind)]

    @functools.wraps(original)
    def init(self, *args, **settings):
        # What an editor or an evaluator reads of any method's settings, fields or not.
        read = {name: settings.pop(name) for name in (*LOADER, *EVALUATORS) if name in settings and name not in names}
        unknown = [name for name in settings if name not in names]
        for name in unknown:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
            hint = f" (it knows {near[0]})" if near else ""
            logger.warning("%s: this EasyEdit does not know the setting %s%s; left out", kind.__name__, name, hint)
        original(self, *args, **{name: value for name, value in settings.items() if name not in unknown})
        for name, value in read.items():
            if value is not None:  # EasyEdit of 2025 asks whether there is an evaluation_type, not which
                setattr(self, name, value)

    kind.__init__ = init


@runtime_patch(
    "any-model", "a model whose name holds no known word ('llama', 'gpt', ...) is refused: NotImplementedError"
)
def _load_any_model(easyeditor: ModuleType) -> bool:
    editor = easyeditor.BaseEditor
    original = editor.__init__

    @functools.wraps(original)
    def init(self, hparams):
        try:
            original(self, hparams)
        except NotImplementedError:
            if type(getattr(hparams, "model_name", None)) is not str:
                raise
            model, tokenizer = load_model(hparams)
            prepare_tokenizer(tokenizer, hparams.alg_name)
            original(self, replace_settings(hparams, model_name=LoadedModel(hparams.model_name, model, tokenizer)))

    editor.__init__ = init
    return True
