"""How settings place a model: spread, offloaded, quantised."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from conftest import LLAMA_DOWN, make_llama, make_tokenizer, tiny_hparams
from transformers import AutoConfig, AutoModelForCausalLM

from kne_easyedit.doctor.memory import weights_bytes
from kne_easyedit.models.devices import environment
from kne_easyedit.models.fingerprint import model_digest
from kne_easyedit.models.loading import load_model
from kne_easyedit.models.offload import is_offloaded, offloaded
from kne_easyedit.models.placement import require_placement, require_present

SPREAD = {"model_parallel": True}


@pytest.fixture
def folder(tmp_path):
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the model would go to the GPU")
def test_what_memory_does_not_hold_stays_on_disk(folder, tmp_path):
    whole, _ = load_model(tiny_hparams(model_name=folder))
    hparams = tiny_hparams(model_name=folder, **SPREAD, max_memory={"cpu": "500KB"}, offload_folder=str(tmp_path / "o"))
    model, _ = load_model(hparams)
    on_disk = [i for i in range(4) if offloaded(model, f"{LLAMA_DOWN.format(i)}.weight")]
    assert on_disk and len(on_disk) < 4
    assert model_digest(model) == model_digest(whole)
    assert environment(model) == environment(whole), "the device that computes, not that of weights on disk"


def test_without_limits_nothing_is_offloaded(folder):
    """Converse: and a method of EasyEdit, whose settings lack the names, is loaded as before."""
    model, _ = load_model(tiny_hparams(model_name=folder, **SPREAD))
    assert not is_offloaded(model)
    model, _ = load_model(SimpleNamespace(model_name=folder, device="cpu"))
    assert not is_offloaded(model) and {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_memory": {"cpu": "1GiB"}}, r"max_memory: .* set model_parallel: true"),
        ({"offload_folder": "o"}, r"offload_folder: 'o' .* set model_parallel: true"),
        ({**SPREAD, "max_memory": {}}, "max_memory: {} names no device"),
        ({**SPREAD, "max_memory": {"gpu": "1GiB"}}, "max_memory: 'gpu' is no device; expected a GPU's number, or cpu"),
        ({**SPREAD, "max_memory": {True: "1GiB"}}, "max_memory: True is no device"),
        ({**SPREAD, "max_memory": {0: "much"}}, "max_memory: 0: 'much' is no size; expected one such as 20GiB"),
        ({**SPREAD, "max_memory": {0: -1}}, "max_memory: 0: -1 is no size"),
        ({"load_in": "4-bit"}, r"load_in: '4-bit' must be one of \('8bit', '4bit'\); did you mean '4bit'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        require_placement(SimpleNamespace(**settings))
    with pytest.raises(ValueError, match=message):
        tiny_hparams(**settings)


def test_settings_that_fit():
    """Converse."""
    for settings in ({}, SPREAD, {**SPREAD, "max_memory": {0: "20GiB", "cpu": 10**9}, "offload_folder": "o"}):
        require_placement(tiny_hparams(**settings))


def test_gpus_that_this_machine_has_not_got(folder, monkeypatch):
    hparams = tiny_hparams(model_name=folder, **SPREAD, max_memory={0: "1GiB", 3: "1GiB", "cpu": "1GiB"})
    for there, message in ((0, "names GPU 0, this machine has no GPU;"), (2, "names GPU 3, .*last GPU .* is 1;")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=there: n)
        with pytest.raises(ValueError, match=f"max_memory: {message} leave it out"):
            load_model(hparams)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    require_present(hparams)


def test_quantised_without_the_library(folder, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "bitsandbytes" else real(name))
    with pytest.raises(ValueError, match=r"load_in: '8bit' needs bitsandbytes.*quantised"):
        load_model(tiny_hparams(model_name=folder, load_in="8bit"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(
    ("bits", "kind"), [pytest.param("8bit", "Linear8bitLt", marks=pytest.mark.slow), ("4bit", "Linear4bit")]
)
def test_quantised(folder, bits, kind):
    model, _ = load_model(tiny_hparams(model_name=folder, load_in=bits))
    assert type(model.get_submodule(LLAMA_DOWN.format(0))).__name__ == kind
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    stated = weights_bytes(bare, tiny_hparams(model_name=folder, load_in=bits))
    scales = [
        parameter.SCB if bits == "8bit" else parameter.quant_state.absmax
        for parameter in model.parameters()
        if type(parameter).__name__ in ("Int8Params", "Params4bit")
    ]
    assert len(scales) == 7 * model.config.num_hidden_layers
    assert stated == sum(tensor.nbytes for tensor in (*model.parameters(), *scales))
    assert stated < weights_bytes(bare, tiny_hparams(model_name=folder))
