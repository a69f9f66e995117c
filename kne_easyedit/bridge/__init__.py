"""All that knows EasyEdit: its import, its patches, its methods (`methods`), its editors driven step by step.

What names a module, a class or a fault of EasyEdit belongs here. ``import kne_easyedit`` does not import this.
"""

from kne_easyedit.bridge import (  # noqa: F401  (they define patches)
    evaluation_patches,
    fluency,
    layer_patches,
    loading_patches,
    null_space,
    runtime_patches,
    script_patches,
    second_moments_patch,
    undo,
)
from kne_easyedit.bridge.fluency import fluency_variant
from kne_easyedit.bridge.importing import EasyEditNotFound, describe, is_legacy, load, locate
from kne_easyedit.bridge.layer_patches import at_position
from kne_easyedit.bridge.loaded_model import LoadedModel, prepare_tokenizer
from kne_easyedit.bridge.method_editor import MethodEditor, compare
from kne_easyedit.bridge.methods import LABELS, METHODS, traits_of
from kne_easyedit.bridge.registry import editor_for, load_method, register, require_method
from kne_easyedit.bridge.text_source import TextSource, use_text_source

__all__ = [
    "LABELS",
    "METHODS",
    "EasyEditNotFound",
    "LoadedModel",
    "MethodEditor",
    "TextSource",
    "at_position",
    "compare",
    "describe",
    "editor_for",
    "fluency_variant",
    "is_legacy",
    "load",
    "load_method",
    "locate",
    "prepare_tokenizer",
    "register",
    "require_method",
    "traits_of",
    "use_text_source",
]
