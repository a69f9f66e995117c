"""Claims: one process has a piece of work, whatever becomes of it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS

from kne_easyedit._util import claims
from kne_easyedit._util.claims import FILE, claimed

HOLDER = """
import sys, time
from pathlib import Path
from kne_easyedit._util.claims import claimed
with claimed(Path(sys.argv[1]), sys.argv[2:]) as ours:
    print(ours, flush=True)
    time.sleep(3600)
"""


@pytest.fixture(name="hold")
def hold_fixture(tmp_path):
    """Starts processes that claim names, and returns them with what they got."""
    started = []

    def hold(*names: str) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), *names], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield hold
    for process in started:
        process.kill()
        process.wait(HANGS)


def test_what_another_process_has_is_not_claimed_and_what_it_has_not_is(tmp_path, hold):
    assert hold("a", "b")[1] == "True"
    assert hold("c", "b")[1] == "False"
    with claimed(tmp_path, ["b"]) as ours:
        assert not ours
    with claimed(tmp_path, ["c", "d"]) as ours:
        assert ours, "a claim of which a part failed claims nothing"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_claim_ends_with_its_process(tmp_path, hold, end):
    process, _ = hold("a")
    os.kill(process.pid, end)
    process.wait(HANGS)
    with claimed(tmp_path, ["a"]) as ours:
        assert ours


def test_a_claim_ends_with_its_block_and_leaves_an_empty_file(tmp_path, hold):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path, ["a"]):
        1 / 0  # noqa: B018
    assert hold("a")[1] == "True"
    assert (tmp_path / FILE).read_bytes() == b""


def test_no_clock_is_asked(tmp_path, hold):
    """A file from the future or the past, as machines with wrong clocks write it, keeps and loses no claim."""
    for when in (0, 2**33):
        (tmp_path / FILE).touch()
        os.utime(tmp_path / FILE, (when, when))
        with claimed(tmp_path, ["a"]) as ours:
            assert ours
    assert hold("a")[1] == "True"
    os.utime(tmp_path / FILE, (0, 0))
    with claimed(tmp_path, ["a"]) as ours:
        assert not ours


def test_a_file_system_without_locks_is_told_of_once_and_claims_nothing(tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(claims, "_WITHOUT", set())
    for _ in range(2):
        with claimed(tmp_path, ["a", "b"]) as ours:
            assert ours
    assert len(caplog.records) == 1 and "may do the same work twice, which changes no result" in caplog.text


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError), claimed(Path(tmp_path / "none"), ["a"]):
        pass
