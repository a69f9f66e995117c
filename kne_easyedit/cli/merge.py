"""``kne merge``: edits merged into a copy of a model's files, which anything loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kne_easyedit._util.messages import printable
from kne_easyedit.cli.common import BEGINS_AGAIN, require_new
from kne_easyedit.cli.edited import load_active


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser(
        "merge", help="write a full model with an edit, or a store's active edits, merged; the base is not loaded"
    )
    parser.add_argument("edit", type=Path, metavar="DIR", help="an edit's folder, or a store's: its active edits")
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="the base's files (safetensors); they stay")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the model: new, or empty")
    parser.add_argument("--force", action="store_true", help="merge into another base, too, with a warning")
    parser.set_defaults(command=_merge, interrupted=BEGINS_AGAIN)


def _merge(arguments: argparse.Namespace) -> int:
    from kne_easyedit.editing.lacking import lacking_note
    from kne_easyedit.edits.stack import EditStack

    require_new(arguments.out)
    edits = load_active(arguments.edit)
    if note := lacking_note(edits):
        print(printable(note))
    EditStack(tuple(edits)).merge_into(arguments.model, arguments.out, force=arguments.force)
    print(f"{len(edits)} {'edit' if len(edits) == 1 else 'edits'} merged into the weights of {arguments.model}")
    for edit in edits[:10]:
        print(f"  {printable('; '.join(edit.facts[:2]))}")
    print(f"Written to {arguments.out}")
    return 0
