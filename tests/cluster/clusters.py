"""A Ray of two nodes and a SLURM of one, by the scripts of scripts/cluster, and what is run through them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from conftest import HANGS, make_llama, make_tokenizer, with_same_threads

from kne_easyedit.benchmark.collect import collect

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts/cluster"
BIN = Path(sys.executable).parent
SUBJECTS = ("France", "Spain", "Peru", "Italy")
ANSWERS = ("Rome", "Paris", "Madrid", "Lima", "Latin", "Tiber", "Marie", "Ada", "Oslo", "mother")
SHARDS = "shard=0/4,1/4,2/4,3/4"
RAY = ["hydra/launcher=ray_cluster", "hydra.launcher.ray.remote.num_cpus=1", "hydra.launcher.ray.remote.num_gpus=0"]
SLURM = [
    "hydra/launcher=slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.mem_gb=2",
]


def record(subject: str, target: str) -> dict:
    probe = [{"prompt": "The river that flows through Rome is", "ground_truth": [["the Tiber"]]}]
    return {
        "subject": subject,
        "prompt": f"The capital of {subject} is",
        "target_new": target,
        "ground_truth": "Paris",
        "portability": {"Reasoning": probe},
        "locality": {"Relation_Specificity": probe},
    }


def make_place(folder: Path) -> Path:
    """A folder with a tiny model, two data sets of four records, and 40 facts to localise on."""
    make_llama().save_pretrained(folder / "tiny-model")
    make_tokenizer().save_pretrained(folder / "tiny-model")
    facts = [record(subject, answer) for subject in SUBJECTS for answer in ANSWERS]
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "a.json").write_text(json.dumps([record(s, t) for s in SUBJECTS[:2] for t in ("Rome", "Oslo")]))
    (folder / "b.json").write_text(json.dumps([record(s, t) for s in SUBJECTS[2:] for t in ("Latin", "Madrid")]))
    return folder


def environment(place: Path, **changes: str) -> dict[str, str]:
    return {
        **with_same_threads(),
        "PATH": os.pathsep.join((str(BIN), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "KNE_CACHE": str(place / "cache"),
        "RAY_DEDUP_LOGS": "0",  # lines that differ in numbers only are one otherwise
        "RAY_memory_monitor_refresh_ms": "0",  # other programs of this machine may need its memory
        **changes,
    }


def benchmark(out: str, *overrides: str) -> list[str]:
    """Two methods on two data sets: KNE, localised on 40 facts, and EasyEdit's FT."""
    data = ["benchmark/data@data=embedded", "data.name=tiny", "data.file=a.json,b.json", "data.offset=0"]
    data += ["data.localization.file=facts.json", "data.localization.size=40", "on_bad_record=fail"]
    method = ["benchmark/method@method=kne,ft", "++method.settings.layers=[2]", "++method.settings.num_steps=3"]
    model = ["++model.settings.model_name=tiny-model", "evaluation.fluency=false"]
    return [str(ROOT / "scripts/run_benchmark.py"), "-m", *data, *method, *model, f"out={out}", *overrides]


def localisation(out: str, *overrides: str) -> list[str]:
    """40 facts, each a sweep of its own: which facts share one changes the last bit of a score, and nothing else."""
    settings = ["model=tiny-model", "data=facts.json", "size=40", "hparams.localization_offset=0"]
    settings += ["hparams.attribution_steps=4", "hparams.chunk_rows=1", "hparams.device=cpu", f"out={out}"]
    return [str(ROOT / "scripts/localize.py"), *settings, *overrides]


def run(place: Path, arguments: list[str], succeeds: bool = True, **changes: str) -> str:
    """Runs a script to its end; returns what it has said. ``changes`` are of the environment."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env=environment(place, **changes),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == succeeds, said[-5000:]
    return said


def start(place: Path, arguments: list[str], log: str, **changes: str) -> subprocess.Popen:
    """Starts a script as the driver of a sweep, in a session of its own."""
    with (place / log).open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=place,
            env=environment(place, **changes),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def processes() -> dict[int, tuple[int, int, str]]:
    """All processes: number -> parent, session and command line."""
    lines = subprocess.run(["ps", "-wweo", "pid=,ppid=,sid=,args="], capture_output=True, text=True).stdout.splitlines()
    return {int(p): (int(parent), int(session), args) for p, parent, session, args in (x.split(None, 3) for x in lines)}


def kill_all(numbers: Iterable[int]) -> None:
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(number, signal.SIGKILL)


def lines_in(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in folder.rglob("results.jsonl"))


def wait_until(happened: Callable[[], bool], log: Path, driver: subprocess.Popen | None = None) -> None:
    """Waits; as long as the driver lives, if one is given. ``log``: what the driver says, for the message."""
    end = time.monotonic() + HANGS
    while not happened():
        assert driver is None or driver.poll() is None, f"the driver has ended: {log.read_text()[-5000:]}"
        assert time.monotonic() < end, f"it hangs: {log.read_text()[-5000:]}"
        time.sleep(0.2)


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def figures_of(folder: Path) -> list[dict]:
    """All lines of a run, without what time and machine alone decide, to the last digit."""
    drop = ("seconds", "peak_bytes")
    lines = [{name: value for name, value in line.items() if name not in drop} for line in collect([folder]).lines]
    return sorted(lines, key=lambda line: (line["data"], line["method"], line["index"]))


def scores_in(cache: Path) -> dict[str, bytes]:
    """Name of an entry -> the bits of its scores, of all entries of a score cache."""
    from kne_easyedit.attribution.score_cache import entry_files, read_entry

    return {path.name: read_entry(path).scores.numpy().tobytes() for path in entry_files(cache)}


def bring_up(script: str, down: str, *options: str, env: dict[str, str]) -> Iterator[tuple[Path, str]]:
    """A cluster: its folder and what its script prints. Skips, saying so, where there is no such software."""
    folder = Path(tempfile.mkdtemp(prefix="kne", dir="/tmp"))  # short: sockets lie in it
    up = subprocess.run(
        [str(SCRIPTS / script), str(folder), *options], env=env, capture_output=True, text=True, timeout=HANGS
    )
    if up.returncode == 3:
        shutil.rmtree(folder)
        pytest.skip(f"THIS CLUSTER WAS NOT TRIED: {up.stderr.strip()}")
    assert up.returncode == 0, up.stderr
    try:
        yield folder, up.stdout.strip()
    finally:
        subprocess.run([str(SCRIPTS / down), str(folder)], env=env, timeout=HANGS)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", name="place")
def place_fixture(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module", name="serial")
def serial_fixture(place) -> Path:
    """The folder of the benchmark, run one job after the other: what all must equal."""
    run(place, benchmark("serial"), KNE_CACHE=str(place / "serial-cache"))
    return place / "serial"


@pytest.fixture(scope="module", name="serial_scores")
def serial_scores_fixture(place) -> Path:
    """The score cache of the localisation, run in one process: what all must equal."""
    run(place, localisation("serial-localised"), KNE_CACHE=str(place / "serial-scores"))
    return place / "serial-scores"
