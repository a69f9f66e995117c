"""What EasyEdit's editor reads of the settings when it loads a model: their type, and how figures are computed."""

from __future__ import annotations

import contextvars
import functools
import inspect
from types import ModuleType

import torch

from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.bridge.patches import runtime_patch
from kne_easyedit.models.devices import dtype_of

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


def _typed(kind: type) -> type:
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
    "evaluation_type is not read: teacher-forced figures in the place of those of generated text, without a word (before 2025)",
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
                f"evaluation_type: {wanted!r} is unknown to this EasyEdit, whose figures are teacher-forced; leave it out, or take one since 2025"
            )
        original(self, hparams)

    editor.__init__ = init
    return True
