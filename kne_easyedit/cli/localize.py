"""``kne localize``: scores, ensemble, stability and a picture for a set of facts."""

from __future__ import annotations

import argparse
from pathlib import Path

from kne_easyedit._util.settings import replace_settings
from kne_easyedit._util.shards import WHOLE, shard_of
from kne_easyedit.cli.common import add_settings, load_settings, positive, require_folder
from kne_easyedit.hparams import KNEHyperParams


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds ``localize`` to the commands of ``kne``."""
    parser = commands.add_parser(
        "localize", help="which neurons matter for a set of facts: scores, ensemble, stability, picture"
    )
    add_settings(parser)
    parser.add_argument("--data", help="data file, or 'embedded'; overrides localization_data")
    parser.add_argument("--size", type=positive, help="number of facts; overrides localization_size")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/localize"), help="folder of the results (default %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=positive,
        default=1,
        help="processes of this machine that attribute side by side (default %(default)s)",
    )
    parser.add_argument(
        "--shard",
        default=WHOLE,
        metavar="I/N",
        help="attribute every N-th fact only, from the I-th on, into the score cache, and write no results: for N "
        "machines at once; the command without it then reads them all",
    )
    parser.set_defaults(command=_localize)


def _localize(arguments: argparse.Namespace) -> int:
    require_folder(arguments.out)
    given = {"localization_data": arguments.data, "localization_size": arguments.size}
    given = {name: value for name, value in given.items() if value is not None}
    shard_of(arguments.shard)
    hparams = replace_settings(load_settings(arguments), **given)
    localize_into(arguments.out, hparams, arguments.workers, arguments.shard)
    return 0


def localize_into(folder: Path, hparams: KNEHyperParams, workers: int = 1, shard: str = WHOLE) -> None:
    """Loads the model, localises on ``localization_data``, prints what was found, and writes it into ``folder``.

    Args:
        folder: Where the results go.
        hparams: The settings.
        workers: Processes that attribute side by side.
        shard: ``i/n``: only every n-th fact from the i-th on is attributed, and nothing is written but its scores, into
            the cache.

    Raises:
        ValueError: ``folder`` has results of other settings, the settings name no data, the shard is none or holds no
            fact, or `study` raises it.
    """
    i, n = shard_of(shard)
    from kne_easyedit.localization.data import localization_requests
    from kne_easyedit.localization.localizer import Localization
    from kne_easyedit.localization.output import print_study, require_same_settings, save_study
    from kne_easyedit.localization.stability import study
    from kne_easyedit.models.loading import load_model

    if n == 1:
        require_same_settings(folder, hparams)
    requests, data = localization_requests(hparams), str(hparams.localization_data)
    wanted = "" if len(requests) == hparams.localization_size else f" ({hparams.localization_size} wanted)"
    print(f"model {hparams.model_name}, {len(requests)} facts{wanted} of {data}", flush=True)
    if n > 1 and not requests[i::n]:
        raise ValueError(f"shard: {shard} of {len(requests)} facts holds none; use at most {len(requests)} shards")
    model, tokenizer = load_model(hparams)
    if n > 1:
        part = Localization(model, tokenizer, requests[i::n], hparams)
        computed = part.compute(workers)
        print(f"shard {shard}: {len(part.facts)} facts, {computed} attributed now; scores in {part.cache.folder}")
        return
    found = study(model, tokenizer, requests, hparams, workers)
    save_study(found, folder, model, hparams, data)
    print_study(found)
    print(f"\nWritten to {folder}: ensemble.json, scores.safetensors, summary.json, ensemble.png")
