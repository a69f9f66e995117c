"""`kne doctor` says where model_parallel puts a model, and counts what is on the devices that compute."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama, tiny_hparams

from kne_easyedit.doctor import memory as of_memory
from kne_easyedit.doctor.memory import memory, without_weights
from kne_easyedit.doctor.placement import Placement, placement
from kne_easyedit.models.targets import count_parameters


def findings(hparams):
    model = without_weights(make_llama(hidden_size=64, intermediate_size=128).config)
    return model, {one.name: one for one in memory({"KNE": hparams}, model, torch.device("cpu"), None, ())}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the model would go to the GPU")
def test_what_is_on_disk_is_named_and_not_counted():
    limit = 300_000
    model, found = findings(tiny_hparams(model_parallel=True, max_memory={"cpu": limit}))
    placed = placement(model, tiny_hparams(model_parallel=True, max_memory={"cpu": limit}))
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert sum(placed.held.values()) == 4 * count_parameters(model) + buffers
    assert 0 < placed.held["cpu"] < limit and placed.offloaded == placed.held["disk"] > 0
    assert placed.computing == placed.held["cpu"] + placed.largest < 4 * count_parameters(model)
    assert found["placement"].status == "warning" and "on disk" in found["placement"].text
    assert "loaded again in every pass" in found["placement"].text


def test_gpus_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _, found = findings(tiny_hparams(model_parallel=True, max_memory={0: "1GiB"}))
    assert list(found) == ["placement"] and found["placement"].status == "failure"
    assert found["placement"].text == "max_memory: names GPU 0, this machine has no GPU"


def test_what_fits_is_counted_as_a_whole(monkeypatch):
    """Converse: and without model_parallel nothing is placed."""
    _, found = findings(tiny_hparams(model_parallel=True))
    assert found["placement"].status == "ok"
    _, plain = findings(tiny_hparams())
    assert (
        "placement" not in plain
        and plain["memory of KNE"].text.split(" free")[0].split()[0:2]
        == (found["memory of KNE"].text.split(" free")[0].split()[0:2])
    )
    monkeypatch.setattr(of_memory, "free_memory", lambda _: 10_000)
    assert findings(tiny_hparams(model_parallel=True))[1]["memory of KNE"].status == "failure"


def test_with_gpus_the_machines_memory_does_not_compute():
    placed = Placement({"0": 100, "1": 90, "cpu": 50, "disk": 20}, 7)
    assert placed.offloaded == 70 and placed.computing == 197
    assert Placement({"cpu": 50}, 7).computing == 50
