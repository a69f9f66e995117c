"""``kne localize``: score neurons on a set of facts and keep the ensemble."""

from __future__ import annotations

from pathlib import Path

from kne_easyedit._util.settings import replace_settings
from kne_easyedit.cli.common import add_settings, load_settings, positive, require_folder


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "localize", help="which neurons matter for a set of facts: scores, ensemble, stability, picture"
    )
    add_settings(parser)
    parser.add_argument("--data", help="KnowEdit file, or 'embedded'; overrides localization_data")
    parser.add_argument("--size", type=positive, help="number of facts; overrides localization_size")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/localize"), help="folder of the results (default %(default)s)"
    )
    parser.set_defaults(command=_localize)


def _localize(arguments) -> int:
    from kne_easyedit.localization.output import localize_job

    require_folder(arguments.out)
    hparams = load_settings(arguments)
    given = {"localization_data": arguments.data, "localization_size": arguments.size}
    localize_job(replace_settings(hparams, **{k: v for k, v in given.items() if v is not None}), arguments.out)
    return 0
