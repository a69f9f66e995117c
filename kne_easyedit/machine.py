"""The machine: what it is, how much memory is free, and how the allocator keeps it."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST = 2**31 - 1
_VECTOR = 64
"""Bytes of the widest vectors (AVX-512), and of a cache line."""


def keep_large_blocks() -> bool:
    """Tells glibc to keep freed memory for the process instead of returning it; whether it took effect.

    On a CPU a sixth of a sweep's time would go into mapping large blocks afresh.
    For programs of their own (the command line, the benchmarks), never at import: it changes the whole process.
    Elsewhere than on glibc nothing happens.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, _LARGEST) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def align(model) -> int:
    """Moves weights on the CPU to addresses that suit its vectors, bit by bit the same; returns how many it moved.

    A file that is mapped leaves them where it has them; products with such weights take a tenth longer.
    """
    moved = [p for p in model.parameters() if p.device.type == "cpu" and p.data_ptr() % _VECTOR]
    for parameter in moved:
        parameter.data = parameter.data.clone()
    return len(moved)


def free_memory(device) -> int:
    """Bytes that are free on a torch device: on a GPU with what torch holds in reserve, elsewhere in the machine."""
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return psutil.virtual_memory().available


def environment(model) -> dict[str, object]:
    """Versions and machine: what a figure depends on beside the settings."""
    import peft
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": str(next(model.parameters()).device),
        "dtype": str(next(model.parameters()).dtype),
    }
