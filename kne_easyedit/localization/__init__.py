"""Eq. 6-7: from facts to the ensemble of neurons, and what can be said of it: stability, collisions, pictures.

What chooses neurons, or explains a choice, may enter. Nothing here changes a weight.
"""

from kne_easyedit.localization.ensemble import NeuronEnsemble, select_ensemble
from kne_easyedit.localization.localizer import find_ensemble, forget, localize
from kne_easyedit.localization.selection import aggregate

__all__ = ["NeuronEnsemble", "aggregate", "find_ensemble", "forget", "localize", "select_ensemble"]
