"""Digests: the same in every process, another for another value."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kne_easyedit._util.digest import digest

CODE = """
from kne_easyedit._util.digest import digest
pairs = {(name, i) for name in ("down", "up") for i in range(40)}
print(digest([pairs, frozenset("abc"), type("Plain", (), {})(), {"b": 1, "a": 2}]))
"""


def test_every_process_has_the_same():
    found = {
        subprocess.run(
            [sys.executable, "-c", CODE],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop()) == 65


class Settings:
    def __init__(self, rate):
        self.rate = rate


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({1, 2}, {1, 3}),
        ({"a": 1}, {"a": 2}),
        (Path("a"), Path("b")),
        (torch.float32, torch.bfloat16),
        (Settings(1), Settings(2)),
        (SimpleNamespace(a=1), SimpleNamespace(a=2)),
        ([1, 2], [2, 1]),
    ],
)
def test_other_values_have_others(one, other):
    assert digest(one) != digest(other)


def test_equal_values_have_the_same():
    assert digest({"a": {3, 1}, "b": Settings(1)}) == digest({"b": Settings(1), "a": {1, 3}})
