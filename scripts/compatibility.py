"""Which method works in which mode of which EasyEdit, and thanks to which patches: docs/compatibility.md.

    python scripts/compatibility.py --easyedit pypi ~/EasyEdit ~/EasyEdit-2024 --out docs/compatibility.md
    python scripts/compatibility.py --easyedit pypi ~/EasyEdit --smollm2 test_cf.json --out docs/compatibility.md

A cell is one method in one of EasyEdit's own modes on a tiny random model: it works if nothing fails and the model is
bit for bit what it was afterwards (in sequential mode: if the edits have stayed). A patch is needed if the cell works
with all patches and fails with all but this one. Every version runs in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping, Sequence
from functools import cache
from pathlib import Path
from unittest import mock

from compatibility_cells import METHODS, SENTINEL
from compatibility_page import text_of, versions_of

from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import atomic_write
from kne_easyedit.benchmark.hydra_workers import surroundings


def in_process(home: str, off: str, methods: list[str], keep: Path, smollm2: str | None = None) -> dict:
    """The cells of one EasyEdit, with some patches switched off, in a process of its own; kept in ``keep``."""
    kept = kept_file(keep, home, off, methods, smollm2)
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    found = _in_process(home, off, methods, smollm2)
    if "failed" not in found:  # a process that was killed must be run again
        atomic_write(kept, json.dumps(found))
    return found


def kept_file(keep: Path, home: str, off: str, methods: list[str], smollm2: str | None = None) -> Path:
    """The file of the cells of one process; its name changes with all that they depend on (`measured_with`)."""
    name = home if home == "pypi" else Path(folder_of(home)).name
    real = "" if smollm2 is None else "-smollm2"
    what = digest(measured_with(home, smollm2))[:16]
    return keep / f"{name}-{off or 'all-patches'}{real}-{'-'.join(methods)}-{what}.json"


@cache
def measured_with(home: str, smollm2: str | None) -> dict[str, str]:
    """What the cells of an EasyEdit depend on: which one it is, versions, the package's sources, and the data."""
    cells = Path(__file__).resolve().with_name("compatibility_cells.py")
    with mock.patch.dict(os.environ):
        _set_home(os.environ, home)
        found = surroundings([] if smollm2 is None else [str(Path(smollm2).resolve())])
    return {**found, "folder": folder_of(home), "cells": digest(cells.read_text(encoding="utf-8"))}


def folder_of(home: str) -> str:
    """The absolute path of a checkout; ``pypi`` stays what it is."""
    return home if home == "pypi" else str(Path(home).expanduser().resolve())


def _set_home(environment: MutableMapping[str, str], home: str) -> None:
    for name in ("EASYEDIT_HOME", "KNE_PATCHES_OFF"):
        environment.pop(name, None)
    if home != "pypi":
        environment["EASYEDIT_HOME"] = folder_of(home)


def _in_process(home: str, off: str, methods: list[str], smollm2: str | None) -> dict:
    environment = dict(os.environ)
    _set_home(environment, home)
    environment["KNE_PATCHES_OFF"] = off
    command = [
        sys.executable,
        str(Path(__file__).resolve().with_name("compatibility_cells.py")),
        *methods,
        *(["--smollm2", str(Path(smollm2).resolve())] if smollm2 else []),
    ]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(command, check=False, env=environment, cwd=folder, capture_output=True, text=True)
    lines = [line.removeprefix(SENTINEL) for line in result.stdout.splitlines() if line.startswith(SENTINEL)]
    if result.returncode or not lines:
        if off in ("", "all") and not smollm2:
            raise RuntimeError(f"{home}: {result.stderr[-2000:]}")
        return {"failed": (result.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(lines[-1])


def version(home: str, methods: list[str], keep: Path) -> dict:
    """All cells of one EasyEdit: with every patch, with none, and with all but one."""
    from tqdm import tqdm

    whole = in_process(home, "", methods, keep)
    found = {(c["method"], c["mode"]): {**c, "needs": []} for c in whole["cells"]}
    for patch in tqdm(
        [p for p, state in whole["patches"].items() if state == "applied"], desc=f"{home}: one patch less", unit="patch"
    ):
        less = in_process(home, patch, methods, keep)
        failing = {(c["method"], c["mode"]) for c in less["cells"] if c["error"]} if "cells" in less else set(found)
        for key, cell in found.items():
            if key in failing and not cell["error"] and not cell["cannot"]:
                cell["needs"].append(patch)
    return {
        "easyedit": whole["easyedit"],
        "patches": whole["patches"],
        "faults": whole["faults"],
        "cells": list(found.values()),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Finds all cells of all versions, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--easyedit", nargs="+", required=True, metavar="FOLDER", help="checkouts, and 'pypi' for the installed release"
    )
    parser.add_argument("--dates", nargs="*", default=[], help="a date for each checkout, for the headings")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--smollm2",
        metavar="DATA",
        help="KnowEdit file: also edit 3 of its records of SmolLM2 (half an hour a version)",
    )
    parser.add_argument(
        "--smollm2-methods",
        nargs="+",
        default=list(METHODS),
        choices=METHODS,
        help="only these on SmolLM2 (default: all)",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("outputs/compatibility"),
        help="folder of what is done: an interrupted run goes on from there",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/compatibility.md"))
    arguments = parser.parse_args(given)
    there = versions_of(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else []
    if len(set(map(folder_of, arguments.easyedit))) < len(there):
        parser.error(
            f"--easyedit: {arguments.out} has {len(there)} versions, which would be lost: {'; '.join(there)}; name "
            "them all, or another page by --out"
        )
    found = {}
    dates = dict(zip([home for home in arguments.easyedit if home != "pypi"], arguments.dates))
    for home in arguments.easyedit:
        found[home] = {**version(home, arguments.methods, arguments.keep), "date": dates.get(home, "")}
    real = {}
    for home in arguments.easyedit if arguments.smollm2 else ():
        # Done with all methods before?
        whole = kept_file(arguments.keep, home, "", list(METHODS), arguments.smollm2).is_file()
        real[home] = in_process(
            home, "", list(METHODS) if whole else arguments.smollm2_methods, arguments.keep, arguments.smollm2
        )
    atomic_write(arguments.out, text_of(found, real, arguments.smollm2))
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
