"""``kne ask``: a model's answers before and after an edit, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kne_easyedit._util.messages import printable
from kne_easyedit.cli.common import positive
from kne_easyedit.cli.edited import add_base, load_base, open_edits
from kne_easyedit.cli.side_by_side import print_rows


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser(
        "ask", help="answers before and after an edit, side by side; without a prompt: interactive"
    )
    parser.add_argument("edit", type=Path, metavar="DIR", help="an edit's folder, or a store's: its active edits")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to ask (default: asks for prompts)")
    parser.add_argument("--chat", action="store_true", help="put prompts into the model's chat template")
    parser.add_argument("--tokens", type=positive, default=32, help="length of an answer at most (default %(default)s)")
    add_base(parser)
    parser.set_defaults(command=_ask, interrupted="nothing was changed")


def _ask(arguments: argparse.Namespace) -> int:
    from kne_easyedit.benchmark.answers import in_full
    from kne_easyedit.benchmark.before_after import without_and_with_edits
    from kne_easyedit.edits.beside import rows_beside

    edits = open_edits(arguments.edit)
    model, tokenizer = load_base(edits, arguments)
    if edits.note:
        print(printable(edits.note))

    beside = rows_beside(model, edits.active, force=arguments.force)

    def ask(prompts: Sequence[str]) -> None:
        found = without_and_with_edits(model, tokenizer, prompts, arguments.tokens, chat=arguments.chat, beside=beside)
        for prompt, (was, now) in zip(prompts, found):
            print(f"\n{printable(prompt)}")
            print_rows([("", "before", "after"), ("", in_full(was), in_full(now))])

    # Applied once: the base is compared with the edit's, matrix by matrix.
    with edits.applied(model, force=arguments.force) if beside is None else nullcontext():
        if arguments.prompts:
            ask(arguments.prompts)
        else:
            _converse(ask, edits.facts)
    return 0


def _converse(ask: Any, facts: Sequence[str]) -> None:
    """Reads prompts until the input ends. A prompt that cannot be asked is no end."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(
            "\n".join(
                ["The edit:", *(f"  {printable(fact)}" for fact in facts[:5]), "Ask; an empty line or Ctrl-D ends."]
            )
        )
    while True:
        try:
            prompt = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not prompt.strip():
            if terminal:
                return
            continue
        try:
            ask([prompt])
        except ValueError as error:
            print(f"kne: {error}", file=sys.stderr)
