"""A Ray cluster of two nodes: a worker, a node and the driver are killed; the results are those of the serial run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from clusters import (  # noqa: F401  (fixtures)
    RAY,
    SHARDS,
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
from safetensors.torch import load_file

pytest.importorskip("ray", reason="RAY WAS NOT TRIED: it is not installed; `make test-cluster` installs it")
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", name="cluster")
def cluster_fixture(place):
    yield from bring_up("ray_up.sh", "ray_down.sh", "2", "1", env=environment(place, KNE_CACHE=str(place / "cache")))


def workers(cluster: Path) -> list[int]:
    """The processes that run jobs now; Ray calls them by their function, and they are of a node's session."""
    nodes = {int(file.read_text()) for file in cluster.glob("node-*.pid")}
    found = processes().items()
    return sorted(n for n, (_, session, args) in found if session in nodes and args.startswith("ray::_run_job"))


def test_localising_40_facts_on_four_workers(place, serial_scores, cluster):
    _, address = cluster
    said = run(place, [*localisation("shards", SHARDS, *RAY), "-m"], RAY_ADDRESS=address)
    # Two nodes of one machine both show what is printed.
    assert set(re.findall(r"shard (\d)/4: 10 facts, 10 attributed now", said)) == set("0123"), said[-3000:]
    assert scores_in(place / "cache") == scores_in(serial_scores)
    said = run(place, localisation("localised"))
    assert "40 facts (0 attributed now" in said
    for name in ("ensemble.json", "scores.safetensors"):
        assert found_in(place / "localised" / name) == found_in(place / "serial-localised" / name)


def found_in(path: Path) -> dict:
    """The content of a file of results: without times, and without the order of a header's texts, which is random."""
    if path.suffix == ".json":
        return {name: value for name, value in json.loads(path.read_bytes()).items() if name != "seconds"}
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def test_the_benchmark_survives_the_death_of_a_worker_a_node_and_the_driver(place, serial, cluster):
    folder, address = cluster
    arguments, log = benchmark("parts", SHARDS, *RAY), place / "driver.log"
    driver = start(place, arguments, log.name, RAY_ADDRESS=address)
    wait_until(lambda: lines_in(place / "parts") >= 1 and bool(workers(folder)), log, driver)
    kill_all(workers(folder)[:1])
    before = lines_in(place / "parts")
    wait_until(lambda: lines_in(place / "parts") >= before + 2, log, driver)  # Ray has begun the job again
    node = int((folder / "node-1.pid").read_text())
    kill_all(n for n, (_, session, _) in processes().items() if session == node)  # as an unplugged machine
    before = lines_in(place / "parts")
    wait_until(lambda: lines_in(place / "parts") >= before + 2, log, driver)
    kill(driver)
    done = lines_in(place / "parts")
    assert 5 <= done < 16
    said = run(place, arguments, RAY_ADDRESS=address)
    assert "sweep: 16 of 16 jobs complete; logs:" in said
    assert figures_of(place / "parts") == figures_of(serial)
    assert len(list((place / "parts").rglob("results.jsonl"))) == 16
    assert not list((place / "parts").rglob("results.*-1.jsonl")), "nothing was moved aside"
    assert (place / "parts/logs/run_benchmark.log").is_file()
