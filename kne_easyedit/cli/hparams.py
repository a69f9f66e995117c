"""``kne hparams``: a settings file for a model that none is shipped for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kne_easyedit.cli.common import pattern_of_settings, require_file, shipped_for


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser(
        "hparams", help="write a commented settings file for any model: its modules are found by structure"
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a model, or hub name in the cache")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the YAML file (default: printed)")
    parser.set_defaults(command=_hparams)


def _hparams(arguments: argparse.Namespace) -> int:
    from kne_easyedit._util.files import atomic_write
    from kne_easyedit.doctor.settings_file import settings_for

    out: Path | None = arguments.out
    if out is not None:
        if out.exists():
            raise ValueError(f"--out: {out} exists; remove it, or choose another name")
        require_file(out)
    text = settings_for(arguments.model, pattern_of_settings())
    if own := shipped_for(arguments.model):
        print(f"kne: {own} is shipped for this model, with settings that were tried", file=sys.stderr)
    if out is None:
        print(text, end="")
        return 0
    atomic_write(out, text)
    print(f"Written to {out}; check it by: kne doctor --hparams {out}")
    return 0
