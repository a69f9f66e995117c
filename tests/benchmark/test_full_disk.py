"""A shared disk that is full: the file is named, what was complete stays, and the run goes on when there is space."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path

import pytest

from kne_easyedit._util.files import atomic_write
from kne_easyedit.benchmark.store import Lines, read_lines

SIZE = 2**18
"""Bytes of the disk."""


@pytest.fixture(name="disk")
def disk_fixture(tmp_path):
    """A file system of its own, which few users may mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("A FULL DISK WAS NOT TRIED: there is no `mount`")
    if mounted.returncode:
        pytest.skip(f"A FULL DISK WAS NOT TRIED: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves not one byte."""
    path = folder / "of somebody else"
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)
    return path


def line(index: int, size: int = 100) -> dict:
    return {"method": "KNE", "index": index, "fingerprint": "f", "text": "x" * size}


@pytest.mark.parametrize("size", [100, 20_000], ids=["a short line", "a line of several pages"])
def test_a_line_that_does_not_fit_is_not_there_and_those_before_it_are(disk, size):
    lines = Lines(disk / "results.jsonl", keep=lambda line: True)
    lines.append(line(0))
    before = lines.path.read_bytes()
    other = fill(disk)
    if size > 4096:  # a few pages are free: a part of the line is written first
        with other.open("rb+") as stream:
            stream.truncate(other.stat().st_size - 3 * 4096)
    with pytest.raises(OSError) as caught:
        for index in range(1, 100):  # short lines fit into the page that the file has
            lines.append(line(index, size))
    assert caught.value.errno == errno.ENOSPC and str(lines.path) in str(caught.value)
    content = lines.path.read_bytes()
    assert content.startswith(before) and content.endswith(b"\n")
    assert [found["index"] for _, found in read_lines(lines.path)] == [found["index"] for found in lines.lines]
    other.unlink()
    again = Lines(lines.path, keep=lambda line: True)
    again.append(line(200, size))
    assert [json.loads(text)["index"] for text in lines.path.read_text().splitlines()][-1] == 200
    assert not list(disk.glob("*unreadable*"))


def test_a_file_that_does_not_fit_leaves_the_old_one_and_nothing_else(disk):
    path = disk / "summary.json"
    atomic_write(path, "old")
    other = fill(disk)
    with pytest.raises(OSError, match=str(path)) as caught:
        atomic_write(path, "new" * 10_000)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and sorted(disk.iterdir()) == [other, path]
