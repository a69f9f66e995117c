"""What `kne run` prints when it ends: the table, what its columns mean, and answers before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kne_easyedit._util.markdown import markdown_table
from kne_easyedit._util.messages import printable
from kne_easyedit.benchmark.answers import one_line, up_to_stop
from kne_easyedit.benchmark.result_line import ResultLine, parse_result
from kne_easyedit.benchmark.store import read_lines
from kne_easyedit.metrics import retention_metrics, run_columns


def print_report(summary: Mapping[str, Any], folder: Path, examples: int = 3, neighbours_of: str | None = None) -> None:
    """Prints the summary of a run and the first answers of its ``results.jsonl``.

    Args:
        summary: What `benchmark.run` returns.
        folder: The run's folder.
        examples: How many records are shown with their answers.
        neighbours_of: The prompt of the record whose neighbours are shown; None, or one that has none: the first record
            that has some.
    """
    easyedit, found = summary["easyedit"], summary["localization"]
    print(f"\nEasyEdit: {easyedit['kind']} {easyedit['version']}; fluency variant: {summary['fluency_variant']}")
    print(f"Patches of it that were applied (kne doctor explains them): {', '.join(easyedit['patches']) or 'none'}")
    if summary["chat_template"]:
        print("Prompts in the model's chat template, at edit and evaluation")
    for method, made in summary["second_moments"].items():
        print(
            f"{method}: second moments from {made['source']}"
            + ("" if made["seconds"] is None else f" ({made['seconds']:.1f} s when computed)")
        )
    for method, its in found.items():
        if its["facts"]:
            print(
                f"{method}: localised on {its['facts']} facts "
                f"({its['seconds_per_fact']:.1f} s each when computed, {its['seconds']:.1f} s now): "
                f"{its['neurons']} neurons, {its['parameter_share']:.2%} of all parameters"
            )
    mode = f"{summary['batch_size']} facts an edit" if summary["mode"] == "batch" else f"{summary['mode']} edits"
    columns = run_columns(*summary["methods"].values())
    table = markdown_table(summary["methods"], [metric.key for metric in columns], width=8)
    print(f"\n{summary['records']} records, {mode}\n\n{table}\n")
    width = max(16, *(len(metric.key) for metric in columns))
    for metric in columns:
        print(f"  {metric.key:<{width}} {metric.meaning}")
    lines = _lines(folder)
    _print_answers(lines, summary, examples)
    _print_neighbours(lines, summary, neighbours_of)
    for method, figures in summary["methods"].items():
        for stop in figures.get("retention", ()):
            shown = ", ".join(
                f"{metric.key} {stop[metric.key]:.2f}"
                for metric in retention_metrics(stop)
                if stop[metric.key] is not None
            )
            print(f"{method} after {stop['edits']} edits, all of them asked again: {shown}")
    for method, figures in summary["methods"].items():
        for task, score in figures.get("ability", {}).items():
            print(f"{method}: {task} {figures['ability_before'][task]:.3f} before, {score:.3f} after")
        if (before := figures.get("perplexity_before")) is not None:
            after, broken = figures["perplexity"], figures["perplexity_not_finite"]
            said = f"not finite for {broken} of the records" if after is None else f"{after:.2f}"
            print(f"{method}: perplexity {before:.2f} before, {said} after")
    for complaint in summary["skipped"]:
        print(f"skipped: {printable(complaint)}")
    ensembles = sorted(path.name for path in folder.glob("ensemble*"))
    print(f"\nWritten to {folder}: {', '.join(['summary.json', 'results.jsonl', *ensembles])}")


def _lines(folder: Path) -> list[ResultLine]:
    """The latest result line of every record and method, in the order of the records."""
    lines = [parse_result(line) for _, line in read_lines(folder / "results.jsonl")]
    latest = {(line["index"], line["method"]): line for line in lines}
    return sorted(latest.values(), key=lambda line: line["index"])  # workers finish in any order


def _print_neighbours(lines: Sequence[ResultLine], summary: Mapping[str, Any], prompt: str | None) -> None:
    """What the neighbours of one edit answer before it and after it by each method."""
    having = [line for line in lines if line["neighbours"]]
    if not having:
        return
    chosen = next((line for line in having if line["prompt"] == prompt), having[0])
    own = {line["method"]: line["neighbours"] or [] for line in having if line["index"] == chosen["index"]}
    width = max(8, *map(len, summary["methods"]))
    print(f"\nNeighbours before and after the edit  {_fact(chosen)}")
    for its in chosen["neighbours"] or ():
        print(f"\n  {printable(its['prompt'])}\n    {'before':<{width}} {one_line(up_to_stop(its['before']))}")
        for method, neighbours in own.items():
            for found in neighbours:
                if found["prompt"] == its["prompt"]:
                    print(f"    {method:<{width}} {one_line(up_to_stop(found['after']))}")


def _fact(line: ResultLine) -> str:
    return f"{printable(line['prompt'])}  ->  {printable(line['target_new'])}"


def _print_answers(lines: Sequence[ResultLine], summary: Mapping[str, Any], examples: int) -> None:
    width = max(8, *map(len, summary["methods"]))
    print("\nAnswers before and after (greedy):")
    for index in dict.fromkeys(line["index"] for line in lines[: examples * len(summary["methods"])]):
        own = [line for line in lines if line["index"] == index]
        print(f"\n  {_fact(own[0])}")
        print(f"    {'before':<{width}} {one_line(own[0]['before'] or '')}")
        for line in own:
            print(f"    {line['method']:<{width}} {one_line(line['after'] or '')}")
