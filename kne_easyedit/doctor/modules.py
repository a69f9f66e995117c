"""Checks that the settings name modules and layers that the model has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from kne_easyedit.bridge.edited_modules import adapted, at_layer, depth, fine_tuned
from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.doctor.findings import OK, WARNING, Finding, failure
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization.named import named_targets
from kne_easyedit.models.editable import stored_quantisation
from kne_easyedit.models.layer_kinds import UNQUANTISED
from kne_easyedit.models.targets import nearest_templates, resolve_target


def modules(plan: Mapping[str, Any], model: nn.Module) -> Iterator[Finding]:
    """Checks that the settings name modules and layers that the model has. The model may be on the meta device."""
    for label, hparams in plan.items():
        name, faults = f"modules of {label}", list(_module_faults(model, hparams))
        yield from (failure(name, fault) for fault in faults)
        if not faults and isinstance(hparams, KNEHyperParams) and (stored := stored_quantisation(model)):
            yield Finding(
                name,
                WARNING,
                f"the model's files are quantised ({stored}); rows of quantised layers cannot be edited",
                UNQUANTISED,
            )
        elif not faults:
            named = (
                getattr(hparams, "target_modules", None)
                or getattr(hparams, "rewrite_module_tmp", None)
                or "those of the method"
            )
            layers = f"layers {hparams.layers}" if getattr(hparams, "layers", None) else "all layers"
            yield Finding(name, OK, f"{named if isinstance(named, str) else ', '.join(named)} in {layers}")


def _module_faults(model: nn.Module, hparams: Any) -> Iterator[str]:
    if isinstance(hparams, KNEHyperParams):
        try:
            for template in hparams.target_modules:
                resolve_target(model, template, hparams.layers)
            if hparams.ensemble is not None:
                named_targets(model, hparams)
        except ValueError as error:
            yield str(error)
        except OSError as error:
            yield f"ensemble: {error}"
        return
    known, named = dict(model.named_modules()), type(model).__name__
    method = traits_of(hparams.alg_name)
    layers = list(getattr(hparams, "layers", None) or [])
    for field, numbers in {"layers": layers, "v_loss_layer": [getattr(hparams, "v_loss_layer", 0)]}.items():
        if outside := [i for i in numbers if not 0 <= i < depth(model)]:
            yield f"{field}: {outside} out of range; {named} has layers 0 to {depth(model) - 1}"
    layer = next((i for i in layers if 0 <= i < depth(model)), 0)
    for field in filter(method.reads_module, vars(hparams)):
        template = getattr(hparams, field)
        name = at_layer(template, layer)
        if not (fine_tuned(model, name) if method.edits == "parameters" else name in known):
            yield f"{field}: {template!r} names no module of {named}{_nearest(known, template)}"
    if method.edits == "adapter" and not adapted(model, hparams):
        yield f"target_modules: {hparams.target_modules} names no module of {named} in layers {layers or 'at all'}"


def _nearest(known: Mapping[str, nn.Module], template: str) -> str:
    templates = sorted({re.sub(r"\.\d+\b", ".{}", name, count=1) for name in known})
    near = nearest_templates(known[""], template.removesuffix(".weight"), alike=False)  # known[""]: the model itself
    near = near or difflib.get_close_matches(template.removesuffix(".weight"), templates, n=3, cutoff=0.3)
    return f"; nearest: {', '.join(near)}" if near else ""
