"""``kne easyedit-run``: EasyEdit's example scripts as they are, with KNE or any other method."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kne_easyedit.cli.common import positive, require_folder

if TYPE_CHECKING:
    from kne_easyedit.editing.kne_edit import KNEEdit


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser(
        "easyedit-run",
        help="run an example script of EasyEdit, unchanged, with any method",
        usage="kne easyedit-run [-h] [--skip-bad] [--keep-edits STORE] [--stats-text FILE] [--stats-samples N] SCRIPT "
        "...",
        allow_abbrev=False,  # an option of the script must not be read as an abbreviation of an own one
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out records of a KnowEditDataset whose subject is not in their prompt",
    )
    parser.add_argument(
        "--keep-edits",
        type=Path,
        metavar="STORE",
        help="store every edit that the script makes with KNE, in a new store (kne edits list STORE); those are on "
        "that the model has after the last one",
    )
    parser.add_argument(
        "--stats-text",
        type=Path,
        metavar="FILE",
        help="text for MEMIT's second moments, one text per line (default: sampled)",
    )
    parser.add_argument("--stats-samples", type=positive, metavar="N", help="number of texts to sample for them")
    parser.add_argument("script", metavar="SCRIPT", type=Path, help="e.g. EasyEdit/examples/run_knowedit_llama2.py")
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="all that follows is the script's: --editing_method KNE --hparams_dir FILE ...",
    )
    parser.set_defaults(command=_easyedit_run)


def _easyedit_run(arguments: argparse.Namespace) -> int:
    from kne_easyedit.bridge import TextSource
    from kne_easyedit.bridge.scripts import run_script

    given = {"file": arguments.stats_text, "samples": arguments.stats_samples}
    text_source = TextSource(**{name: value for name, value in given.items() if value is not None})
    keep = None if arguments.keep_edits is None else _keeper(arguments.keep_edits)
    try:
        return run_script(
            arguments.script,
            arguments.arguments,
            skip_bad=arguments.skip_bad,
            text_source=text_source,
            on_trained=keep,
        )
    except KeyboardInterrupt:
        print("kne: interrupted; EasyEdit's scripts begin again from the start", file=sys.stderr)
        return 130


def _keeper(folder: Path) -> Callable[[KNEEdit], None]:
    """What stores an edit, and switches those off that the model does not have any more: the script took them back.

    Raises:
        ValueError: The folder is something else than a store, or the store has edits: which of them are on is for the
            user to say, and the script's model has none of them.
    """
    from kne_easyedit.edits.store import EditStore

    require_folder(folder, "--keep-edits")
    store = EditStore(folder)
    if entries := store.list():
        raise ValueError(
            f"--keep-edits: {folder} has {len(entries)} edits already, which the script's model has not; name a new "
            f"store (kne edits add {folder} DIR brings edits of it here afterwards)"
        )
    added: dict[str, str] = {}

    def keep(edit: KNEEdit) -> None:
        added[edit.digest] = store.add(edit)
        has = {edit.digest, *edit.trained_on}
        others = {entry.id for entry in store.list() if entry.on} - {*added.values()}  # of other processes
        store.set_active(others | {name for digest, name in added.items() if digest in has})

    return keep
