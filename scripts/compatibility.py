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
from pathlib import Path

from compatibility_cells import METHODS, SENTINEL
from compatibility_page import text_of


def in_process(home: str, off: str, methods: list[str], keep: Path, smollm2: str | None = None) -> dict:
    """The cells of one EasyEdit, with some patches switched off, in a process of its own; kept in ``keep``."""
    kept = kept_file(keep, home, off, methods, smollm2 is not None)
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    found = _in_process(home, off, methods, smollm2)
    if "failed" not in found:  # a process that was killed must be run again
        keep.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def kept_file(keep: Path, home: str, off: str, methods: list[str], smollm2: bool) -> Path:
    """The file of the cells of one process."""
    return keep / f"{Path(home).name}-{off or 'all-patches'}{'-smollm2' if smollm2 else ''}-{'-'.join(methods)}.json"


def _in_process(home: str, off: str, methods: list[str], smollm2: str | None) -> dict:
    environment = {k: v for k, v in os.environ.items() if k not in ("EASYEDIT_HOME", "KNE_PATCHES_OFF")}
    environment |= {
        "KNE_PATCHES_OFF": off,
        **({} if home == "pypi" else {"EASYEDIT_HOME": str(Path(home).expanduser().resolve())}),
    }
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


def main() -> None:
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
    arguments = parser.parse_args()
    found = {}
    dates = dict(zip([home for home in arguments.easyedit if home != "pypi"], arguments.dates))
    for home in arguments.easyedit:
        found[home] = {**version(home, arguments.methods, arguments.keep), "date": dates.get(home, "")}
    real = {}
    for home in arguments.easyedit if arguments.smollm2 else ():
        whole = kept_file(arguments.keep, home, "", list(METHODS), True).is_file()  # done with all methods before
        real[home] = in_process(
            home, "", list(METHODS) if whole else arguments.smollm2_methods, arguments.keep, arguments.smollm2
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text_of(found, real, arguments.smollm2), encoding="utf-8")
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
