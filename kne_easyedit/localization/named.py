"""Ensembles that a setting names instead of localising: a file, or the rows with the largest weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from kne_easyedit._util.files import expand_path
from kne_easyedit.localization.ensemble import NeuronEnsemble, select_ensemble
from kne_easyedit.localization.settings import LocalizationSettings
from kne_easyedit.models.targets import Target, resolve_target
from kne_easyedit.models.weights import weight_of

MAGNITUDE = "magnitude"
"""Value of ``ensemble``: the rows of largest Euclidean norm, a control of localisation that sees no fact."""


def named_ensemble(model: nn.Module, hparams: LocalizationSettings) -> NeuronEnsemble:
    """The ensemble that ``hparams.ensemble`` names.

    By `MAGNITUDE` the norms of the rows of ``target_modules`` take the place of scores: they are scaled and cut like
    these (Eq. 6-7), so that as many rows are chosen as by localisation.

    Args:
        model: A causal language model, as it is; by `MAGNITUDE` an edit that is in its weights counts.
        hparams: With ``ensemble``.

    Raises:
        FileNotFoundError, ValueError: As `NeuronEnsemble.load`; weights are the integers of a quantised model.
    """
    if hparams.ensemble is None:
        raise ValueError("ensemble: the settings name none")
    if hparams.ensemble != MAGNITUDE:
        path = expand_path(hparams.ensemble)
        if not path.exists():
            raise FileNotFoundError(f"ensemble: {path} does not exist; name a file of kne localize, or {MAGNITUDE}")
        return NeuronEnsemble.load(path)
    targets = magnitude_targets(model, hparams)
    selection = replace(hparams.selection, layers=targets[0].layers)
    return select_ensemble({target.template: _norms(model, target) for target in targets}, selection)


def named_targets(model: nn.Module, hparams: LocalizationSettings) -> list[tuple[Target, int]]:
    """The modules of the ensemble that ``hparams.ensemble`` names, and how many rows of each are in it.

    Of `MAGNITUDE` the numbers are those without equal norms; no weight is read: the model may be without values.

    Raises:
        FileNotFoundError, ValueError: As `named_ensemble`, the values of weights apart.
    """
    if hparams.ensemble == MAGNITUDE:
        budget = hparams.selection.budget
        return [(its, budget(len(its.layers) * its.n_neurons)) for its in magnitude_targets(model, hparams)]
    found = named_ensemble(model, hparams).targets(model).values()
    return [(target, sum(map(len, chosen))) for target, chosen in found]


def magnitude_targets(model: nn.Module, hparams: LocalizationSettings) -> list[Target]:
    """The modules whose rows `MAGNITUDE` ranks: those that localisation would attribute."""
    return [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]


@torch.no_grad()
def _norms(model: nn.Module, target: Target) -> Tensor:
    """``(layers, d2)``, float32 on the CPU. Offloaded weights are read one after the other."""
    norms = []
    for name in target.names:
        weight = weight_of(model, name)
        if not weight.dtype.is_floating_point:
            raise ValueError(f"ensemble: {MAGNITUDE} needs the rows' norms; {name} has weights of type {weight.dtype}")
        norms.append(torch.linalg.vector_norm(weight.rows_of(weight.stored).float(), dim=1).cpu())
    return torch.stack(norms)
