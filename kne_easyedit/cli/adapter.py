"""``kne adapter``: edits as one LoRA adapter, for whatever serves them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kne_easyedit.cli.common import positive, require_folder
from kne_easyedit.cli.edited import add_base, is_store, load_base, load_edit, open_edits, open_store


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser(
        "adapter", help="write an edit, or a store's active edits, as a LoRA adapter that PEFT and servers load"
    )
    parser.add_argument("edit", type=Path, metavar="DIR", help="an edit's folder, or a store's: its active edits")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the adapter; it must be new")
    parser.add_argument(
        "--form",
        choices=("portable", "exact"),
        default="portable",
        help="portable: one rank, read alike by PEFT, vLLM, SGLang and llama.cpp; exact: smaller, for PEFT "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--max-rank",
        type=positive,
        metavar="R",
        help="reduce to this rank; the base is loaded and the answers are asked again",
    )
    parser.add_argument("--base-name", help="the base's hub name in the adapter (default: as the edit names it)")
    parser.add_argument("--no-check", action="store_true", help="with --max-rank: do not load the base")
    add_base(parser)
    parser.set_defaults(command=_adapter)


def _adapter(arguments: argparse.Namespace) -> int:
    from kne_easyedit.edits.adapters import save_adapter

    if arguments.out.exists():
        raise ValueError(f"--out: {arguments.out} exists; name a folder that is to be made")
    require_folder(arguments.out)
    model = None
    if is_store(arguments.edit):
        edits = list(open_store(arguments.edit).active().edits)
        if not edits:
            raise ValueError(
                f"store: no edit of {arguments.edit} is on; switch one on: kne edits on {arguments.edit} ID"
            )
    else:
        edits = [load_edit(arguments.edit)]
    if arguments.max_rank is not None and not arguments.no_check:
        model, _ = load_base(open_edits(arguments.edit), arguments)
    found = save_adapter(
        edits,
        arguments.out,
        form=arguments.form,
        max_rank=arguments.max_rank,
        base_name=arguments.base_name,
        model=model,
    )
    lost = f", {found.error:.2%} of the change left out" if found.error else ""
    print(f"{found.form} adapter of rank {found.rank}, {len(found.ranks)} modules, {found.bytes / 1e6:.1f} MB{lost}")
    for note in found.notes:
        print(f"  {note}")
    for answer in found.answers:
        print(f"  {answer.prompt}  ->  {answer.target}   P {answer.probability:.2%} -> {answer.reduced:.2%}")
    print(f"Written to {arguments.out}")
    return 0
