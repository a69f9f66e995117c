"""Result lines and a manifest made by hand, as runs write them."""

from __future__ import annotations

import json

PRE = {
    "rewrite_acc": [0.25],
    "portability": {"Reasoning_acc": [0.125]},
    "locality": {},
    "fluency": {"ngram_entropy": 6.0},
}


def line(method: str, index: int, success: float, data: str = "test_cf", **changes) -> dict:
    post = {
        "rewrite_acc": [success],
        "portability": {"Reasoning_acc": [success / 2]},
        "locality": {"L_acc": [0.5]},
        "fluency": {"ngram_entropy": 5.5},
    }
    return {
        "fingerprint": f"{method}-{data}",
        "method": method,
        "index": index,
        "record": f"{data}-{index}",
        "data": data,
        "seed": 42,
        "mode": "single",
        "prompt": "The capital | of <b>France</b> is",
        "target_new": "Rome",
        "before": "Paris",
        "after": "Rome *now*",
        "seconds": 2.0,
        "peak_bytes": 3 * 2**20,
        "losses": [3.0, 1.0, 0.2],
        "exact_match": float(success == 1),
        "metrics": {"pre": PRE, "post": post},
        **changes,
    }


def write(path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))


MANIFEST = {
    "kne_easyedit": "1",
    "started": "2026-01-01T00:00:00+00:00",
    "model": {"name": "tiny", "sha256": "0" * 64},
    "seed": 42,
    "mode": "single",
    "data": {"name": "test_cf.json", "sha256": "1" * 64, "records": []},
    "easyedit": {"kind": "checkout", "version": "abc", "patches": []},
    "methods": {},
    "fingerprints": {},
    "chat_template": False,
    "fluency_variant": "punkt",
    "environment": {"python": "3", "torch": "2", "transformers": "5", "peft": "0", "dtype": "torch.float32"},
    "machine": {"processor": "A", "cpus": 2, "threads": 1, "gpus": []},
}
LINES = [
    *(line("KNE", i, 1.0) for i in range(6)),
    *(line("FT", i, s) for i, s in enumerate([0.0, 1.0, 0.5, 0.0, 1.0])),
    *(line("MEMIT", i, 0.2) for i in range(5)),
    *(line("KNE-up", i, 0.8) for i in range(6)),
    *(line("KNE", i, 1.0, "ZsRE-test-all") for i in range(3)),
]
