"""Where the neurons of a decoder are: templates, layers, and the orientation of their weights.

A *template* such as ``model.layers.{}.mlp.down_proj`` names one linear layer in every decoder layer;
``{}`` stands for the layer's number. Neuron ``k`` of such a layer is its output unit ``k``: row ``k`` of
``nn.Linear.weight`` ``(out, in)``, column ``k`` of GPT-2's ``Conv1D.weight`` ``(in, out)``.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from kne_easyedit._util.messages import shorten
from kne_easyedit.models.layer_kinds import is_bitsandbytes, known_kind

LONGEST_TEMPLATE = 500
"""In characters."""
SUGGESTIONS = 3
_ROLES = {
    "attention output": "o_proj out_proj dense c_proj wo o out proj",
    "query": "q_proj query wq q q_lin",
    "key": "k_proj key wk k k_lin",
    "value": "v_proj value wv v v_lin",
    "query, key, value": "qkv_proj query_key_value c_attn wqkv qkv in_proj attn_qkv",
    "MLP output": "down_proj fc2 fc_out dense_4h_to_h w2 wo c_proj lin2 linear2 linear_2 output_linear out_proj "
    "proj_out",
    "MLP input": "up_proj fc1 fc_in c_fc dense_h_to_4h w3 wi wi_1 lin1 linear1 linear_1 input_linear",
    "gate": "gate_proj w1 wi_0",
    "gate and input": "gate_up_proj gate_up",
}
"""The role of a linear layer in a decoder layer -> its names in the families of models."""
_FUSED = {
    **dict.fromkeys(("query", "key", "value"), "query, key, value"),
    **dict.fromkeys(("gate", "MLP input"), "gate and input"),
}
"""Role -> the role of the layer that holds it in families with fused layers."""


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
    sound = isinstance(template, str) and len(template) <= LONGEST_TEMPLATE
    parts = template.split(".") if sound else []
    if (
        parts.count("{}") != 1
        or "" in parts
        or parts[0] == "{}"
        or template.count("{") != 1
        or template.count("}") != 1
    ):
        raise ValueError(
            f"target_modules: {shorten(template)} is not a template; write the module's name with one '{{}}' in the "
            f"place of the layer's number, e.g. 'model.layers.{{}}.mlp.down_proj'"
        )


def resolve_target(model: nn.Module, template: str, layers: Sequence[int] = ()) -> Target:
    """Finds the modules that a template names.

    Args:
        model: A decoder of transformers.
        template: Such as ``model.layers.{}.mlp.down_proj``.
        layers: Numbers of the decoder layers; empty: all.

    Returns:
        The modules, their names, and their number of output units ``d2``.

    Raises:
        ValueError: The template matches nothing (the message names the nearest that would), a layer is out of range, or
            the modules are no linear layers.
    """
    check_template(template)
    modules = dict(model.named_modules())
    stack = modules.get(template.split(".{}", 1)[0])
    n_layers = len(stack) if isinstance(stack, nn.ModuleList) else 0
    names = [template.format(i) for i in range(n_layers)]
    if not n_layers or not any(name in modules for name in names):
        raise ValueError(
            f"target_modules: {template!r} matches no module of {type(model).__name__}{_nearest(model, template)}"
        )
    if not all(type(i) is int for i in layers):
        raise ValueError(f"layers: {list(layers)!r} must be numbers of layers, from 0")
    chosen = sorted(set(layers)) if layers else list(range(n_layers))
    outside = [i for i in chosen if not 0 <= i < n_layers]
    if outside:
        raise ValueError(f"layers: {outside} out of range; {type(model).__name__} has layers 0 to {n_layers - 1}")
    missing = [names[i] for i in chosen if names[i] not in modules]
    if missing:
        raise ValueError(
            f"target_modules: {template!r} is missing in some layers: {missing}; leave them out by 'layers'"
        )
    found = tuple(modules[names[i]] for i in chosen)
    for name, module in zip((names[i] for i in chosen), found):
        if not is_linear(module):
            if kind := known_kind(module):
                raise ValueError(f"target_modules: {name} is a {type(module).__name__}, {kind[0]}; {kind[1]}")
            raise ValueError(
                f"target_modules: {name} is a {type(module).__name__}, not a linear layer{_nearest(model, template)}"
            )
    widths = {out_features(module) for module in found}
    if len(widths) != 1:
        raise ValueError(f"target_modules: {template!r} has different widths over the layers: {sorted(widths)}")
    return Target(template, tuple(chosen), tuple(names[i] for i in chosen), found, widths.pop())


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer in either orientation."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def out_features(module: Any) -> int:
    """Number of output units, ``d2``, of a linear layer in either orientation."""
    return module.nf if _is_conv1d(module) else module.out_features


def in_features(module: Any) -> int:
    """Number of input units, ``d1``, of a linear layer in either orientation."""
    return module.weight.shape[0] if _is_conv1d(module) else module.in_features


def rows(module: Any, weight: Tensor | None = None) -> Tensor:
    """The weight (or a tensor of its shape) as a view ``(d2, d1)``: writing to it writes to the module."""
    weight = module.weight if weight is None else weight
    return weight.t() if _is_conv1d(module) else weight


def count_parameters(model: nn.Module) -> int:
    """Number of scalar parameters; tied ones count once, packed ones (4 bit) as those that they stand for."""
    packed = {
        id(module.weight): out_features(module) * in_features(module)
        for module in model.modules()
        if is_bitsandbytes(module) and is_linear(module)
    }
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def _is_conv1d(module: nn.Module) -> bool:
    # By name: importing transformers for one isinstance would cost a second at import time.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _nearest(model: nn.Module, template: str) -> str:
    near = nearest_templates(model, template)
    return f"; nearest: {', '.join(near)}" if near else ""


def nearest_templates(model: nn.Module, template: str, alike: bool = True) -> list[str]:
    """Templates that one which names no linear layer may have meant, best first.

    Args:
        model: The model.
        template: The template.
        alike: Where no layer has the same role, take those with similar names.

    Returns:
        At most `SUGGESTIONS` templates of the model.
    """
    templates = _linear_templates(model)
    stacks = {found.split(".{}", 1)[0] for found in templates}
    given = template.split(".{}", 1)[0]
    stack = given if given in stacks else _decoder_stack(model, stacks)
    own = {found: module for found, module in templates.items() if found.split(".{}", 1)[0] == stack} or templates
    roles, wanted = _roles(own), role_of(template)
    near: list[str] = []
    for role in (wanted, _FUSED.get(wanted or "")):
        near = near or [found for found in own if role is not None and roles[found] == role]
    near = [found for found in near if found.rsplit(".", 1)[-1] == template.rsplit(".", 1)[-1]] or near
    if near or alike:
        near = difflib.get_close_matches(template, near or sorted(own), n=SUGGESTIONS, cutoff=0.0 if near else 0.3)
    return near


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a model's decoder layers, found by structure."""

    template: str
    role: str | None
    """What it does in its layer, e.g. ``MLP output``; None where neither widths nor name tell."""
    layers: tuple[int, ...]
    """Numbers of the decoder layers that have it."""
    inputs: int
    outputs: int


def find_linear(model: nn.Module) -> list[LinearLayer]:
    """The linear layers of a model's decoder layers, in the model's order. Weights are not read.

    The decoder's list of layers is the one nearest to the token embeddings. Layers of single experts of a mixture are
    left out: they are not called on every token.

    Args:
        model: A model of transformers; it may be on the meta device.

    Returns:
        What was found; nothing if there is no list of layers that hold linear ones.
    """
    templates = _linear_templates(model)
    stack = _decoder_stack(model, {found.split(".{}", 1)[0] for found in templates})
    own = {
        found: module
        for found, module in templates.items()
        if found.split(".{}", 1)[0] == stack and not re.search(r"\.\d+\.", found)
    }
    modules = dict(model.named_modules())
    layers = range(len(cast(nn.ModuleList, modules[stack]))) if stack is not None else range(0)
    roles = _roles(own)
    return [
        LinearLayer(
            template,
            roles[template],
            tuple(i for i in layers if template.format(i) in modules),
            in_features(module),
            out_features(module),
        )
        for template, module in own.items()
    ]


def default_target(found: Sequence[LinearLayer]) -> LinearLayer | None:
    """The linear layer to edit where nobody has said which: the MLP's output, as in the shipped settings.

    Args:
        found: What `find_linear` has found.

    Returns:
        Of the layers with that role the one that most decoder layers have; where there is none (a mixture whose experts
        are fused), the same of the attention's output; None if there is none either.
    """
    for role in ("MLP output", "attention output"):
        if its := [each for each in found if each.role == role]:
            return max(its, key=lambda each: len(each.layers))
    return None


def _linear_templates(model: nn.Module) -> dict[str, nn.Module]:
    """The templates of all linear layers in lists of layers, each with the module of its first layer."""
    templates: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        found = re.sub(r"\.\d+\.", ".{}.", name, count=1)
        if "{}" in found and is_linear(module):
            templates.setdefault(found, module)
    return templates


def _decoder_stack(model: Any, stacks: set[str]) -> str | None:
    """The list of decoder layers nearest to the token embeddings: a model with vision has other lists, too."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    place: str | None = next((name for name, module in model.named_modules() if module is embeddings), None)
    if place is None:
        return None

    def shared(stack: str) -> int:
        pairs = zip(place.split("."), stack.split("."))
        return next((i for i, (one, other) in enumerate(pairs) if one != other), 0)

    return max(sorted(stacks), key=shared, default=None)


def _roles(templates: Mapping[str, nn.Module]) -> dict[str, str | None]:
    """The role of each linear layer of a decoder layer: by its widths where they decide, else by its name."""
    shapes = {found: (in_features(module), out_features(module)) for found, module in templates.items()}
    widths = Counter(width for shape in shapes.values() for width in shape)
    # Most frequent: all have this width but the MLP's inner side, and most keys and values.
    hidden = max(widths, key=lambda width: widths[width], default=0)
    roles = {}
    for found, (inputs, outputs) in shapes.items():
        role = role_of(found)
        if role is None and _part(found) == "attention" and outputs == hidden:
            role = "attention output"
        elif _part(found) != "attention" and outputs == hidden < inputs:
            role = "MLP output"
        elif _part(found) != "attention" and inputs == hidden < outputs and role not in ("gate", "gate and input"):
            role = "MLP input"
        roles[found] = role
    return roles


def role_of(template: str) -> str | None:
    """The role of a linear layer in its decoder layer, by its name alone; None where that does not tell."""
    part, leaf = _part(template), template.rsplit(".", 1)[-1].lower()
    for role, names in _ROLES.items():
        of_attention = role not in ("MLP output", "MLP input", "gate", "gate and input")
        if leaf in names.split() and (part is None or (part == "attention") == of_attention):
            return role
    return None


def _part(template: str) -> str | None:
    """The part of a decoder layer that a name mentions, if any."""
    parents = template.split(".{}.", 1)[-1].lower().split(".")[:-1]
    if any("att" in parent for parent in parents):
        return "attention"
    if any(
        parent == "ff" or any(word in parent for word in ("mlp", "ffn", "feed_forward", "moe", "experts"))
        for parent in parents
    ):
        return "mlp"
    return None
