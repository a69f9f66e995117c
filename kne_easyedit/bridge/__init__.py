"""All that knows EasyEdit. ``import kne_easyedit`` does not import it."""

from kne_easyedit.bridge.fluency import prepare_fluency
from kne_easyedit.bridge.importing import EasyEditNotFound, describe, load, locate
from kne_easyedit.bridge.registry import LoadedModel, editor_for, is_legacy, register

__all__ = ["EasyEditNotFound", "LoadedModel", "describe", "editor_for", "is_legacy", "load", "locate", "prepare_fluency", "register"]
