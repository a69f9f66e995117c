"""Where a report's lines come from: the folders of runs, and the records of other reports. Manifests are read here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kne_easyedit._util.files import parse_json
from kne_easyedit.benchmark.checks import require
from kne_easyedit.benchmark.manifest import check_manifest

RECORDS, MANIFESTS = "records.jsonl", "manifests.json"
"""Of a report: its lines without the texts of the data (`records.record_lines`), and the manifests of its runs."""
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^/\n]+/)+([^/\n]+)")


@dataclass(frozen=True)
class Source:
    """A file of result lines and what is known of the runs that wrote it."""

    file: Path
    manifests: tuple[dict, ...]
    """Without the folders of paths, which mean nothing on another machine. Empty if none stands beside the lines."""
    of_report: bool
    """Whether the lines are a report's: labels and names of data sets are as it has them."""


def sources(paths: Iterable[Path], plain: Callable[[Any], Any]) -> list[Source]:
    """The files of result lines among the paths, each once.

    Args:
        paths: Files; folders, which are searched for ``results.jsonl``; where there is none, folders of reports.
        plain: Makes the texts within a manifest harmless (`report_line.Texts.within`).

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: For a folder without results, or a manifest that is not what it should be.
    """
    files = dict.fromkeys(file for path in paths for file in results_of(path))
    return [_source(file, plain) for file in files]


def results_of(path: Path) -> list[Path]:
    """The files of result lines that a path names; for errors see `sources`."""
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"results {path}: no such file or folder")
        return [path]
    # A report in a folder of runs is made of their lines: it counts only where there are none.
    found = sorted(path.rglob("results.jsonl")) or [its for its in (path / RECORDS,) if its.is_file()]
    if not found:
        raise ValueError(
            f"results {path}: there are none: no results.jsonl of a run in it or below, and no {RECORDS} of a report "
            f"in it (reports of earlier versions have none: make them again of their runs)"
        )
    return found


def _source(file: Path, plain: Callable[[Any], Any]) -> Source:
    of_report = file.name == RECORDS
    beside = file.with_name(MANIFESTS if of_report else "manifest.json")
    manifests = tuple(_manifests(beside, of_report)) if beside.is_file() else ()
    return Source(file, tuple(map(plain, manifests)), of_report)


def _manifests(file: Path, several: bool) -> Iterator[dict]:
    """The manifest in a file, or the list of them."""
    try:
        found = parse_json(file.read_bytes())
        require(not several or isinstance(found, list), "manifests", found, "a list")
        for manifest in found if several else [found]:
            check_manifest(manifest)
            yield _without_folders(manifest)
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "is nested too deeply"
        writer = "`kne report` writes" if several else "`kne run` writes"
        raise ValueError(f"{file}: {reason}; expected what {writer} (without the file the report says less)") from error


def _without_folders(value: Any) -> Any:
    """Absolute paths, alone or at the end of a text, as the names of their files."""
    if isinstance(value, dict):
        return {name: _without_folders(its) for name, its in value.items()}
    if isinstance(value, list):
        return [_without_folders(its) for its in value]
    return _FOLDERS.sub(r"\1", value) if isinstance(value, str) else value
