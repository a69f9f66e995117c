"""glibc accepts the settings where there is a glibc; weights are moved without changing a bit; memory limits count."""

from __future__ import annotations

import platform
import subprocess
import sys

import psutil
import pytest
import torch
from conftest import HANGS, make_llama, weights

from kne_easyedit._util import machine
from kne_easyedit._util.machine import (
    _left_by_control_groups,
    align_weights,
    free_memory,
    keep_large_blocks,
)


def test_takes_effect_on_glibc_only(monkeypatch):
    assert keep_large_blocks() == (platform.system() == "Linux" and platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_large_blocks() is False


BLOCKS = """
import psutil, torch
from kne_easyedit._util import machine

def freed_blocks_stay(size=64 * 2**20):
    process, block = psutil.Process(), torch.ones(size, dtype=torch.uint8)
    held = process.memory_info().rss
    del block
    return process.memory_info().rss > held - size // 2

model = torch.nn.Linear(24, 40)
assert not machine.settle_blocks(model), "no program asked to keep blocks"
assert machine.keep_large_blocks() and not machine.settle_blocks(model) and freed_blocks_stay()
machine.LARGE_WEIGHTS = sum(p.nbytes for p in model.parameters())
assert machine.settle_blocks(model) and not freed_blocks_stay()
assert not machine.settle_blocks(model), "done"
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc: blocks are freed as its allocator likes")
def test_a_large_model_returns_what_a_small_one_lets_a_program_keep():
    """In a process of its own: one that kept blocks before, as other tests do, has free ones of any size."""
    subprocess.run([sys.executable, "-c", BLOCKS], check=True, timeout=HANGS)


def test_weights_are_moved_to_vector_boundaries_and_stay_the_same():
    model = make_llama()
    odd = model.model.layers[1].mlp.down_proj.weight
    memory = torch.empty(odd.numel() + 32)
    start = next(i for i in range(1, 17) if memory[i:].data_ptr() % 64)
    odd.data = memory[start : start + odd.numel()].view_as(odd).copy_(odd)
    before = weights(model)
    assert odd.data_ptr() % 64
    assert align_weights(model) >= 1 and align_weights(model) == 0
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
    assert weights(model) == before and model.lm_head.weight is model.model.embed_tokens.weight


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def group(folder, names, limit, used, dropped) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {dropped}\n")


@pytest.mark.parametrize(
    ("membership", "top", "names", "unlimited"),
    [
        ("0::/job/step\n", "", V2, "max"),
        ("9:cpu:/x\n4:hugetlb,memory:/job/step\n0::/\n", "memory", V1, str(2**63 - 4096)),
    ],
    ids=("v2", "v1"),
)
def test_what_control_groups_leave(tmp_path, membership, top, names, unlimited):
    (tmp_path / "cgroup").write_text(membership)
    root = tmp_path / "fs" / top
    group(root / "job/step", names, unlimited, 10, 0)
    group(root / "job", names, 1000, 700, 50)  # the limit is on a group above
    group(root, names, 600, 900, 0)  # above the limit already: nothing is left, not less
    found = _left_by_control_groups(tmp_path / "cgroup", tmp_path / "fs")
    assert sorted(value for value in found if value < 2**62) == [0, 350]


def test_a_containers_group_is_its_root(tmp_path):
    """The path is the host's, the files are those of the container."""
    (tmp_path / "cgroup").write_text("0::/docker/4f2a\n")
    group(tmp_path / "fs", V2, 1000, 100, 0)
    assert _left_by_control_groups(tmp_path / "cgroup", tmp_path / "fs") == [900]


def test_a_limit_below_the_machines_memory_is_what_is_free(monkeypatch, tmp_path):
    assert _left_by_control_groups(tmp_path / "nowhere", tmp_path) == []
    assert 0 < free_memory(torch.device("cpu")) <= psutil.virtual_memory().total
    monkeypatch.setattr(machine, "_left_by_control_groups", lambda membership, root: [2**40, 12345])
    assert free_memory(torch.device("cpu")) == 12345
