"""``kne data``: the KnowEdit records from their publisher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kne_easyedit.cli.common import require_folder


def add_commands(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser("data", help="fetch: the KnowEdit records from their publisher into a local folder")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="download what is not there yet, and check every file's digest")
    fetch.add_argument(
        "--out", type=Path, default=Path("data/KnowEdit"), help="folder of the records (default %(default)s)"
    )
    fetch.set_defaults(command=_fetch)


def _fetch(arguments: argparse.Namespace) -> int:
    from kne_easyedit.facts.download import fetch

    require_folder(arguments.out)
    for name, digest, state in fetch(arguments.out):
        print(f"{state:<10} {digest[:16]}  {name}")
    print(
        f"\nThe records lie in {arguments.out}; "
        f"tell the benchmark by KNOWEDIT={arguments.out} or knowedit={arguments.out}"
    )
    return 0
