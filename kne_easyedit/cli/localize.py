"""``kne localize``: score neurons on a set of facts and keep the ensemble."""

from __future__ import annotations

from pathlib import Path

from kne_easyedit.cli.common import add_settings, demand_folder, load_settings, positive
from kne_easyedit.hparams import changed


def add_commands(commands) -> None:
    parser = commands.add_parser("localize", help="which neurons matter for a set of facts: scores, ensemble, stability, picture")
    add_settings(parser)
    parser.add_argument("--data", help="KnowEdit file, or 'embedded'; overrides localization_data")
    parser.add_argument("--size", type=positive, help="number of facts; overrides localization_size")
    parser.add_argument("--out", type=Path, default=Path("outputs/localize"), help="folder of the results (default %(default)s)")
    parser.set_defaults(command=_localize)


def _localize(arguments) -> int:
    from kne_easyedit.study import localize_job

    demand_folder(arguments.out)
    hparams = load_settings(arguments)
    given = {"localization_data": arguments.data, "localization_size": arguments.size}
    localize_job(changed(hparams, **{k: v for k, v in given.items() if v is not None}), arguments.out)
    return 0
