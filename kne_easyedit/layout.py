"""Where the neurons of a decoder are: templates, layers, and the orientation of their weights.

A *template* such as ``model.layers.{}.mlp.down_proj`` names one linear layer in every decoder layer;
``{}`` stands for the layer's number. Neuron ``k`` of such a layer is its output unit ``k``: row ``k`` of
``nn.Linear.weight`` ``(out, in)``, column ``k`` of GPT-2's ``Conv1D.weight`` ``(in, out)``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Target:
    """One target module type of a loaded model: the same linear layer in several decoder layers."""

    template: str
    layers: tuple[int, ...]
    """Numbers of the decoder layers, ascending."""
    names: tuple[str, ...]
    """Full module names, one a layer."""
    modules: tuple[nn.Module, ...]
    n_neurons: int
    """Output units of each module (``d2``)."""

    @property
    def layers_path(self) -> str:
        """Name of the list that holds the decoder layers, e.g. ``model.layers``."""
        return self.template.split(".{}", 1)[0]


def check_template(template: str) -> None:
    """Raises ValueError unless ``template`` holds exactly one ``{}``, as a path component of its own."""
    if not isinstance(template, str) or template.split(".").count("{}") != 1 or template.count("{") != 1:
        raise ValueError(
            f"target_modules: {template!r} is not a template; write the module's name with one '{{}}' in the "
            f"place of the layer's number, e.g. 'model.layers.{{}}.mlp.down_proj'"
        )


def resolve_target(model: nn.Module, template: str, layers: Sequence[int] = ()) -> Target:
    """Finds the modules that ``template`` names in ``layers`` (empty: every decoder layer).

    Raises ValueError for a template that matches nothing (with the nearest that would), a layer out of
    range, or modules that are no linear layers.
    """
    check_template(template)
    modules = dict(model.named_modules())
    path, leaf = template.split(".{}", 1)
    n_layers = len(modules[path]) if isinstance(modules.get(path), nn.ModuleList) else 0
    names = [template.format(i) for i in range(n_layers)]
    if not n_layers or not any(name in modules for name in names):
        raise ValueError(f"target_modules: {template!r} matches no module of {type(model).__name__}{_nearest(modules, template)}")
    chosen = sorted(set(layers)) if layers else list(range(n_layers))
    outside = [i for i in chosen if not 0 <= i < n_layers]
    if outside:
        raise ValueError(f"layers: {outside} out of range; {type(model).__name__} has layers 0 to {n_layers - 1}")
    missing = [names[i] for i in chosen if names[i] not in modules]
    if missing:
        raise ValueError(f"target_modules: {template!r} is missing in some layers: {missing}; leave them out by 'layers'")
    found = tuple(modules[names[i]] for i in chosen)
    for name, module in zip((names[i] for i in chosen), found):
        if not is_linear(module):
            raise ValueError(f"target_modules: {name} is a {type(module).__name__}, not a linear layer{_nearest(modules, template)}")
    widths = {out_features(module) for module in found}
    if len(widths) != 1:
        raise ValueError(f"target_modules: {template!r} has different widths over the layers: {sorted(widths)}")
    return Target(template, tuple(chosen), tuple(names[i] for i in chosen), found, widths.pop())


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def out_features(module: nn.Module) -> int:
    """Number of output units of a linear layer in either orientation."""
    return module.weight.shape[1] if _is_conv1d(module) else module.weight.shape[0]


def rows(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight (or a tensor of its shape) as a view ``(out, in)``: writing to it writes to the module."""
    weight = module.weight if weight is None else weight
    return weight.t() if _is_conv1d(module) else weight


def count_parameters(model: nn.Module) -> int:
    """Number of scalar parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    """The device of the input embeddings: where token ids belong, also in a model spread over several."""
    return model.get_input_embeddings().weight.device


def _is_conv1d(module: nn.Module) -> bool:
    # By name: importing transformers for one isinstance would cost a second at import time.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _nearest(modules: dict[str, nn.Module], template: str) -> str:
    templates = {re.sub(r"\.\d+\.", ".{}.", name, count=1) for name, m in modules.items() if is_linear(m)}
    near = difflib.get_close_matches(template, sorted(t for t in templates if "{}" in t), n=3, cutoff=0.3)
    return f"; nearest: {', '.join(near)}" if near else ""
