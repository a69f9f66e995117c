"""Entries of one score cache taken into another: each machine of a cluster may have filled one of its own."""

from __future__ import annotations

import contextlib
from pathlib import Path

from kne_easyedit._util.files import atomic_write
from kne_easyedit.attribution.score_cache import (
    DamagedEntry,
    Entry,
    entry_metadata,
    read_entry,
    scores_folder,
    write_entry,
)

COPIED, COMPLETED, KNOWN = "copied", "completed", "known"


def merge_entry(source: Path, folder: str | Path | None = None) -> str:
    """Takes one entry into another cache; layers that are there already stay as they are.

    Args:
        source: A file of a cache (`entry_files`).
        folder: The other cache; None: the user's.

    Returns:
        ``copied``, ``completed`` (layers were added to an entry) or ``known`` (all its layers were there).

    Raises:
        DamagedEntry: The content of ``source`` is wrong.
        OSError: A file cannot be read or written.
    """
    entry = read_entry(source)
    path = scores_folder(folder) / source.parent.name / source.name
    there: Entry | None = None
    # A damaged one counts as missing, as everywhere.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, DamagedEntry):
        there = read_entry(path)
    if there is None:
        atomic_write(path, source.read_bytes())
        return COPIED
    if set(entry.layers) <= set(there.layers):
        return KNOWN
    by_layer = dict(zip(entry.layers, entry.scores)) | dict(zip(there.layers, there.scores))
    write_entry(path, by_layer, {**entry_metadata(source), "seconds": f"{entry.seconds + there.seconds:.4f}"})
    return COMPLETED
