"""``kne lab``: a page in the browser on which facts are edited, asked and switched on and off."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
from pathlib import Path
from typing import Any

from kne_easyedit._util.messages import printable
from kne_easyedit.cli.common import add_settings_of_model, load_settings, require_folder


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser(
        "lab", help="a page in the browser: edit facts, ask before and after, switch edits on and off"
    )
    add_settings_of_model(parser)
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="the store of the edits (default: one that is gone at the end)"
    )
    parser.add_argument("--port", type=_port, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine alone)"
    )
    parser.set_defaults(command=_lab, interrupted="the page is closed; what is in its store stays")


def _lab(arguments: argparse.Namespace) -> int:
    from kne_easyedit.edits.store import EditStore
    from kne_easyedit.lab.guard import bare, is_loopback
    from kne_easyedit.lab.page import require_gradio
    from kne_easyedit.lab.server import serve
    from kne_easyedit.lab.session import LabSession
    from kne_easyedit.models.loading import load_model

    require_gradio()  # before the model is loaded
    hparams = load_settings(arguments)
    with contextlib.ExitStack() as stack:
        if arguments.store is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kne-lab-"))) / "store"
            kept = "a temporary store: its edits are gone when the page ends; --store DIR keeps them"
        else:
            require_folder(arguments.store, "--store")
            folder, kept = arguments.store, f"store {arguments.store}"
        store = EditStore(folder)
        model, tokenizer = load_model(hparams)
        session = LabSession(model, tokenizer, hparams, store)
        stack.callback(session.close)
        if not is_loopback(bare(arguments.host)):
            print(
                f"warning: --host {arguments.host}: whoever reaches this machine can edit, ask and switch; there is no "
                f"password"
            )
        server = serve(session, printable(f"{hparams.model_name}; {kept}"), arguments.host, arguments.port)
        stack.callback(server.close)
        print(f"{printable(hparams.model_name)}, {kept}\nOpen {server.url} (Ctrl-C ends it)", flush=True)
        _wait()
    return 0


def _wait() -> None:
    """Until Ctrl-C: the page is served by other threads."""
    threading.Event().wait()


def _port(text: str) -> int:
    """The type of ``--port``."""
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} must be in 1 ... 65535")
    return value
