"""``kne report``: tables, figures and a page from the results of any number of runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kne_easyedit.cli.common import require_folder


def add_commands(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser(
        "report", help="Markdown and a self-contained HTML page from results: tables, intervals, pictures, answers"
    )
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="folders (searched for results.jsonl), results.jsonl files, or folders of other reports (records.jsonl)",
    )
    parser.add_argument(
        "--study",
        action="store_true",
        help="a report of the paper's studies (kne study): curves, and what was found in words",
    )
    parser.add_argument("--out", type=Path, help="folder of the report (default: 'report' in the first DIR)")
    parser.add_argument("--title", help="default: KnowEdit comparison, or The paper's studies")
    parser.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from kne_easyedit.benchmark.collect import collect
    from kne_easyedit.benchmark.publish import publish

    first = arguments.results[0]
    out = arguments.out or (first if first.is_dir() else first.parent) / "report"
    require_folder(out)
    if arguments.study:
        from kne_easyedit.studies.reading import read_studies
        from kne_easyedit.studies.report import publish_studies

        page = publish_studies(read_studies(arguments.results), out, arguments.title or "The paper's studies")
        print(f"Written to {out}: {page.name}, studies.md, studies.json, studies.csv and the pictures")
        return 0
    page = publish(collect(arguments.results), out, arguments.title or "KnowEdit comparison")
    print(f"Written to {out}: {page.name}, report.md, report.json, records.jsonl, manifests.json and the pictures")
    return 0
