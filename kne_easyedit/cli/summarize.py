"""``kne summarize``: one table of results files, of EasyEdit's scripts or of our runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser(
        "summarize", help="one table of results: of EasyEdit's scripts (JSON), and of ours (folders or results.jsonl)"
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="a script's file is one row; files and folders of ours are merged, one row a data set and method",
    )
    parser.set_defaults(command=_summarize)


def _summarize(arguments: argparse.Namespace) -> int:
    from kne_easyedit.metrics import read_results, summarize_metrics, table

    paths = list(dict.fromkeys(arguments.files))
    ours = [path for path in paths if path.is_dir() or path.suffix == ".jsonl"]
    rows = {
        str(path): summarize_metrics([record["metrics"] for record in read_results(path)])
        for path in paths
        if path not in ours
    }
    if ours:
        from kne_easyedit.benchmark.collect import collect, records_of
        from kne_easyedit.benchmark.summary import summarize

        found = collect(ours)
        for data in found.data_sets:
            rows |= {
                f"{data}: {method}": {**summarize(lines), "records": records_of(lines)}
                for method in found.methods
                if (lines := found.of(data, method))
            }
    print(table(rows))
    return 0
