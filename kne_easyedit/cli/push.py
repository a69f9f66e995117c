"""``kne push``: an edit or an adapter put on a model hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kne_easyedit._util.messages import printable
from kne_easyedit.cli.common import BEGINS_AGAIN


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser(
        "push", help="put an edit or an adapter on the Hugging Face hub (HF_ENDPOINT, HF_TOKEN)"
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="of `kne edit` or `kne adapter`")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME; made if there is none")
    parser.add_argument("--public", action="store_true", help="a new repository is public (default: private)")
    parser.add_argument("--yes", action="store_true", help="send files that name paths of this machine, too")
    parser.set_defaults(command=_push, interrupted=BEGINS_AGAIN)


def _push(arguments: argparse.Namespace) -> int:
    from kne_easyedit.cli.edited import is_store
    from kne_easyedit.edits.hub import files_to_push, paths_named, push, require_repo

    folder: Path = arguments.folder
    if is_store(folder):
        raise ValueError(f"store: {folder} has many edits; name one of them, {folder}/edits/ID (kne edits list)")
    files = files_to_push(folder)
    require_repo(arguments.repo)
    if (paths := paths_named(folder)) and not arguments.yes:
        raise ValueError(
            f"push: the files name {', '.join(map(printable, paths))}: paths of this machine, for all to read. Nothing "
            f"was sent. Give --yes to send them all the same, or make them anew with the hub's name of the base (kne "
            f"edit --model OWNER/NAME, kne adapter --base-name OWNER/NAME)"
        )
    address = push(files, arguments.repo, private=not arguments.public)
    print(f"{', '.join(files)}: {address}")
    return 0
