"""The machine: its hardware, its free memory, and settings of the memory allocator."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_ALL, _SMALL = 2**31 - 1, 2**20
"""The largest block that the process keeps once it is free: any, or one of a MiB."""
LARGE_WEIGHTS = 2**30
"""Bytes of weights from which on memory counts more than the time to map it."""
_VECTOR = 64
"""Bytes of the widest vectors (AVX-512), and of a cache line."""


def keep_large_blocks() -> bool:
    """Makes glibc keep freed memory for the process instead of returning it to the system.

    On a CPU a sixth of a sweep's time would otherwise go into mapping large blocks again. For programs (the command
    line, the benchmarks), never at import: it changes the whole process. Without glibc nothing happens. A large model
    that is loaded afterwards takes it back: `settle_blocks`.

    Returns:
        Whether it took effect.
    """
    global _kept
    _kept = _keep_blocks_up_to(_ALL)
    return _kept


def settle_blocks(model: nn.Module) -> bool:
    """After `keep_large_blocks`: returns large blocks all the same, if ``model`` has `LARGE_WEIGHTS` on the CPU.

    Kept blocks of many sizes do not fit each other: Llama-2-7B's architecture was localised in twice the memory of its
    tensors. The products of such models take so long that mapping does not count (docs/performance.md).

    Returns:
        Whether large blocks are returned from now on.
    """
    global _kept
    if not _kept or sum(p.nbytes for p in model.parameters() if p.device.type == "cpu") < LARGE_WEIGHTS:
        return False
    _kept = not _keep_blocks_up_to(_SMALL)
    ctypes.CDLL(None).malloc_trim(0)
    return not _kept


_kept = False


def _keep_blocks_up_to(size: int) -> bool:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, size) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def align_weights(model: nn.Module) -> int:
    """Moves weights on the CPU to addresses aligned for its vectors; their values stay the same bit for bit.

    In a memory-mapped file they may lie anywhere; products with unaligned weights take a tenth longer.

    Returns:
        How many were moved.
    """
    moved = [p for p in model.parameters() if p.device.type == "cpu" and p.data_ptr() % _VECTOR]
    for parameter in moved:
        parameter.data = parameter.data.clone()
    return len(moved)


def free_memory(device: torch.device) -> int:
    """Free bytes: on a GPU with what torch holds in reserve, for any other device those of the machine.

    A container or a SLURM job may use less than the machine has: the limits of its control groups count.
    """
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return min(
        [psutil.virtual_memory().available, *_left_by_control_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    )


def _left_by_control_groups(membership: Path, root: Path) -> list[int]:
    """Bytes left under each memory limit of this process (Linux; both versions of control groups).

    Pages of files that can be dropped at any time count as free, as they do for the whole machine.
    """
    left = []
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, dropped = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage, dropped = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = top / path.lstrip("/")
        up_to_top = group.parents[: len(group.parts) - len(top.parts)]  # in a container, its own root
        for folder in (group, *up_to_top):
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                counts = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such limit, or not readable for this process
                continue
            if most.isdigit():
                left.append(max(0, int(most) - used + int(counts.get(dropped, 0))))
    return left


class PeakMemory:
    """Peak memory of a block, above what was in use when it began: ``with PeakMemory(device) as peak``.

    ``peak.bytes``: on a GPU what torch allocated there; on Linux the process's resident size, for which memory that
    the allocator keeps is returned first; None elsewhere.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = _fresh_resident_size()
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        if self._before is None:
            return
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self.bytes = max(0, _status("VmHWM") - self._before)


def _fresh_resident_size() -> int | None:
    """The resident size of this process, whose peak is reset; None where that is unknown."""
    gc.collect()
    try:
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def available_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, object]:
    """Processor, cores, threads, memory, GPUs and platform, for records of a measurement."""
    import psutil
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "processor": processor,
        "cpus": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "platform": platform.platform(),
    }
