"""``kne explain``: the neurons of single facts, and which facts share them."""

from __future__ import annotations

import argparse
from pathlib import Path

from kne_easyedit._util.settings import replace_settings
from kne_easyedit.cli.common import add_settings, load_settings, positive, require_folder

SIZE = 20
"""Facts of ``--data`` by default."""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds ``explain`` to the commands of ``kne``."""
    parser = commands.add_parser("explain", help="layers and neurons of single facts, and which facts share them")
    add_settings(parser)
    parser.add_argument("--prompt", help="a fact of your own, compared with those of --data")
    parser.add_argument("--target", help="its answer")
    parser.add_argument("--data", help="data file or 'embedded' (default: localization_data, unless --prompt is given)")
    parser.add_argument("--size", type=positive, default=SIZE, help="number of facts of --data (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/explain"), help="folder of the results (default %(default)s)"
    )
    parser.set_defaults(command=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    from kne_easyedit.localization.data import localization_requests
    from kne_easyedit.localization.explain import explain
    from kne_easyedit.localization.output import print_explanation, save_explanation
    from kne_easyedit.models.loading import load_model

    require_folder(arguments.out)
    hparams = load_settings(arguments)
    if (arguments.prompt is None) != (arguments.target is None):
        raise ValueError("--prompt and --target belong together: a fact has both")
    requests = [] if arguments.prompt is None else [{"prompt": arguments.prompt, "target_new": arguments.target}]
    data = arguments.data or (None if requests else hparams.localization_data)
    if data is None and not requests:
        raise ValueError("localization_data: none; name a KnowEdit file (--data), or a fact (--prompt and --target)")
    if data is not None:
        hparams = replace_settings(hparams, localization_data=data, localization_size=arguments.size)
        requests += localization_requests(hparams)
    model, tokenizer = load_model(hparams)
    found = explain(model, tokenizer, requests, hparams)
    save_explanation(found, arguments.out, hparams)
    print_explanation(found)
    print(f"\nWritten to {arguments.out}: explanation.json, explanation.png")
    return 0
