"""``kne summarize``: the figures of results files, of EasyEdit's scripts or of ours, in one table."""

from __future__ import annotations

from pathlib import Path


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "summarize", help="one table of results files: of EasyEdit's scripts (JSON) or of `kne run` (results.jsonl)"
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="one row for each method in it; a file that names none is one row"
    )
    parser.set_defaults(command=_summarize)


def _summarize(arguments) -> int:
    from kne_easyedit.scores import read_results, summarize_metrics, table

    found: dict[tuple[str, Path], list[dict]] = {}
    for path in dict.fromkeys(arguments.files):
        for record in read_results(path):
            found.setdefault((record["method"] or path.name, path), []).append(record["metrics"])
    labels = [label for label, _ in found]
    rows = {
        (f"{label} ({path})" if labels.count(label) > 1 else label): summarize_metrics(metrics) for (label, path), metrics in found.items()
    }
    print(table(rows))
    return 0
