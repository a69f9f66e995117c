"""``kne adapter``: edits as one LoRA adapter, for whatever serves them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kne_easyedit._util.messages import printable
from kne_easyedit.cli.common import BEGINS_AGAIN, positive, require_new
from kne_easyedit.cli.edited import add_base, load_active, load_base, open_edits


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser(
        "adapter", help="write an edit, or a store's active edits, as a LoRA adapter that PEFT and servers load"
    )
    parser.add_argument("edit", type=Path, metavar="DIR", help="an edit's folder, or a store's: its active edits")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the adapter: new, or empty")
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
    parser.set_defaults(command=_adapter, interrupted=BEGINS_AGAIN)


def _adapter(arguments: argparse.Namespace) -> int:
    from kne_easyedit.edits.adapters import save_adapter

    require_new(arguments.out)
    checked = arguments.max_rank is not None and not arguments.no_check
    given = {"--model": arguments.model, "--set": arguments.set, "--force": arguments.force}
    if unused := [name for name, value in given.items() if value and not checked]:
        raise ValueError(
            f"{unused[0]}: says how the base is loaded, which is only done to check a reduction: give --max-rank"
            f"{' without --no-check' if arguments.no_check else ''}, or leave {' and '.join(unused)} out"
        )
    model = None
    edits = load_active(arguments.edit)
    if checked:
        model, _ = load_base(open_edits(arguments.edit), arguments)
    found = save_adapter(
        edits,
        arguments.out,
        form=arguments.form,
        max_rank=arguments.max_rank,
        base_name=arguments.base_name,
        model=model,
        force=arguments.force,
    )
    lost = f", {found.error:.2%} of the change left out" if found.error else ""
    print(f"{found.form} adapter of rank {found.rank}, {len(found.ranks)} modules, {found.bytes / 1e6:.1f} MB{lost}")
    for note in found.notes:
        print(f"  {printable(note)}")
    for answer in found.answers:
        shown = f"{printable(answer.prompt)}  ->  {printable(answer.target)}"
        print(f"  {shown}   P {answer.probability:.2%} -> {answer.reduced:.2%}")
    print(f"Written to {arguments.out}")
    return 0
