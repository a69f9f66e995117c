"""The command ``kne``: one file per command, and `common` for what they share.

Arguments and printed lines belong here; the work is done by the subpackages below.
"""

from __future__ import annotations

import argparse
import logging
import sys

from kne_easyedit._util.errors import RunStopped, lacks_memory
from kne_easyedit._util.machine import keep_large_blocks
from kne_easyedit._util.messages import is_utf8, without_effects
from kne_easyedit.cli import (
    adapter,
    ask,
    cache,
    data,
    demo,
    doctor,
    easyedit_run,
    edit,
    edits,
    explain,
    hparams,
    lab,
    localize,
    merge,
    push,
    report,
    run,
    show,
    study,
    summarize,
)

_LESS_MEMORY = (
    "a lower chunk_rows bounds attribution, bf16=true halves the weights (--set), --workers 1 takes one process; "
    "kne doctor estimates the need"
)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 bad input, 130 interrupted."""
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    prompts = getattr(arguments, "prompts", None)
    if more and (prompts is None or any(given.startswith("-") for given in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # argparse ends such a list at the first option
        arguments.prompts += more
    for given in sys.argv[1:] if argv is None else argv:
        if not is_utf8(given) or "\x00" in given:  # no file of results could hold it
            parser.error(f"{given.encode('utf-8', 'backslashreplace').decode()!r} is no UTF-8 text")
    keep_large_blocks()
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, handlers=[handler])
    try:
        return arguments.command(arguments)
    except (ValueError, OSError, ImportError, FloatingPointError, NotImplementedError, RunStopped) as error:
        if arguments.verbose:
            raise
        said = str(error) or f"{type(error).__name__} without a message (the option --verbose shows where)"
        print(f"kne: {without_effects(said)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if arguments.verbose or not lacks_memory(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"kne: out of memory: {without_effects(said)}; {_LESS_MEMORY}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        what = getattr(arguments, "interrupted", "the same command resumes")
        print(f"kne: interrupted; {what}", file=sys.stderr)
        return 130


class _Plain(logging.Formatter):
    """Messages may quote files of others."""

    def format(self, record: logging.LogRecord) -> str:
        return without_effects(super().format(record))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kne", description="KNE (Knowledge Neuronal Ensemble) model editing on EasyEdit."
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="more messages, full tracebacks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (
        demo,
        edit,
        edits,
        ask,
        show,
        lab,
        adapter,
        merge,
        push,
        hparams,
        run,
        doctor,
        easyedit_run,
        summarize,
        report,
        study,
        localize,
        explain,
        cache,
        data,
    ):
        module.add_commands(commands)
    return parser
