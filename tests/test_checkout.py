"""The tests of the bridge and of the runner once more, on the EasyEdit that the user names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT


def test_bridge_and_runner_on_the_named_checkout():
    if CHECKOUT is None:
        pytest.skip("EASYEDIT_HOME IS NOT SET: THE CURRENT EASYEDIT WAS NOT TESTED, only its PyPI release")
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here / "test_bridge.py", here / "test_benchmark.py"],
        env={**os.environ, "EASYEDIT_HOME": CHECKOUT, "KNE_TEST_CHECKOUT": "1"},
        capture_output=True,
        text=True,
        cwd=here.parent,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
