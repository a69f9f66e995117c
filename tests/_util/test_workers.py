"""Processes side by side: the same outcome as one after the other, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import FACTS, LLAMA_DOWN, make_llama, make_tokenizer, tiny_hparams
from methods import records, settings

from kne_easyedit import cli
from kne_easyedit._util.workers import WorkerDied, run_parallel, workers_for
from kne_easyedit.attribution import engine
from kne_easyedit.benchmark import Run, run
from kne_easyedit.benchmark.store import read_lines
from kne_easyedit.localization.localizer import Localization

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def squares(number):
    yield number, os.getpid()
    yield number * number, os.getpid()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_item_is_worked_on_once_and_its_events_keep_their_order(workers):
    events = list(run_parallel(squares, [3, 4, 5], workers))
    by_process: dict[int, list] = {}
    for value, pid in events:
        by_process.setdefault(pid, []).append(value)
    assert sorted(value for value, _ in events) == [3, 4, 5, 9, 16, 25]
    assert all(values[1::2] == [value**2 for value in values[::2]] for values in by_process.values())
    assert len(by_process) == min(workers, 3) and (os.getpid() in by_process) == (workers == 1)


PRODUCTS_AFTER_A_FORK = """
import sys
import torch
from kne_easyedit._util import workers

workers.available_cores = lambda: 6  # of 6 cores each of 2 processes has 3
if sys.argv[1] == "old":  # as a library that is older than OpenMP 5
    class Old:
        def __init__(self, path): self.path = path
    real = workers.ctypes.CDLL
    workers.ctypes.CDLL = lambda path: real(path) if path is None else Old(path)
torch.set_num_threads(2)
x = torch.randn(700, 700, requires_grad=True)

def gradient(seed):
    y = torch.full((700, 700), float(seed), requires_grad=True)
    yield torch.autograd.grad((y @ y).sum(), y)[0].max().item(), torch.get_num_threads()

for _ in range(2):  # the threads of this process start again after they were ended
    (x @ x).sum().backward()
    print(sorted(workers.run_parallel(gradient, [1, 2], 2)))
"""


@pytest.mark.parametrize(("library", "threads"), [("present", 3), ("old", 1)])
def test_gradients_and_products_of_several_threads_work_after_a_fork(library, threads):
    """GNU's OpenMP library would wait for ever for threads that a fork has not (a process of its own: it may hang)."""
    command = [sys.executable, "-c", PRODUCTS_AFTER_A_FORK, library]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert told.stdout.splitlines() == [f"[(1400.0, {threads}), (2800.0, {threads})]"] * 2


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_processes_do_not_plan_for_the_same_memory(workers, monkeypatch):
    """Each sees all of it as free."""
    free = 40_000_000
    monkeypatch.setattr(engine, "free_memory", lambda device: free)
    monkeypatch.setattr(engine, "MOST_ROWS", {})  # as where memory is the limit
    prepared = SimpleNamespace(clean=SimpleNamespace(logits=torch.zeros(1, 1, 8)), row_bytes=1000)

    def rows(_):
        yield engine._rows_in_flight(prepared)

    planned = sum(run_parallel(rows, range(workers), workers)) * prepared.row_bytes
    assert min(0.25 * workers, 0.7) * free < planned + workers * 500_000
    assert planned <= engine.TOGETHER * free


class Unportable(ValueError):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_exception_arrives_and_the_processes_end():
    def failing(number):
        yield number
        raise ValueError("the record's own") if number == 1 else Unportable("this", "that")

    with pytest.raises(ValueError, match="the record's own"):
        list(run_parallel(failing, [1, 1], 2))
    with pytest.raises(RuntimeError, match="Unportable: this and that"):
        list(run_parallel(failing, [2, 2], 2))
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_reported():
    def killed(number):
        yield number
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerDied, match="exit code -9"):
        list(run_parallel(killed, [1, 2], 2))
    assert not multiprocessing.active_children()


def test_who_stops_listening_ends_the_processes():
    def endless(number):
        while True:
            yield number

    events = run_parallel(endless, [1, 2], 2)
    assert next(events) in (1, 2)
    events.close()
    assert not multiprocessing.active_children()


def test_a_parent_that_is_killed_leaves_no_process_behind():
    code = """
        import os, time
        from kne_easyedit._util.workers import run_parallel
        def waiting(number):
            yield os.getpid()
            time.sleep(3600)
        for pid in run_parallel(waiting, [1, 2], 2):
            print(pid, flush=True)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    children = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == ""  # returns once every process that holds the pipe has ended
    _, alive = psutil.wait_procs(children, timeout=60)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)  # where nobody collects orphans


def test_a_machine_without_room_or_a_gpu_gets_one_process(monkeypatch):
    model = make_llama()
    monkeypatch.setattr("kne_easyedit._util.workers.available_cores", lambda: 4)
    assert workers_for(model, 8) == 4 and workers_for(model, 3) == 3
    monkeypatch.setattr(
        "kne_easyedit._util.workers.free_memory", lambda device: 3.2 * sum(p.nbytes for p in model.parameters())
    )
    assert workers_for(model, 8) == 2
    assert workers_for(make_llama().to("meta"), 8) == 1


def job(folder, **changes) -> Run:
    requests = [{**record, "index": i} for i, record in enumerate(records())]
    hparams = {"KNE": settings("KNE"), "FT": settings("FT")}
    return Run(make_llama(), make_tokenizer(), requests, hparams, "tiny.json", folder, fluency=False, **changes)


def comparable(folder) -> list[dict]:
    lines = [line for _, line in read_lines(folder / "results.jsonl")]
    measured = ("seconds", "peak_bytes")
    return sorted(
        ({k: v for k, v in line.items() if k not in measured} for line in lines),
        key=lambda line: (line["index"], line["method"]),
    )


def test_processes_give_the_figures_of_one(tmp_path, capsys):
    alone, together = job(tmp_path / "alone"), job(tmp_path / "together", workers=2, show=1)
    run(alone)
    weights = {name: p.clone() for name, p in together.model.named_parameters()}
    capsys.readouterr()
    summary = run(together)
    assert (
        comparable(tmp_path / "together") == comparable(tmp_path / "alone") and len(comparable(tmp_path / "alone")) == 6
    )
    assert summary["records"] == 3
    assert all(torch.equal(p, weights[name]) for name, p in together.model.named_parameters())
    shown = capsys.readouterr()
    assert f"KNE: {together.requests[0]['prompt']} -> " in shown.out + shown.err
    assert together.requests[1]["prompt"] not in shown.out + shown.err


def test_a_killed_process_loses_no_finished_line(tmp_path, monkeypatch):
    kept = []
    original = run.__globals__["_Runner"]._keep

    def keep(self, line):
        original(self, line)
        kept.append(line)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.__globals__["_Runner"], "_keep", keep)
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, workers=2))
    assert not multiprocessing.active_children()
    assert len(comparable(tmp_path)) == 3
    monkeypatch.undo()
    run(job(tmp_path, workers=2))
    run(job(tmp_path / "alone"))
    assert comparable(tmp_path) == comparable(tmp_path / "alone")


def test_facts_are_localised_side_by_side_to_the_same_bits(tmp_path, tokenizer):
    requests = [{"prompt": prompt, "target_new": target} for prompt, target in FACTS]
    found = []
    for workers in (1, 3):
        hparams = tiny_hparams(cache_dir=str(tmp_path / str(workers)), chunk_rows=1)
        scores = Localization(make_llama(), tokenizer, requests, hparams)
        assert scores.compute(workers) == 3 and scores.compute(workers) == 0
        found.append(scores.aggregate()[0].values[LLAMA_DOWN])
    assert torch.equal(found[0], found[1])


def test_the_steps_of_a_long_edit_are_shown(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "kne_easyedit.benchmark.runner.tqdm.set_postfix_str", lambda bar, text, refresh=True: shown.append(text)
    )
    its = job(tmp_path)
    run(its)
    line = next(line for line in comparable(tmp_path) if line["method"] == "KNE")
    steps = [text for text in shown if text.startswith("KNE: France, step ")]
    assert steps == [f"KNE: France, step {i}, loss {loss:.2f}" for i, loss in enumerate(line["losses"][:-1], start=1)]


def test_a_run_that_stops_is_one_line_on_the_screen(tmp_path, monkeypatch, capsys):
    def stopped(arguments):
        raise WorkerDied("workers: a process ended without a word")

    monkeypatch.setattr("kne_easyedit.cli.demo._demo", stopped)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "kne: workers: a process ended without a word\n"
