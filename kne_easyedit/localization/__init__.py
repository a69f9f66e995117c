"""Eq. 6-7: from facts to the ensemble of neurons, its stability, the neurons of single facts, and pictures of both.

Code that chooses neurons, or explains a choice, belongs here. Nothing here changes a weight.
"""

from kne_easyedit.localization.ensemble import NeuronEnsemble, select_ensemble
from kne_easyedit.localization.localizer import find_ensemble, forget, localize
from kne_easyedit.localization.selection import Selection, aggregate

__all__ = ["NeuronEnsemble", "Selection", "aggregate", "find_ensemble", "forget", "localize", "select_ensemble"]
