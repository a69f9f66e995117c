"""Where ``model_parallel`` puts a model's weights: asked of accelerate, from the configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kne_easyedit.doctor.findings import OK, WARNING, Finding, size
from kne_easyedit.models.devices import dtype_of
from kne_easyedit.models.placement import require_present


@dataclass(frozen=True)
class Placement:
    """Bytes of a model's weights by device."""

    held: Mapping[str, int]
    """Device -> bytes of the weights that stay there; ``disk`` is one."""
    largest: int
    """Bytes of the largest module that is loaded at once."""

    @property
    def offloaded(self) -> int:
        """Bytes that are kept elsewhere between passes: on disk, and in memory if GPUs compute."""
        return sum(number for device, number in self.held.items() if not self._computes(device))

    @property
    def computing(self) -> int:
        """Bytes of weights on the devices that compute, with the largest offloaded module while it is there."""
        own = sum(number for device, number in self.held.items() if self._computes(device))
        return own + min(self.largest, self.offloaded)

    def _computes(self, device: str) -> bool:
        return device != "disk" and (device != "cpu" or not any(one.isdigit() for one in self.held))

    def finding(self) -> Finding:
        """What to say of it."""
        named = {"cpu": "the machine's memory", "disk": "disk"}
        parts = ", ".join(
            f"{size(number)} {'in' if device == 'cpu' else 'on'} {named.get(device, f'GPU {device}')}"
            for device, number in self.held.items()
        )
        if not self.offloaded:
            return Finding("placement", OK, f"model_parallel: {parts}")
        text = f"model_parallel: {parts}; {size(self.offloaded)} are loaded again in every pass, which is slow"
        return Finding("placement", WARNING, f"{text} (docs/large-models.md)")


def placement(model: Any, hparams: Any) -> Placement:
    """Where accelerate puts a model that is loaded under these settings.

    Args:
        model: The model without its weights.
        hparams: Settings with ``model_parallel``.

    Raises:
        ValueError: This machine has not got a GPU that ``max_memory`` names.
    """
    require_present(hparams)
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes, get_balanced_memory

    whole = list(getattr(model, "_no_split_modules", None) or ())
    options: dict[str, Any] = {"no_split_module_classes": whole, "dtype": dtype_of(hparams)}
    memory = get_balanced_memory(model, max_memory=getattr(hparams, "max_memory", None), **options)
    devices = infer_auto_device_map(model, max_memory=memory, **options)
    sizes = compute_module_sizes(model, dtype=options["dtype"])
    held: dict[str, int] = {}
    for name, device in devices.items():
        held[str(device)] = held.get(str(device), 0) + sizes.get(name, 0)
    return Placement(held, max((sizes[name] for name in _loaded_at_once(model)), default=0))


def _loaded_at_once(model: nn.Module) -> list[str]:
    """Modules with weights of their own: each is loaded when it is called."""
    return [name for name, module in model.named_modules() if name and any(True for _ in module.parameters(False))]
