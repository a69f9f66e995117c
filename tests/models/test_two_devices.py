"""A model over two devices, on a CPU: tensors are labelled with a device, and what mixes two is an error as on GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import LLAMA_DOWN, ONE_TOKEN, all_layers, make_llama, tiny_hparams
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

from kne_easyedit.attribution.engine import attribute_facts
from kne_easyedit.editing.edit import compute_edit
from kne_easyedit.models import fast_linear
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.fingerprint import model_digest
from kne_easyedit.models.weights import weight_of

CPU, FIRST, SECOND = (torch.device(name) for name in ("cpu", "cuda:0", "cuda:1"))
REQUEST = {"prompt": ONE_TOKEN[0], "target_new": ONE_TOKEN[1]}
INDEXED = (Tensor.__getitem__, Tensor.__setitem__)
"""Of a GPU's tensor, an index may be on the CPU."""


class TwoDevices(TorchFunctionMode):
    """Inside, tensors have the device that they were made on, or moved to; results that of what they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = WeakIdKeyDictionary()

    def device(self, tensor: Tensor) -> torch.device:
        return self.labels.get(tensor, CPU)

    def label(self, result: Any, device: torch.device) -> Any:
        for one in tree_flatten(result)[0]:
            if isinstance(one, Tensor):
                self.labels[one] = device
        return result

    def place(self, module: nn.Module, device: torch.device) -> None:
        self.label([*module.parameters(), *module.buffers()], device)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:
            return self.device(args[0])
        if function == Tensor.is_cuda.__get__:
            return self.device(args[0]).type == "cuda"
        if function == Tensor.data.__set__:
            self.labels[args[0]] = self.device(args[1])
            return function(*args)
        if function is torch._has_compatible_shallow_copy_type:
            return function(*args)
        if function is torch.autograd.grad:
            inputs = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
            found = function(*args, **kwargs)
            for one, of in zip(found, inputs):
                self.labels[one] = self.device(of)
            return found
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        if function in (Tensor.to, Tensor.cpu):
            return self.moved(function, args, kwargs)
        wanted = kwargs.pop("device", None)
        if wanted is None:
            among = (
                [*tensors[:1], *_written(args)]
                if function in INDEXED
                else [one for one in tensors if one.dim() or one.requires_grad]
            )
            devices = {self.device(one) for one in among} or {self.device(one) for one in tensors}
            if len(devices) > 1:
                found = sorted(map(str, devices))
                raise RuntimeError(f"Expected all tensors to be on the same device: {function} of {found}")
            wanted = devices.pop() if devices else CPU
        return self.label(function(*args, **kwargs), torch.device(wanted))

    def moved(self, function, args, kwargs):
        own, device = args[0], self.device(args[0])
        rest, wanted = [], CPU if function is Tensor.cpu else kwargs.pop("device", None)
        for one in args[1:]:
            if isinstance(one, (torch.device, str)) or (isinstance(one, int) and not isinstance(one, bool)):
                wanted = torch.device(one) if not isinstance(one, int) else torch.device("cuda", one)
            elif isinstance(one, Tensor):
                wanted, rest = self.device(one), [*rest, one.dtype]
            elif one is not None:
                rest.append(one)
        wanted = device if wanted is None else torch.device(wanted)
        of_type = function is Tensor.to and any(isinstance(one, torch.dtype) for one in (*rest, *kwargs.values()))
        result = function(own, *rest, **kwargs) if of_type else own
        if wanted != device and result is own:
            result = own.clone()
        return self.label(result, wanted)


@pytest.fixture
def devices(monkeypatch):
    monkeypatch.setattr(fast_linear, "onednn_is_faster", lambda: False)  # its function hides what it is of
    return TwoDevices()


def _written(args) -> list[Tensor]:
    """What `__setitem__` writes."""
    return [one for one in args[2:] if isinstance(one, Tensor) and one.dim()]


def over_two(devices: TwoDevices) -> nn.Module:
    """Embeddings and two layers on the first, two layers and the head on the second, as accelerate dispatches."""
    model = make_llama(tie_word_embeddings=False)
    devices.place(model, FIRST)
    for part in (*model.model.layers[2:], model.model.norm, model.lm_head):
        devices.place(part, SECOND)
    for i, layer in enumerate(model.model.layers):
        add_hook_to_module(layer, AlignDevicesHook(FIRST if i < 2 else SECOND, skip_keys="past_key_values"))
    add_hook_to_module(model, AlignDevicesHook(FIRST, io_same_device=True, skip_keys="past_key_values"))
    return model


def test_mixed_devices_are_an_error(devices):
    """Converse: without this the other tests could not fail."""
    with devices:
        one, other = torch.ones(2, device=FIRST), torch.ones(2, device=SECOND)
        assert one.device == FIRST and (one + one).device == FIRST and one.to(SECOND).device == SECOND
        with pytest.raises(RuntimeError, match="same device"):
            one + other
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([one, other.to(one.device), other])
        with pytest.raises(RuntimeError, match="same device"):
            make_and_run(devices)


def make_and_run(devices):
    model = over_two(devices)
    del model.model.layers[2]._hf_hook
    model.model.layers[2].forward = model.model.layers[2]._old_forward
    return model(torch.ones(1, 3, dtype=torch.long, device=FIRST))


def test_scores(devices, facts):
    whole = make_llama(tie_word_embeddings=False)
    expected = attribute_facts(whole, [all_layers(whole)], facts, 3, chunk_rows=400, engine="sweep")[0]
    model = over_two(devices)
    with devices:
        assert device_of(model) == FIRST and weight_of(model, LLAMA_DOWN.format(3))[torch.arange(2)].device == SECOND
        found = attribute_facts(model, [all_layers(model)], facts, 3, chunk_rows=400, engine="sweep")[0]
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_an_edit(devices, tokenizer):
    whole = make_llama(tie_word_embeddings=False)
    # Not AdamW: torch groups its tensors by what they really are on.
    settings = tiny_hparams(chunk_rows=400, optimizer="polyak")
    expected = compute_edit(whole, tokenizer, [REQUEST], settings)
    model = over_two(devices)
    before = model_digest(whole)
    with devices:
        assert model_digest(model) == before
        edit = compute_edit(model, tokenizer, [REQUEST], settings)
        assert edit.losses == expected.losses and edit == expected
        with edit.applied(model):
            assert model_digest(model) != before
            assert weight_of(model, LLAMA_DOWN.format(3)).stored.device == SECOND
        assert model_digest(model) == before
