"""What a person reads after a run: the table, what its columns mean, and answers before and after."""

from __future__ import annotations

from pathlib import Path

from kne_easyedit.benchmark.store import read_lines
from kne_easyedit.benchmark.summary import METRICS


def print_report(summary: dict, folder: Path, examples: int = 3) -> None:
    """Prints the summary of a run and the first answers of its ``results.jsonl``."""
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
                f"{method}: localised on {its['facts']} facts ({its['seconds_per_fact']:.1f} s each when computed, {its['seconds']:.1f} s now): "
                f"{its['neurons']} neurons, {its['parameter_share']:.2%} of all parameters"
            )
    mode = f"{summary['batch_size']} facts an edit" if summary["mode"] == "batch" else f"{summary['mode']} edits"
    print(f"\n{summary['records']} records, {mode}\n\n{table(summary['methods'])}\n")
    for name, meaning in METRICS.items():
        print(f"  {name:<16} {meaning}")
    lines = [line for _, line in read_lines(folder / "results.jsonl")]
    own_lines = {(line["index"], line["method"]): line for line in lines}
    lines = sorted(own_lines.values(), key=lambda line: line["index"])  # workers finish in any order
    width = max(8, *map(len, summary["methods"]))
    print("\nAnswers before and after (greedy):")
    for index in dict.fromkeys(line["index"] for line in lines[: examples * len(summary["methods"])]):
        own = [line for line in lines if line["index"] == index]
        print(f"\n  {own[0]['prompt']}  ->  {own[0]['target_new']}")
        print(f"    {'before':<{width}} {_one_line(own[0]['before'])}")
        for line in own:
            print(f"    {line['method']:<{width}} {_one_line(line['after'])}")
    for method, figures in summary["methods"].items():
        for stop in figures.get("retention", ()):
            print(f"{method} after {stop['edits']} edits, all of them asked again: " + _figures_of(stop))
    for complaint in summary["skipped"]:
        print(f"skipped: {complaint}")
    ensembles = sorted(path.name for path in folder.glob("ensemble*"))
    print(f"\nWritten to {folder}: {', '.join(['summary.json', 'results.jsonl', *ensembles])}")


def table(methods: dict[str, dict]) -> str:
    """The figures of the methods as a Markdown table."""
    width = max(8, *map(len, methods))
    header = f"| {'method':<{width}} | " + " | ".join(METRICS) + " |"
    rule = f"|{'-' * (width + 2)}|" + "|".join("-" * (len(name) + 1) + ":" for name in METRICS) + "|"
    rows = [
        f"| {method:<{width}} | "
        + " | ".join(f"{'-' if figures[n] is None else f'{figures[n]:.2f}':>{len(n)}}" for n in METRICS)
        + " |"
        for method, figures in methods.items()
    ]
    return "\n".join([header, rule, *rows])


def _figures_of(stop: dict) -> str:
    names = ("edit_success", "portability", "locality")
    return ", ".join(f"{name} {stop[name]:.2f}" for name in names if stop[name] is not None)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:70] or "(ends at once)"
