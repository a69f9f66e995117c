"""The tests' own promises: what a test needs is known, a tolerance can fail, and no run passes that should not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HANGS, TIERS, tier_of
from rounding import A_MODEL, ONE_SUM, roundings

HERE = Path(__file__).parent
ROOT = HERE.parent


# Tolerances


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_sums_in_another_order_are_equal_up_to_rounding_and_a_wrong_term_is_not(dtype, scale):
    """Whatever the magnitude and the type: a limit for one number alone would fit no other."""
    a, b = (torch.randn(50, 40, generator=torch.Generator().manual_seed(seed)).to(dtype) * scale for seed in (1, 2))
    one, other = a.T @ b, sum(torch.outer(x, y) for x, y in zip(a.flip(0), b.flip(0)))
    assert roundings(one, other) < ONE_SUM
    if dtype != torch.bfloat16:  # three digits do not tell
        assert roundings(a[:-1].T @ b[:-1], other) > 100 * A_MODEL


def test_the_type_of_a_computation_counts_not_that_of_its_result():
    third = torch.tensor([1.0]) / 3
    assert roundings(third.double(), torch.tensor([1.0], dtype=torch.float64) / 3) > A_MODEL
    assert roundings(third.double(), torch.tensor([1.0], dtype=torch.float64) / 3, torch.float32) < 1


# What a test needs


@pytest.mark.parametrize(
    ("source", "tier"),
    [
        ("from kne_easyedit import attribute\n", "unit"),
        ("from kne_easyedit import apply_kne_to_model, bridge\n", "easyedit"),
        ("def f():\n    from kne_easyedit.bridge import statistics\n", "easyedit"),
        ("from methods import settings\n", "easyedit"),
        ("from kne_easyedit.models.smollm2 import smollm2_path\n", "model"),
        ("from kne_easyedit import bridge\npytestmark = pytest.mark.unit\n", "unit"),
        ('"""About the bridge: from kne_easyedit import bridge"""\n', "unit"),
    ],
)
def test_a_modules_imports_say_what_it_needs(tmp_path, source, tier):
    path = tmp_path / "test_x.py"
    path.write_text(source)
    assert tier_of(path) == tier


def test_every_tier_has_modules():
    assert {tier_of(path) for path in HERE.rglob("test_*.py")} == set(TIERS)


def pytest_on(folder: Path, source: str, *options: str) -> subprocess.CompletedProcess:
    """A session of its own on one file, under this suite's conftest."""
    (folder / "test_it.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, ROOT)))}
    settings = [
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(folder),
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", "-q", *settings]
    return subprocess.run(
        [*command, *options, str(folder)], cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS
    )


@pytest.mark.slow
def test_a_unit_test_that_imports_easyedit_or_converts_the_model_fails_and_says_what_to_do(tmp_path):
    source = """
    import sys, types
    def test_import():
        sys.modules["easyeditor"] = types.ModuleType("easyeditor")
    def test_model():
        __import__("kne_easyedit.models.smollm2").smollm2.convert_smollm2(None, None)
    def test_neither():
        assert "easyeditor" in sys.modules
    """
    done = pytest_on(tmp_path, "\n".join(line[4:] for line in source.splitlines()))
    assert (
        "pytest.mark.easyedit` into the module" in done.stdout and "pytest.mark.model` into the module" in done.stdout
    )
    assert re.search(r"1 failed, 2 passed, 1 error", done.stdout), done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os\ndef test_it():\n    os.abort()\n", "crashed while running"),
        ("", "no tests ran"),
        ("import no_such_module\n", "No module named 'no_such_module'"),
    ],
    ids=["crash", "nothing", "import"],
)
def test_no_session_of_several_workers_passes_that_did_not_run_its_tests(tmp_path, source, said):
    done = pytest_on(tmp_path, source, "-n", "2", "--dist", "worksteal")
    assert done.returncode != 0 and said in done.stdout, done.stdout + done.stderr
