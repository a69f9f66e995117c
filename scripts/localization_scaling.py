"""The command ``scaling`` of bench_localization.py: time and memory of one sweep, one quantity varied at a time."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from localization_measures import load, multiplications, product_rate, spread, timed

from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.machine import PeakMemory, keep_large_blocks
from kne_easyedit.attribution.engine import attribute_facts
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.models.fast_linear import linear
from kne_easyedit.models.targets import resolve_target

BENCHMARK = Path(__file__).with_name("bench_localization.py")
GROWTH: dict[str, list[int]] = {
    "layers": [1, 5, 10, 20, 30],
    "steps": [5, 10, 20, 40, 80],
    "answer tokens": [1, 2, 4, 8, 16],
    "prompt tokens": [8, 16, 32, 64, 128, 256],
    "facts in a sweep": [1, 2, 4, 8],
}
USUAL = {"layers": 30, "steps": 20, "answer tokens": 2, "prompt tokens": 12, "facts in a sweep": 1}


def scaling(options: argparse.Namespace) -> dict | None:
    """Time and peak memory of one sweep, one quantity varied at a time; each point in its own process."""
    if options.point:
        print(json.dumps(measure_point(options, json.loads(options.point))))
        return None
    series: dict[str, list[dict]] = {}
    for name, values in GROWTH.items():
        series[name] = []
        for value in values:
            point = json.dumps({**USUAL, name: value})
            command = [
                sys.executable,
                str(BENCHMARK),
                "--hparams",
                str(options.hparams),
                *(["--module", options.module] if options.module else []),
            ]
            command += ["scaling", "--repeats", str(options.repeats), "--point", point]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
            found = json.loads(done.stdout.splitlines()[-1])
            series[name].append({"value": value, **found})
            print(
                f"{name:>16} {value:>4}: {found['seconds']:7.2f} s {found['multiplications'] / 1e9:8.0f} G needed, "
                f"{found['multiplications'] / found['seconds'] / 1e9:6.1f} G/s "
                f"({found['share']:4.0%} of the fastest product), "
                f"{found['peak'] / 2**20:7.0f} MiB above the weights",
                flush=True,
            )
    if options.out:
        draw_scaling(series, options.out / "scaling.png")
    return {"usual": USUAL, "series": series}


def measure_point(options: argparse.Namespace, point: dict) -> dict:
    """Seconds, multiplications, share of the fastest product and peak bytes of one sweep of random tokens."""
    model, _, hparams = load(options)
    layers = spread(tuple(range(sum(1 for _ in model.get_submodule("model.layers").children()))), point["layers"])
    target = resolve_target(model, options.module or hparams.target_modules[0], layers)
    generator = torch.Generator().manual_seed(0)
    length = point["prompt tokens"] + point["answer tokens"]
    facts = [
        Fact("", "", tuple(torch.randint(1000, 40000, (length,), generator=generator).tolist()), point["prompt tokens"])
        for _ in range(point["facts in a sweep"])
    ]

    def work() -> None:
        attribute_facts(model, [target], facts, point["steps"])

    with PeakMemory(torch.device("cpu")) as peak:
        work()
    keep_large_blocks()
    work()
    seconds = median(timed(work)[0] for _ in range(options.repeats))
    fastest = product_rate(model, linear)
    needed = multiplications(model, target, facts, point["steps"])
    return {"seconds": seconds, "multiplications": needed, "share": needed / seconds / fastest, "peak": peak.bytes}


def draw_scaling(series: dict, path: Path) -> None:
    """Seconds (above) and peak memory (below) against each quantity, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(series), 5.6), layout="constrained")
    axes = figure.subplots(2, len(series), sharex="col")
    for (name, points), (above, below) in zip(series.items(), axes.T):
        values = [p["value"] for p in points]
        scale = median(p["seconds"] / p["multiplications"] for p in points)
        above.plot(values, [p["seconds"] for p in points], "o-", color="#1f6f8b", label="measured")
        above.plot(
            values,
            [p["multiplications"] * scale for p in points],
            ":",
            color="#222222",
            label="multiplications x constant",
        )
        below.plot(values, [p["peak"] / 2**20 for p in points], "o-", color="#b5532a")
        above.set(title=name, ylim=(0, None))
        below.set(xlabel=name, ylim=(0, None))
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="#dddddd", linewidth=0.6)
    axes[0, 0].set_ylabel("seconds a sweep")
    axes[1, 0].set_ylabel("peak MiB above the weights")
    axes[0, 0].legend(fontsize=7, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    atomic_write(path, image.getvalue())
