"""Eq. 3-5: a score for every output neuron, by the fused sweep or by full passes, kept in the score cache.

What computes or stores scores belongs here. Nothing here selects neurons.
"""

from kne_easyedit.attribution.engine import attribute, attribute_facts
from kne_easyedit.attribution.quadrature import gauss_legendre, riemann
from kne_easyedit.attribution.replay import ReplayMismatch, UnsupportedModel
from kne_easyedit.attribution.score_cache import ScoreCache

__all__ = [
    "ReplayMismatch",
    "ScoreCache",
    "UnsupportedModel",
    "attribute",
    "attribute_facts",
    "gauss_legendre",
    "riemann",
]
