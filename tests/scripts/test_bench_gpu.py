"""scripts/bench_gpu.py: without a GPU it runs through on the CPU with a small shape, and the model stays as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gpu.py"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: make bench-gpu measures it")
def test_the_command_runs_through_on_a_cpu(tmp_path):
    out = tmp_path / "figures" / "gpu.json"
    options = ["--records", "3", "--edits", "2", "--literal-layers", "1", "--data", "embedded", "--out", str(out)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert (found["architecture"], found["environment"]["device"]) == ("tiny", "cpu")
    localisation = found["localisation"]
    assert localisation["facts"] == 3 and localisation["ratio_alone"] > 0 and localisation["rate"] > 0
    assert found["one_edit"]["above"]["stated"] > 0
    assert set(found["one_edit"]["phases"]) >= {"localising", "training", "writing", "applying", "taking back"}
    assert found["steps"]["against_forward_and_backward"] > 0 and found["steps"]["with_neighbours"]["all"] > 0
    assert found["in_a_row"]["edits"] == 2 and found["in_a_row"]["seconds"] > 0
    assert found["seconds"] >= sum(found[f"{name}_seconds"] for name in ("localisation", "one_edit", "steps"))
