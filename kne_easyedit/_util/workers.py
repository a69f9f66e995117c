"""Work on records side by side: processes that share the loaded model until they edit it.

Small products gain nothing from a second thread: an edit or an evaluation of SmolLM2 takes as long on two threads as on
one, and on a machine that has other work many times as long, since threads wait for each other. Two processes of one
thread each do nearly twice the work (docs/performance.md). They are forked, so that nothing is imported or loaded again
and the weights lie in memory once, but for those that a process edits.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch
from torch import nn

from kne_easyedit._util.errors import RunStopped
from kne_easyedit._util.machine import available_cores, free_memory

Item = TypeVar("Item")
_PR_SET_PDEATHSIG = 1  # Linux's prctl.h
_NEED = 1.5
"""Memory that a process may take for itself, in sizes of the model: edited weights, their originals, activations."""


class WorkerDied(RunStopped):
    """A process ended without a word: out of memory, or killed."""


def workers_for(model: nn.Module, tasks: int) -> int:
    """How many processes suit ``tasks`` on this machine: one a processor as far as memory goes; 1 where none can be forked.

    A process that has used a GPU cannot be forked, and on macOS a fork is not safe: there it is 1.
    """
    if sys.platform != "linux" or any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return 1
    size = sum(parameter.nbytes for parameter in model.parameters())
    return max(1, min(available_cores(), tasks, int(free_memory(torch.device("cpu")) / (_NEED * size))))


def run_parallel(function: Callable[[Item], Iterator], items: Sequence[Item], workers: int) -> Iterator:
    """All that ``function(item)`` yields for every item, as it comes: of one item in order, items mixed.

    With one worker everything happens in this process. With more, forked processes do it; what they change is not seen
    here. ``function`` need not be picklable, what it yields must be. An exception in a process is raised here, and all
    processes end with the iterator, whatever ends it. Raises WorkerDied if a process is killed.
    """
    if workers == 1:
        for item in items:
            yield from function(item)
        return
    context = multiprocessing.get_context("fork")
    threads = max(1, available_cores() // workers)
    processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
    waiting = iter(range(len(items)))
    try:
        for _ in range(min(workers, len(items))):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(function, items, theirs, [ours, *processes], threads, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            processes[ours] = process
            ours.send(next(waiting))
        while processes:
            for connection in wait(list(processes)):
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    processes[connection].join()
                    raise WorkerDied(
                        f"workers: a process ended without a word (exit code {processes[connection].exitcode}); if memory was short, use fewer (--workers 1)"
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
            process.kill()  # what it works on is a copy: nothing to put back
        for connection, process in processes.items():
            process.join()
            connection.close()


def _serve(function, items, connection: Connection, others: list[Connection], threads: int, parent: int) -> None:
    """What a process does: items by their numbers, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, and that ends this process
    ctypes.CDLL(None).prctl(
        _PR_SET_PDEATHSIG, signal.SIGKILL
    )  # a parent that is killed must not leave processes behind
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
    except BaseException as error:
        connection.send(("error", _portable(error)))


def _portable(error: BaseException) -> BaseException:
    """The exception as it arrives on the other side; one that cannot be sent, by its type and text."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):  # our own bytes, made here
            return error
    except Exception:  # an exception's own constructor may raise anything
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
