"""The tests of all that touches EasyEdit once more, on the EasyEdit that the user names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT

pytestmark = pytest.mark.easyedit
HERE = Path(__file__).parent
FILES = ("bridge", "benchmark", "doctor", "scripts", "test_docs.py", "test_metrics.py")
"""Folders and files whose tests touch EasyEdit."""
AGREEMENT = """
import json, sys
sys.path.insert(0, "benchmark")
from pathlib import Path
from test_runner import RECORDS, record
from conftest import make_llama, make_tokenizer, tiny_hparams
from kne_easyedit.benchmark import Run, run
from kne_easyedit.facts.records import to_request
requests = [{**to_request(r), "index": i} for i, r in enumerate([*RECORDS, record("Peru", "Marie")])]
job = Run(make_llama(), make_tokenizer(), requests, {"KNE": tiny_hparams()}, "RECORDS", Path(sys.argv[1]))
run(job)
lines = [json.loads(line) for line in (job.folder / "results.jsonl").read_text().splitlines()]
print(json.dumps([[line["metrics"]["post"][k] for k in ("rewrite_acc", "portability", "locality")] for line in lines]))
"""


def require_checkout() -> str:
    if CHECKOUT is None:
        pytest.skip("EASYEDIT_HOME IS NOT SET: THE CURRENT EASYEDIT WAS NOT TESTED, only its PyPI release")
    return CHECKOUT


def test_everything_of_easyedit_on_the_named_checkout():
    environment = {**os.environ, "EASYEDIT_HOME": require_checkout(), "KNE_TEST_CHECKOUT": "1"}
    files = [HERE / name for name in FILES]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=environment,
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


def test_kne_edits_alike_through_both_versions(tmp_path):
    """Edit success, portability and locality of the same records are equal, figure by figure."""
    require_checkout()
    found = []
    for name, home in (("release", {}), ("checkout", {"EASYEDIT_HOME": CHECKOUT, "KNE_TEST_CHECKOUT": "1"})):
        environment = {k: v for k, v in os.environ.items() if k != "EASYEDIT_HOME"} | {
            "KNE_CACHE": str(tmp_path / "cache"),
            **home,
        }
        result = subprocess.run(
            [sys.executable, "-c", AGREEMENT, tmp_path / name],
            env=environment,
            capture_output=True,
            text=True,
            cwd=HERE,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(json.loads(result.stdout.splitlines()[-1]))
    assert found[0] == found[1]
    assert [line[0] for line in found[0]] == [[1.0]] * 3
