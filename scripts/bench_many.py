"""Measures what grows with the number of facts: the score cache, results and their report, an edit store.

    python scripts/bench_many.py scores     # 10,000 facts in the score cache: size, listing, opening, pruning
    python scripts/bench_many.py report     # a report over 100,000 result lines: seconds and memory
    python scripts/bench_many.py store      # an edit store of 1,000 edits: opening, applying, switching one off

Scores, lines and edits are synthetic: of a tiny model with random weights, or copies of one made-up line with other
figures. Seconds are those of the processor, so that other programs on the machine matter less; wall time stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from architectures import random_model
from bench_edits import random_edit
from tqdm import tqdm

from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.machine import hardware
from kne_easyedit.attribution.score_cache import ScoreCache
from kne_easyedit.benchmark.result_line import line_head
from kne_easyedit.edits import EditStore
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.models.base import base_of
from kne_easyedit.models.targets import resolve_target

T = TypeVar("T")
KNE = (sys.executable, "-m", "kne_easyedit.cli")


def main() -> None:
    """Runs one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, help="how many facts, lines or edits")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    parser.add_argument("what", choices=("scores", "report", "store"))
    given = parser.parse_args()
    print(hardware())
    with tempfile.TemporaryDirectory() as folder:
        command, number = {"scores": (scores, 10_000), "report": (report, 100_000), "store": (store, 1_000)}[given.what]
        figures = command(Path(folder), given.number or number)
    if given.out:
        atomic_write(given.out, json.dumps(figures, indent=1) + "\n")


def scores(folder: Path, number: int) -> dict[str, Any]:
    """The score cache with ``number`` facts of one module type, 30 layers of 576 neurons, as SmolLM2 has them."""
    model: Any = random_model("smollm2-135m", torch.bfloat16)
    target = resolve_target(model, "model.layers.{}.mlp.down_proj")
    cache = ScoreCache(folder, model)
    facts = [Fact(f"The number {i} is", "even", (1 + i % 500, 2 + i // 500, 7, 9), 3) for i in range(number)]
    values = torch.rand(len(target.layers), target.n_neurons)

    def store_all() -> None:
        for fact in tqdm(facts, desc="store", leave=False, disable=None):
            cache.put(target, fact, values)

    def read_all() -> int:
        return sum(cache.get(target, fact) is not None for fact in tqdm(facts, desc="read", leave=False, disable=None))

    found: dict[str, Any] = {"facts": number, "store": measured("store", store_all)[0]}
    found["bytes"] = sum(path.stat().st_size for path in cache.folder.iterdir())
    found["open"], read = measured("open", read_all)
    if read != number:
        raise RuntimeError(f"{number - read} facts of {number} were not read back")
    for name, command in (
        ("list", ["cache", "info", "--cache-dir", str(folder)]),
        ("prune", ["cache", "prune", "--cache-dir", str(folder), "--all"]),
    ):
        found[name] = child(name, command)
    found["left"] = sum(1 for _ in cache.folder.glob("*.safetensors"))
    print(f"{found['bytes'] / 2**20:.0f} MiB, {1000 * found['open']['cpu'] / number:.2f} s a thousand to open")
    return found


def report(folder: Path, number: int) -> dict[str, Any]:
    """``kne report`` over result lines of ten methods on three data sets."""
    methods, data = [f"METHOD-{i}" for i in range(10)], ("counterfact", "zsre", "recent")
    each = max(1, number // (len(methods) * len(data)))
    chance = random.Random(0)  # noqa: S311  (figures that are made up)
    for set_name in data:
        for method in methods:
            place = folder / set_name / method
            place.mkdir(parents=True)
            lines = (json.dumps(line(chance, method, set_name, i)) for i in range(each))
            (place / "results.jsonl").write_text("\n".join(lines) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("results.jsonl"))
    found: dict[str, Any] = {"lines": each * len(methods) * len(data), "bytes": size}
    print(f"{found['lines']} lines, {size / 2**20:.0f} MiB")
    found["report"] = child("report", ["report", str(folder), "--out", str(folder / "page")])
    return found


def line(chance: random.Random, method: str, data: str, index: int) -> dict[str, Any]:
    """A result line with made-up figures, as long as real ones."""

    def share() -> float:
        return round(chance.random(), 4)

    def neighbour(i: int) -> dict[str, Any]:
        prompt = {"prompt": f"The capital of country {i} is", "subject": f"country {i}", "kind": "relation"}
        answers = {"before": " Paris, and so on and so forth.", "after": " Rome."}
        return prompt | answers | {"kept": share(), "forced_before": share(), "forced_after": share()}

    def metrics() -> dict[str, Any]:
        return {
            "rewrite_acc": [share()],
            "portability": {"Reasoning_acc": [share(), share()], "Subject_Aliasing_acc": [share()]},
            "locality": {"Relation_Specificity_acc": [share() for _ in range(4)]},
        }

    names = ("whole_answer", "neighbourhood", "neighbourhood_free", "bleed", "bleed_forced")
    head = line_head(fingerprint=f"{method}-{data}", settings=method, method=method, index=index, record=f"{index}")
    return {
        **head,
        "data": data,
        "seed": 42,
        "mode": "single",
        "batch_size": 1,
        "chat_template": False,
        "prompt": f"The capital of country {index} is",
        "subject": f"country {index}",
        "target_new": "Rome",
        "seconds": 5 * share(),
        "losses": [8 * share() for _ in range(20)],
        "before": " Paris, and so on.",
        "after": " Rome.",
        "exact_match": float(share() > 0.2),
        "answer_before": " Paris, and so on.",
        "answer_after": " Rome.",
        "probabilities_before": {"new": share(), "old": share()},
        "probabilities_after": {"new": share(), "old": share()},
        "probes": 8,
        **{name: share() for name in names},
        "neighbours": [neighbour(i) for i in range(8)],
        "metrics": {"pre": metrics(), "post": metrics()},
    }


def store(folder: Path, number: int) -> dict[str, Any]:
    """An edit store with ``number`` edits of a tiny model."""
    model: Any = random_model("tiny", torch.float32)
    names = [name for name, _ in model.named_modules() if name.endswith("down_proj")]
    base = base_of(model, names)
    edits = [random_edit(base, 4, i) for i in range(number)]

    def fill() -> None:
        kept = EditStore(folder / "edits")
        for i, edit in enumerate(tqdm(edits, desc="add", leave=False, disable=None)):
            kept.add(edit, f"edit-{i}")

    found = {"edits": number, "add": measured("add", fill)[0]}
    found["open and list"], (kept, listed) = measured("open and list", lambda: opened(folder / "edits"))
    if len(listed) != number:
        raise RuntimeError(f"{len(listed)} edits of {number} are listed")
    found["apply"] = measured("apply", lambda: kept.apply(model))[0]
    kept.off(f"edit-{number // 2}")
    found["apply without one"] = measured("apply without one", lambda: kept.apply(model))[0]
    kept.set_active([])
    found["take all back"] = measured("take all back", lambda: kept.apply(model))[0]
    if conflict := base.conflict(base_of(model, names)):
        raise RuntimeError(f"not taken back: {conflict}")
    return found


def opened(folder: Path) -> tuple[EditStore, tuple[Any, ...]]:
    """A store, and its list."""
    kept = EditStore(folder)
    return kept, kept.list()


def measured(name: str, work: Callable[[], T]) -> tuple[dict[str, float], T]:
    """Seconds of the processor and of the clock that ``work()`` takes, and its result."""
    with clocks(name) as found:
        result = work()
    return found, result


@contextmanager
def clocks(name: str) -> Iterator[dict[str, float]]:
    """Fills the mapping with seconds when the block ends, and prints them."""
    found: dict[str, float] = {}
    start, cpu = time.perf_counter(), time.process_time()
    yield found
    found |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    print(f"{name:>18}: {found['cpu']:8.2f} s of the processor, {found['seconds']:8.2f} s", flush=True)


def child(name: str, command: list[str]) -> dict[str, float]:
    """A command of `kne` in a process of its own: seconds of the processor and of the clock, and its peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen([*KNE, *command], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"kne {' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    scale = 1 if sys.platform == "darwin" else 1024
    found = {
        "seconds": time.perf_counter() - start,
        "cpu": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * scale,
    }
    print(
        f"{name:>18}: {found['cpu']:8.2f} s of the processor, {found['seconds']:8.2f} s, "
        f"{found['peak_bytes'] / 2**20:.0f} MiB",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
