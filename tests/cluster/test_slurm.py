"""A SLURM of one node: a job and the node are killed, the driver ends; the results are those of the serial run."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from clusters import (  # noqa: F401  (fixtures)
    SHARDS,
    SLURM,
    benchmark,
    bring_up,
    environment,
    figures_of,
    kill,
    kill_all,
    lines_in,
    localisation,
    place_fixture,
    processes,
    run,
    scores_in,
    serial_fixture,
    serial_scores_fixture,
    start,
    wait_until,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", name="cluster")
def cluster_fixture(place):
    yield from bring_up("slurm_up.sh", "slurm_down.sh", "4", env=environment(place, KNE_CACHE=str(place / "cache")))


def ask(cluster: tuple[Path, str], *command: str) -> str:
    """What a command of SLURM's prints."""
    env = {**os.environ, "SLURM_CONF": cluster[1], "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120).stdout


def jobs(place: Path) -> list[int]:
    """The processes of this test's jobs, and of no others."""
    found = processes().items()
    return sorted(n for n, (_, _, args) in found if "python" in args and f"submitit.core._submit {place}" in args)


def steps(place: Path) -> set[int]:
    """SLURM's processes above them."""
    all_, found = processes(), set()
    for number in jobs(place):
        while number in all_:
            if "slurmstepd" in all_[number][2]:
                found.add(number)
            number = all_[number][0]
    return found


def no_jobs(cluster: tuple[Path, str]) -> bool:
    return not ask(cluster, "squeue", "--noheader").strip()


def test_localising_40_facts_in_four_jobs(place, serial_scores, cluster):
    run(place, [*localisation("shards", SHARDS, *SLURM), "-m"], SLURM_CONF=cluster[1])
    said = "".join(file.read_text() for file in (place / "shards/.submitit").rglob("*.out"))
    assert said.count("10 facts, 10 attributed now") == 4, said[-3000:]
    assert scores_in(place / "cache") == scores_in(serial_scores)
    assert "40 facts (0 attributed now" in run(place, localisation("localised"))


def test_the_benchmark_survives_the_death_of_a_job_the_node_and_the_driver(place, serial, cluster):
    conf = cluster[1]
    arguments, log = benchmark("parts", SHARDS, *SLURM), place / "driver.log"
    driver = start(place, arguments, log.name, SLURM_CONF=conf)
    wait_until(lambda: lines_in(place / "parts") >= 1 and bool(jobs(place)), log, driver)
    kill_all(jobs(place)[-1:])  # as the kernel does when memory is short: this job is not begun again
    before = lines_in(place / "parts")
    wait_until(lambda: lines_in(place / "parts") >= before + 2, log)  # with or without the driver
    node = int((cluster[0] / "slurmd.pid").read_text())
    kill_all([node, *steps(place), *jobs(place)])  # what an unplugged machine looks like
    time.sleep(5)
    ask(cluster, "slurmd", "-N", ask(cluster, "hostname", "-s").strip())  # it is back
    before = lines_in(place / "parts")
    wait_until(lambda: lines_in(place / "parts") >= before + 2, log)  # SLURM has begun its jobs again
    if driver.poll() is None:  # the killed job ends it, too, once it has come to it
        kill(driver)
    before = lines_in(place / "parts")
    wait_until(lambda: lines_in(place / "parts") >= before + 1, log)  # the jobs go on without it
    ask(cluster, "scancel", "--user", str(os.getuid()))
    wait_until(lambda: no_jobs(cluster), log)
    assert 6 <= lines_in(place / "parts") < 16
    said = run(place, arguments, SLURM_CONF=conf)
    assert "sweep: 16 of 16 jobs complete; logs:" in said
    assert figures_of(place / "parts") == figures_of(serial)
    assert len(list((place / "parts").rglob("results.jsonl"))) == 16
    assert not list((place / "parts").rglob("results.*-1.jsonl")), "nothing was moved aside"
    assert list((place / "parts/logs/.submitit").rglob("*.err")), "one place for logs"
