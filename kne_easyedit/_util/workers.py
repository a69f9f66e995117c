"""Work on records in parallel: forked processes that share the loaded model until they edit it.

Small products gain nothing from a second thread: an edit or an evaluation of SmolLM2 takes as long on two threads as on
one, and many times as long on a machine that has other work, since threads wait for each other. Two processes of one
thread each do nearly twice the work (docs/performance.md). They are forked, so that nothing is imported or loaded again
and the weights are in memory once, except for those that a process edits.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from kne_easyedit._util.errors import RunStopped
from kne_easyedit._util.machine import available_cores, free_memory

Item = TypeVar("Item")
_PR_SET_PDEATHSIG = 1  # Linux's prctl.h
_OMP_PAUSE_HARD = 2  # OpenMP's omp.h
_NEED = 1.5
"""Memory of a process of its own, in sizes of the model: edited weights, their originals, activations."""


_SIDE_BY_SIDE = 1


def side_by_side() -> int:
    """How many processes of one `run_parallel` work at a time; 1 outside of its processes. They share the memory."""
    return _SIDE_BY_SIDE


class WorkerDied(RunStopped):
    """A process ended without a result: out of memory, or killed."""


def workers_for(model: nn.Module, tasks: int) -> int:
    """How many processes to use for ``tasks`` on this machine: one a processor, as far as memory allows.

    It is 1 where forking is not safe: on another system than Linux, or after a GPU was used.
    """
    if sys.platform != "linux" or any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return 1
    size = sum(parameter.nbytes for parameter in model.parameters())
    return max(1, min(available_cores(), tasks, int(free_memory(torch.device("cpu")) / (_NEED * size))))


def run_parallel(function: Callable[[Item], Iterator], items: Sequence[Item], workers: int) -> Iterator:
    """All that ``function(item)`` yields for every item: in order for one item, in any order among items.

    With one worker everything happens in this process. With more, in forked processes, whose changes are not seen here;
    they end with the iterator.

    Args:
        function: Need not be picklable; what it yields must be.
        items: The items, each given to one process.
        workers: Number of processes.

    Raises:
        WorkerDied: A process was killed.
        Exception: What ``function`` raises in any process.
    """
    if workers == 1:
        for item in items:
            yield from function(item)
        return
    context = multiprocessing.get_context("fork")
    number_of = min(workers, len(items))
    threads = _threads_after_a_fork(max(1, available_cores() // number_of))
    processes: dict[Any, multiprocessing.process.BaseProcess] = {}  # connection -> process
    waiting = iter(range(len(items)))
    try:
        for _ in range(number_of):
            ours, theirs = context.Pipe()
            process: multiprocessing.process.BaseProcess = context.Process(
                target=_serve,
                args=(function, items, theirs, [ours, *processes], threads, number_of, os.getpid()),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes[ours] = process
            ours.send(next(waiting))
        while processes:
            connection: Any
            for connection in wait(list(processes)):
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    processes[connection].join()
                    raise WorkerDied(
                        f"workers: a process ended without a word (exit code {processes[connection].exitcode}); "
                        f"if memory was short, use fewer (--workers 1)"
                    ) from error
                if kind == "error":
                    raise content
                if kind == "event":
                    yield content
                elif (number := next(waiting, None)) is not None:
                    connection.send(number)
                else:
                    connection.send(None)
                    processes.pop(connection).join()
                    connection.close()
    finally:
        for process in processes.values():
            process.kill()  # it works on a copy: there is nothing to restore
        for connection, process in processes.items():
            process.join()
            connection.close()


def _threads_after_a_fork(wanted: int) -> int:
    """How many threads a process may use that is forked now: ``wanted``, or 1 where more would hang.

    A forked process has one thread, but GNU's OpenMP library, which comes with PyTorch, still counts on those that this
    process has started, and waits for them for ever. It is told to end them (they start again when they are needed);
    where it cannot be told, one thread needs none of them. The libraries of LLVM and Intel see to this themselves.
    """
    if wanted == 1:
        return 1
    loaded = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in loaded if "libgomp" in line}
    try:
        told = [ctypes.CDLL(path).omp_pause_resource_all(_OMP_PAUSE_HARD) for path in sorted(paths)]
    except (AttributeError, OSError):  # older than OpenMP 5; a file that was replaced since
        return 1
    return 1 if any(told) else wanted


def _serve(
    function: Callable[[Item], Iterator],
    items: Sequence[Item],
    connection: Connection,
    others: list[Connection],
    threads: int,
    processes: int,
    parent: int,
) -> None:
    """The main loop of a process: receives numbers of items, until there are no more."""
    global _SIDE_BY_SIDE
    _SIDE_BY_SIDE = processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which ends this process
    # A parent that is killed must not leave processes behind.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for other in others:
        other.close()
    torch.set_num_threads(threads)
    try:
        while (number := connection.recv()) is not None:
            for event in function(items[number]):
                connection.send(("event", event))
            connection.send(("done", None))
    except BaseException as error:  # noqa: BLE001  (raised in the parent)
        connection.send(("error", _portable(error)))


def _portable(error: BaseException) -> BaseException:
    """The exception if it can be pickled, else one with its type and text."""
    with contextlib.suppress(Exception):  # its constructor may raise anything
        if type(pickle.loads(pickle.dumps(error))) is type(error):  # noqa: S301  (our own bytes, made here)
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")
