"""What the tests of data files share: sample files and records, jobs on them, and their results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer, tiny_hparams

CASES = Path(os.environ.get("KNE_CASES", Path(__file__).parents[2] / "shared/cases"))
FACT = {"subject": "Peru", "prompt": "The capital of Peru is", "target_new": "Oslo", "ground_truth": "Lima"}
PROBE = {"prompt": "The river of Rome is", "ground_truth": "Tiber"}


def case(name: str) -> Path:
    if not (CASES / name).is_file():
        pytest.skip(f"{CASES / name} is not there; name its folder by KNE_CASES")
    return CASES / name


def writer(folder: Path):
    """Writes a file into ``folder``: bytes and texts as they are, anything else as JSON."""

    def write(content, name="data.json") -> Path:
        path = folder / name
        data = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def job_of(requests, tmp_path, hparams=None, **changes):
    from kne_easyedit.benchmark import Run

    requests = [{"index": i, **request} for i, request in enumerate(requests)]
    hparams = hparams or {"KNE": tiny_hparams()}
    return Run(
        make_llama(), make_tokenizer(), requests, hparams, "FACTS", tmp_path / "out", **{"fluency": False, **changes}
    )


def lines_of(job) -> list[dict]:
    return [json.loads(line) for line in (job.folder / "results.jsonl").read_text(encoding="utf-8").split("\n") if line]


FACT_PAIR = ("The capital of France is", "Rome")
