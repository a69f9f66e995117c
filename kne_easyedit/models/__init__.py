"""Loaded models: where neurons are (`targets`), which can be edited (`editable`), how state is kept (`state`).

Knowledge of an architecture, a device or a layer type belongs here. Nothing here knows scores or edits.
"""

from kne_easyedit.models.devices import resolve_device
from kne_easyedit.models.fingerprint import model_digest
from kne_easyedit.models.loading import load_model
from kne_easyedit.models.targets import Target, resolve_target

__all__ = ["Target", "load_model", "model_digest", "resolve_device", "resolve_target"]
