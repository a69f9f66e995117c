"""``kne demo``: localise on packaged facts, edit others with KNE and FT, and compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kne_easyedit.cli.common import positive, require_folder
from kne_easyedit.cli.comparison import add_workers, execute, load_all
from kne_easyedit.facts.records import load_records

RECORDS = 8
NEIGHBOURS = 4
"""Of each fact; the demo should stay short."""
SHOWN = "The capital of Germany is"
"""The fact whose neighbours' answers are shown."""


def add_commands(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    demo = commands.add_parser("demo", help="localise on packaged facts, edit others with KNE and FT, show the table")
    demo.add_argument("--records", type=positive, default=RECORDS, help="facts to edit (default %(default)s)")
    add_workers(demo)
    demo.add_argument(
        "--out", type=Path, default=Path("outputs/demo"), help="folder of the results (default %(default)s)"
    )
    demo.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    require_folder(arguments.out)
    hparams, _ = load_all(["KNE", "FT"], [])
    requests, _ = load_records("embedded", arguments.records, hparams["KNE"].localization_size)
    return execute(
        hparams,
        requests,
        "embedded",
        arguments.out,
        again=True,
        workers=arguments.workers,
        show=arguments.records,
        neighbours=NEIGHBOURS,
        neighbours_of=SHOWN,
    )
