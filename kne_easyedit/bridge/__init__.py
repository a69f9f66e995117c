"""All that knows EasyEdit. ``import kne_easyedit`` does not import it."""

from kne_easyedit.bridge import fluency, loading, runtime_patches, script_patches, statistics, undo  # noqa: F401  (they define patches)
from kne_easyedit.bridge.editing import MethodEditor, compare
from kne_easyedit.bridge.fluency import fluency_variant
from kne_easyedit.bridge.importing import EasyEditNotFound, describe, load, locate
from kne_easyedit.bridge.registry import (
    METHODS,
    LoadedModel,
    demand_method,
    editor_for,
    is_legacy,
    load_method,
    prepare_tokenizer,
    register,
)

__all__ = [
    "METHODS",
    "EasyEditNotFound",
    "LoadedModel",
    "MethodEditor",
    "compare",
    "demand_method",
    "describe",
    "editor_for",
    "fluency_variant",
    "is_legacy",
    "load",
    "load_method",
    "locate",
    "prepare_tokenizer",
    "register",
]
