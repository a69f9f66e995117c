"""All that knows EasyEdit. ``import kne_easyedit`` does not import it."""

from kne_easyedit.bridge.fluency import prepare_fluency
from kne_easyedit.bridge.importing import EasyEditNotFound, describe, load, locate
from kne_easyedit.bridge.registry import LoadedModel, demand_method, editor_for, is_legacy, load_method, register

__all__ = [
    "EasyEditNotFound",
    "LoadedModel",
    "demand_method",
    "describe",
    "editor_for",
    "is_legacy",
    "load",
    "load_method",
    "locate",
    "prepare_fluency",
    "register",
]
