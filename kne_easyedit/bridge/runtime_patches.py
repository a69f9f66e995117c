"""Patches of imported objects of EasyEdit. Each function returns whether its fault is present."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch

from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.patches import runtime_patch

TEMPLATE_SEED = 42
"""Seed of the context templates that ROME, MEMIT and related methods sample from the model."""


@runtime_patch(
    "lora-model-parallel",
    "LoRA: the hyperparameter class lacks model_parallel, which the editor reads: AttributeError (2023)",
)
def _lora_model_parallel(easyeditor: ModuleType) -> bool:
    kind = easyeditor.LoRAHyperParams
    if hasattr(kind, "model_parallel") or any(f.name == "model_parallel" for f in dataclasses.fields(kind)):
        return False
    kind.model_parallel = False
    return True


_steps: contextvars.ContextVar[int] = contextvars.ContextVar("steps of the LoRA edit that runs")


@runtime_patch("adalora-total-step", "AdaLoRA: total_step is never given, and PEFT demands it since 0.15: ValueError")
def _adalora_total_step(easyeditor: ModuleType) -> bool:
    lora = module("models.lora.lora_main")
    config, execute = lora.AdaLoraConfig, lora.execute_lora

    @functools.wraps(config)
    def with_total_step(**settings):
        if "total_step" not in settings:
            settings["total_step"] = _steps.get()
        return config(**settings)

    @functools.wraps(execute)
    def counted(model, tok, requests, hparams, *args, **kwargs):
        token = _steps.set(hparams.num_steps * math.ceil(len(requests) / hparams.batch_size))
        try:
            return execute(model, tok, requests, hparams, *args, **kwargs)
        finally:
            _steps.reset(token)

    lora.AdaLoraConfig, lora.execute_lora = with_total_step, counted
    return True


@runtime_patch(
    "adapter-dropout", "LoRA, AdaLoRA: edits are evaluated with the adapter's dropout on: figures are random"
)
def _adapter_dropout(easyeditor: ModuleType) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    lora = module("models.lora.lora_main")
    execute = lora.execute_lora

    def switch(model: torch.nn.Module, training: bool) -> None:
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.train(training)

    @functools.wraps(execute)
    def evaluated_without(model, *args, **kwargs):
        switch(model, True)  # an adapter that is trained on, in a sequence of edits
        edited = execute(model, *args, **kwargs)
        switch(edited, False)
        return edited

    lora.execute_lora = evaluated_without
    return True


@runtime_patch("tied-head", "MEMIT: the weight of a head that is tied to the embeddings is not found: LookupError")
def _tied_head(easyeditor: ModuleType) -> bool:
    nethook = module("util.nethook")
    original = nethook.get_parameter

    @functools.wraps(original)
    def get_parameter(model, name):
        try:
            return original(model, name)
        except LookupError:
            # named_parameters() names a shared tensor once only; the module still holds it.
            for known, parameter in model.named_parameters(remove_duplicate=False):
                if known == name:
                    return parameter
            raise

    nethook.get_parameter = get_parameter
    return True


@runtime_patch(
    "layer-outputs",
    "MEMIT, EMMET, AlphaEdit: layers are expected to return tuples, current transformers returns tensors: IndexError "
    "(before 2026)",
)
def _layer_outputs(easyeditor: ModuleType) -> bool:
    nethook = module("util.nethook")
    if hasattr(nethook, "get_hidden_state"):
        return False

    class TraceDict(nethook.TraceDict):  # type: ignore[name-defined]  # known at run time
        """Presents a decoder layer's bare tensor as a tuple of one, in the edit and to later readers."""

        def __init__(self, *args, edit_output=None, **kwargs):
            def edit(output, layer):
                if not isinstance(output, torch.Tensor):
                    return edit_output(output, layer)
                return edit_output((output,), layer)[0]

            super().__init__(*args, edit_output=edit_output and edit, **kwargs)

        def __getitem__(self, key):
            trace = super().__getitem__(key)
            return _AsTuple(trace) if isinstance(getattr(trace, "output", None), torch.Tensor) else trace

    for name, method in sorted(_method_modules().items()):
        if name.endswith(".compute_z"):
            cast(Any, method).nethook = SimpleNamespace(**{**vars(nethook), "TraceDict": TraceDict})
    return True


def _method_modules() -> dict[str, ModuleType]:
    """The modules of EasyEdit's methods that are imported."""
    return {name: its for name, its in sys.modules.items() if name.startswith("easyeditor.models.")}


class _AsTuple:
    """A trace whose output is a tuple of one."""

    def __init__(self, trace):
        self._trace = trace
        self.output = (trace.output,)

    def __getattr__(self, name):
        return getattr(self._trace, name)


@runtime_patch(
    "kn-model-names", "KN: the kind of model is guessed from its name: ValueError for names without a known word"
)
def _kn_model_names(easyeditor: ModuleType) -> bool:
    kn = module("models.kn.kn_main")
    original = kn.model_type

    @functools.wraps(original)
    def model_type(name):
        config = getattr(getattr(name, "model", None), "config", None)
        try:
            return original(name)
        except (ValueError, NotImplementedError):
            if config is None:
                raise
            return config.model_type

    kn.model_type = model_type
    return True


@runtime_patch(
    "name-keyed-caches",
    "ROME, MEMIT and kin keep second moments and context templates by the model's name, and sample templates unseeded",
)
def _name_keyed_caches(easyeditor: ModuleType) -> bool:
    last: list[weakref.ref] = []

    def forget_other_models(model: torch.nn.Module) -> None:
        if last and last[0]() is model:
            return
        last[:] = [weakref.ref(model)]
        forget_second_moments()
        for holder in _cache_holders():
            if hasattr(holder, "CONTEXT_TEMPLATES_CACHE"):
                holder.CONTEXT_TEMPLATES_CACHE = None

    holders = _cache_holders()
    for holder in holders:
        if hasattr(holder, "get_context_templates"):
            original = holder.get_context_templates
            seeded = _seeded(original, forget_other_models)
            for user in _method_modules().values():  # WISE's main module has imported the function by its name
                if getattr(user, "get_context_templates", None) is original:
                    cast(Any, user).get_context_templates = seeded
        for name in ("get_cov", "get_inv_cov"):
            if hasattr(holder, name):
                setattr(holder, name, _first(getattr(holder, name), forget_other_models))
    return bool(holders)


def forget_second_moments() -> None:
    """Empties the caches of second moments in EasyEdit's methods, whose key is the model's name alone."""
    for holder in _cache_holders():
        for cache in ("COV_CACHE", "inv_mom2_cache"):
            getattr(holder, cache, {}).clear()


def _cache_holders() -> list[Any]:
    return [
        m
        for _, m in sorted(_method_modules().items())
        if any(hasattr(m, cache) for cache in ("CONTEXT_TEMPLATES_CACHE", "COV_CACHE", "inv_mom2_cache"))
    ]


def _seeded(function, prepare):
    """The function under a fixed seed of its own: its samples do not depend on earlier ones."""

    @functools.wraps(function)
    def seeded(model, *args, **kwargs):
        prepare(model)
        with torch.random.fork_rng():
            torch.manual_seed(TEMPLATE_SEED)
            return function(model, *args, **kwargs)

    return seeded


def _first(function, prepare):
    @functools.wraps(function)
    def prepared(model, *args, **kwargs):
        prepare(model)
        return function(model, *args, **kwargs)

    return prepared


@runtime_patch(
    "model-switches",
    "FT, ROME, MEMIT, LoRA leave gradients, requires_grad, use_cache, checkpointing, hooks and attributes in the model",
)
def _model_switches(easyeditor: ModuleType) -> bool:
    methods = module("util.alg_dict").ALG_DICT
    for name, apply in list(methods.items()):
        if (
            inspect.isfunction(apply)
            and not isinstance(apply, functools.partial)
            and apply.__module__.startswith("easyeditor.")
        ):
            methods[name] = _tidy(apply)
    return True


def _tidy(apply):
    @functools.wraps(apply)
    def tidy(model, *args, **kwargs):
        if not isinstance(model, torch.nn.Module):
            return apply(model, *args, **kwargs)
        with _preserve_switches(model) as after:
            result = apply(model, *args, **kwargs)
            after.append(result[0] if isinstance(result, tuple) else None)
        return result

    return tidy


_LEFT_BEHIND = {
    "_gradient_checkpointing_func",
    "gradient_checkpointing",
    "_require_grads_hook",
    "_require_grads_hooks",
    "is_parallelizable",
    "model_parallel",
    "supports_gradient_checkpointing",
}
"""Attributes that LoRA's training sets on a model."""


@contextlib.contextmanager
def _preserve_switches(model: torch.nn.Module) -> Iterator[list[Any]]:
    """Restores the switches at the end; what the method has returned may be appended to the list."""
    put_back = switches_restorer(model)
    results: list[Any] = []
    try:
        yield results
    finally:
        put_back(results[0] if results else None)


def switches_restorer(model: torch.nn.Module) -> Callable[..., None]:
    """Records all that EasyEdit's methods switch in a model.

    Args:
        model: The model before an edit.

    Returns:
        A function that restores it. If it is given an adapted model, the flags of parameters are restored when that is
        unloaded: the training of the adapter goes on from them.
    """
    flags = [(parameter, parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]
    config: Any = getattr(model, "config", None)
    use_cache, checkpointing = getattr(config, "use_cache", None), getattr(model, "is_gradient_checkpointing", False)
    parts = list(model.modules())
    training = [part.training for part in parts]
    attributes = [set(vars(part)) for part in parts]
    hooks = [(part._forward_hooks, set(part._forward_hooks)) for part in parts]

    def restore_flags() -> None:
        for part, flag in zip(parts, training):
            part.training = flag
        for parameter, flag, without_gradient in flags:
            parameter.requires_grad = flag
            if without_gradient:
                parameter.grad = None

    def put_back(edited: Any = None) -> None:
        if use_cache is not None:
            config.use_cache = use_cache
        if not checkpointing and getattr(model, "is_gradient_checkpointing", False):
            cast(Any, model).gradient_checkpointing_disable()
        for registered, known in hooks:  # those by which LoRA makes the embeddings' outputs require gradients
            for key in set(registered) - known:
                del registered[key]
        for part, names in zip(parts, attributes):
            for name in _LEFT_BEHIND & (set(vars(part)) - names):
                delattr(part, name)
        if hasattr(edited, "peft_config") and hasattr(edited, "unload"):
            _after(edited, "unload", restore_flags)
        else:
            restore_flags()

    return put_back


def _after(owner: Any, name: str, action: Callable[[], None]) -> None:
    """Makes ``owner.name()`` call ``action()`` when it has returned."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def both(*args, **kwargs):
        result = original(*args, **kwargs)
        action()
        return result

    setattr(owner, name, both)
