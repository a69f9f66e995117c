"""Everything that is claimed for GPUs, in one run and one file: make bench-gpu

    python scripts/bench_gpu.py --out outputs/bench-gpu.json

Llama-2-7B's architecture with random weights in bfloat16: localising 200 records, the memory of one edit, a step of
training against a forward and backward pass, with and without neighbours, and 100 edits in a row. Without a GPU the
same runs on the CPU with a small architecture: that the command works, no claim. Records are those of --data, by
default counterfact's test records below $KNOWEDIT, else the packaged ones, of which there are fewer. Parts are written
as they are finished.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from architectures import ARCHITECTURES, fitting_tokenizer, random_model, settings_of
from bench_editing import neighbours, step
from editing_memory import memory
from localization_random import many_facts

from kne_easyedit import KNEHyperParams, compute_edit, restore
from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.machine import PeakMemory, hardware, keep_large_blocks
from kne_easyedit._util.settings import replace_settings
from kne_easyedit.editing.row_edit import write_rows
from kne_easyedit.facts.encoding import Tokenizer, encode_request
from kne_easyedit.facts.records import load_requests
from kne_easyedit.localization.localizer import find_ensemble
from kne_easyedit.models.devices import environment
from kne_easyedit.models.targets import resolve_target

RECORDS = "benchmark/wiki_counterfact/test_cf.json"


def main() -> None:
    """Runs all parts."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama2-7b" if gpu else "tiny")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--data", default=default_data(), help="KnowEdit file (default %(default)s)")
    parser.add_argument("--records", type=int, default=200 if gpu else 10, help="localised (default %(default)s)")
    parser.add_argument("--edits", type=int, default=100 if gpu else 5, help="in a row (default %(default)s)")
    parser.add_argument("--literal-layers", type=int, default=2, help="timed literally; 0: none (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-gpu.json"))
    given = parser.parse_args()
    keep_large_blocks()
    start = time.perf_counter()
    model: Any = random_model(given.architecture, getattr(torch, given.dtype), given.device)
    requests = load_requests(given.data, max(given.records, given.edits))
    tokenizer = fitting_tokenizer(requests, model.config.vocab_size)
    settings = {"device": given.device, "num_steps": 10}
    hparams = settings_of(given.architecture, model, **settings)
    figures: dict[str, Any] = {
        "architecture": given.architecture,
        "data": given.data,
        "records": len(requests),
        "environment": environment(model),
        "hardware": hardware(),
        "load_seconds": time.perf_counter() - start,
    }
    print(f"{given.architecture} in {given.dtype} on {given.device}; {hardware()}")

    def localisation() -> dict[str, Any]:
        target = resolve_target(model, hparams.target_modules[0])
        facts = [encode_request(tokenizer, request) for request in requests[: given.records]]
        return many_facts(model, target, facts, hparams.attribution_steps, given.literal_layers)

    def steps() -> dict[str, Any]:
        plain = {"input_projection": False, "subject_variants": 0, "continuation_weight": 0.0}
        paper = replace_settings(hparams, optimizer="adamw", **plain)
        few = {"neighbour_relation_size": 4, "neighbour_subject_size": 4}
        with tempfile.TemporaryDirectory() as cache:
            paper = replace_settings(paper, cache_dir=cache)
            return {
                "against_forward_and_backward": step(model, tokenizer, requests[:3], paper, 3),
                "with_neighbours": neighbours(model, tokenizer, requests[:2], replace_settings(paper, **few), 2),
            }

    parts = {
        "localisation": localisation,
        "one_edit": lambda: memory(model, tokenizer, requests[0], hparams),
        "steps": steps,
        "in_a_row": lambda: in_a_row(model, tokenizer, requests[: given.edits], hparams),
    }
    for name, part in parts.items():
        print(f"\n{name}", flush=True)
        begin = time.perf_counter()
        figures[name] = part()
        figures[f"{name}_seconds"] = time.perf_counter() - begin
        figures["seconds"] = time.perf_counter() - start
        atomic_write(given.out, json.dumps(figures, indent=1) + "\n")
    print(f"\n{figures['seconds']:.0f} s in all; {given.out}")


def default_data() -> str:
    """Real records where there are some, else the packaged ones."""
    found = Path(os.environ.get("KNOWEDIT", "")) / RECORDS
    return str(found) if os.environ.get("KNOWEDIT") and found.is_file() else "embedded"


def in_a_row(model: Any, tokenizer: Tokenizer, requests: Sequence[Mapping], hparams: KNEHyperParams) -> dict[str, Any]:
    """Edits of the same ensemble one after the other, each on top of those before; the model is left as it was.

    Returns:
        ``edits``, ``seconds`` of the mean edit (found, trained and written), and of the first and last ten; ``bytes``
        above what was in use before, at the peak.
    """
    seconds: list[float] = []
    before: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as cache, PeakMemory(model.device) as peak:
        hparams = replace_settings(hparams, cache_dir=cache)
        ensemble = find_ensemble(model, tokenizer, requests[:1], hparams)
        for request in requests:
            begin = time.perf_counter()
            edit = compute_edit(model, tokenizer, [request], hparams, ensemble)
            originals = write_rows(model, edit)
            if not before:
                before = originals
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        del originals
    restore(model, before)
    found = {
        "edits": len(seconds),
        "seconds": mean(seconds),
        "first_seconds": mean(seconds[:10]),
        "last_seconds": mean(seconds[-10:]),
        "bytes": peak.bytes,
    }
    print(
        f"{len(seconds)} edits: {found['seconds']:.2f} s each (first {found['first_seconds']:.2f}, last "
        f"{found['last_seconds']:.2f})"
    )
    return found


if __name__ == "__main__":
    main()
