"""The report of a comparison as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from kne_easyedit._util.markdown import literal, table_of_rows
from kne_easyedit.benchmark.collect import Collection, records_of, seeds_of
from kne_easyedit.benchmark.curves import curve_parts
from kne_easyedit.benchmark.general_report import general_parts
from kne_easyedit.benchmark.intervals import FEW, Interval
from kne_easyedit.benchmark.labels import data_name, is_kne
from kne_easyedit.benchmark.neighbour_report import neighbour_parts
from kne_easyedit.benchmark.published import quoted_results
from kne_easyedit.benchmark.summary import summarize
from kne_easyedit.benchmark.tables import (
    baselines_mean,
    categories,
    category_records,
    compared,
    lead,
    mean,
    not_finite_of,
    of_model,
    unedited,
    with_categories,
)
from kne_easyedit.metrics import Metric

ANSWERS = 3
"""How many records of each data set are shown with their answers."""


def report_text(found: Collection, title: str, pictures: Mapping[str, str]) -> str:
    """The report as Markdown.

    Text from a file or the caller (labels, names, prompts, answers, settings, versions) goes through `literal`.

    Args:
        found: The result lines and manifests.
        title: Its first line.
        pictures: File name of a figure -> caption.
    """

    def shown(*names: str) -> list[str]:
        return [f"![{pictures[name]}]({name})\n\n*{pictures[name]}*" for name in names if name in pictures]

    parts = [f"# {literal(title)}", setting(found)]
    parts += [
        "## Results in the paper's layout",
        "Means over records, in percent; fluency is n-gram entropy x 100. Best **bold**, second <u>underlined</u>."
        " *No edit* is the model before, *baselines* the mean of the methods that are not KNE; both stand apart."
        " A row *records* stands where methods have different ones: how many, and how many all of them share."
        + _of_sequences(found),
    ]
    parts.append(_layout(found))
    parts += [
        "What the rows mean:",
        "\n".join(f"- **{metric.short}**, {metric.label}: {metric.meaning}." for metric in compared(found)),
    ]
    parts += shown("tradeoff.png", "neighbourhood.png")
    parts += [
        "## How sure the means are",
        "Mean and 95 % bootstrap interval over records (10,000 resamples);"
        " a record under several seeds is drawn with all of them. Behind the number of records stand the metrics that"
        " others have." + _of_models(found),
        *shown("intervals.png", "neighbourhood-intervals.png"),
        _table_of_intervals(found),
    ]
    parts += [
        "## Portability and locality by category",
        "Means over the records that have the category, in percent,"
        " and how many these are (of the method with the most).",
        _by_category(found),
    ]
    for ours in filter(is_kne, found.methods):
        rows = _table_of_leads(found, ours)
        if len(rows) > 1:
            label = literal(ours)
            parts += [
                f"## {label} against each method",
                f"{label} minus the method over the same records, with the 95 % interval;"
                f" **bold** where the interval leaves out 0, over {FEW} records or more.",
            ]
            parts.append(table_of_rows(rows))
    parts += curve_parts(found, shown("curves.png"))
    parts += general_parts(found)
    parts += ["## Cost", _costs(found)]
    parts += shown("time.png", "losses.png")
    parts += ["## Some answers before and after", _answers(found)]
    parts += neighbour_parts(found)
    parts += ["## Published figures", quoted_results(found)]
    parts += ["## What was run", what_was_run(found)]
    return "\n\n".join(parts) + "\n"


def setting(found: Collection) -> str:
    """Model, records, versions and machine, as one paragraph."""
    manifests = found.manifests
    if not manifests:
        return "No manifest stands beside the results: model, versions and machine are unknown."

    def every(get: Callable[[Mapping], object]) -> str:
        return ", ".join(dict.fromkeys(literal(get(manifest)) for manifest in manifests))

    counts = ", ".join(
        f"{literal(data)}: {records_of(line for line in found.lines if line['data'] == data)}"
        for data in found.data_sets
    )
    return (
        f"Model {every(lambda m: m['model']['name'])} ({every(lambda m: m['environment']['dtype'])}); "
        f"records {counts}; "
        f"mode {every(lambda m: m['mode'])}; seed {every(lambda m: m.get('seed'))}; "
        f"EasyEdit {every(lambda m: m['easyedit']['version'][:10])} "
        f"({every(lambda m: m['easyedit']['kind'])}); fluency variant {every(lambda m: m['fluency_variant'])}; "
        f"chat template {every(lambda m: 'used' if m['chat_template'] else 'not used')}; "
        f"machine {every(lambda m: m['machine']['processor'])}, {every(lambda m: m['machine']['cpus'])} CPUs "
        f"(torch's threads: {every(lambda m: m['machine']['threads'])})"
        + (
            f", {every(lambda m: ', '.join(map(str, m['machine']['gpus'])))}"
            if any(m["machine"]["gpus"] for m in manifests)
            else ""
        )
        + "."
    )


def _layout(found: Collection) -> str:
    """Rows: data sets and metrics; columns: methods."""
    rows = [["data", "metric", "*no edit*", "*baselines*", *_labels(found)]]
    for data in found.data_sets:
        summaries = {method: summarize(lines) for method in found.methods if (lines := found.of(data, method))}
        before = summarize(unedited(found, data))
        for i, metric in enumerate(compared(found)):
            apart = [_number(value, "{:.2f}") for value in (before[metric.key], baselines_mean(found, data, metric))]
            values = [summaries[m][metric.key] if m in summaries else None for m in found.methods]
            notes = [not_finite_of(found.of(data, method), metric) for method in found.methods]
            rows.append([literal(data) if i == 0 else "", metric.short, *apart, *_ranked(values, metric, notes)])
        records = {method: {line["record"] for line in found.of(data, method)} for method in summaries}
        seeds = {method: seeds_of(found.of(data, method)) for method in summaries}
        shared = len(set.intersection(*records.values()))
        if any(len(its) != shared for its in records.values()) or len(set(seeds.values())) > 1:
            # Means over different records: the reader must see it beside them.
            counts = [_times(len(records[m]), seeds[m]) if m in records else "-" for m in found.methods]
            rows.append(["", f"records ({shared} shared)", "-", "-", *counts])
    return table_of_rows(rows)


def _of_sequences(found: Collection) -> str:
    """Of which moment the figures of sequences are; nothing without sequences."""
    if all(line["mode"] != "sequential" for line in found.lines):
        return ""
    return (
        " Edits in a row: the figures of a fact and its neighbours are of the moment directly after its own edit,"
        " perplexity and tasks of that after the last one."
    )


def _of_models(found: Collection) -> str:
    """What is drawn where facts share an edited model; nothing where that makes no difference."""
    named = ", ".join(metric.short for metric in compared(found) if of_model(metric))
    if not named or all(line["mode"] not in ("batch", "sequential") for line in found.lines):
        return ""
    return (
        f" {named} is one figure of each edited model, that of a batch or a sequence: these are drawn and counted, and"
        " one alone has no interval."
    )


def _ranked(values: Sequence[float | None], metric: Metric, notes: Sequence[str] | None = None) -> list[str]:
    """Best bold, second underlined; equal values (as printed) rank alike, and none with a note does."""
    printed = [None if value is None else round(value, 2) for value in values]
    notes = notes or [""] * len(values)
    ranking = {value for value, note in zip(printed, notes) if value is not None and not note}
    order = sorted(ranking, reverse=metric.better != "down")
    marks = {order[0]: "**{}**"} if order else {}
    if len(order) > 1:
        marks[order[1]] = "<u>{}</u>"
    return [
        _noted(None if value is None else f"{value:.2f}", note)
        if note or value is None
        else marks.get(value, "{}").format(f"{value:.2f}")
        for value, note in zip(printed, notes)
    ]


def _noted(text: str | None, note: str) -> str:
    """A cell with a note, which stands alone where there is no value."""
    if text is None:
        return note or "-"
    return f"{text} ({note})" if note else text


def _table_of_intervals(found: Collection) -> str:
    metrics = compared(found)
    rows = [["data", "method", *(metric.short for metric in metrics), "records"]]
    for data in found.data_sets:
        for method in found.methods:
            if lines := found.of(data, method):
                means = [mean(lines, metric) for metric in metrics]
                shown = [_with_interval(its, not_finite_of(lines, metric)) for its, metric in zip(means, metrics)]
                rows.append([literal(data), literal(method), *shown, _counts(metrics, means, seeds_of(lines))])
    return table_of_rows(rows)


def _counts(metrics: Sequence[Metric], values: Sequence[Interval | None], seeds: int) -> str:
    """How many records there are, and in parentheses the metrics that not as many have."""
    of = {metric.short: value.records for metric, value in zip(metrics, values) if value}
    most = max((of.get(metric.short, 0) for metric in metrics if not of_model(metric)), default=0)
    others = ", ".join(f"{name} {number}" for name, number in of.items() if number != most)
    return _times(most, seeds) + (f" ({others})" if others else "")


def _times(records: object, seeds: int) -> str:
    """How many records, and under how many seeds if there are several."""
    return str(records) if seeds == 1 else f"{records} x {seeds} seeds"


def _by_category(found: Collection) -> str:
    rows = [["data", "figure", "category", "records", "*no edit*", *_labels(found)]]
    for data in found.data_sets:
        for metric in with_categories(compared(found)):
            of_method = [categories(found.of(data, method), metric) for method in found.methods]
            before = categories(unedited(found, data), metric)
            counts = [category_records(found.of(data, method), metric) for method in found.methods]
            for name in sorted({name for its in of_method for name in its}):
                means = [fmean(its[name]) if name in its else None for its in of_method]
                apart = _number(fmean(before[name]) if name in before else None, "{:.2f}")
                most = str(max(count.get(name, 0) for count in counts))
                category = literal(name.replace("_", " "))
                rows.append([literal(data), metric.short, category, most, apart, *_ranked(means, metric)])
    return table_of_rows(rows)


def _table_of_leads(found: Collection, ours: str) -> list[list[str]]:
    metrics = compared(found)
    rows = [["data", f"{literal(ours)} minus", *(metric.short for metric in metrics), "records"]]
    for data in found.data_sets:
        mine = found.of(data, ours)
        for method in found.methods:
            theirs = found.of(data, method)
            if method != ours and theirs and mine:
                leads = [lead(found, data, ours, method, metric) for metric in metrics]
                seeds = len({line["seed"] for line in theirs} & {line["seed"] for line in mine})
                notes = [not_finite_of(theirs, metric) or not_finite_of(mine, metric) for metric in metrics]
                shown = [_with_interval(value, note, sign=True) for value, note in zip(leads, notes)]
                rows.append([literal(data), literal(method), *shown, _counts(metrics, leads, seeds)])
    return rows


def _with_interval(value: Interval | None, note: str = "", sign: bool = False) -> str:
    """A mean with its interval, if there is one; a difference (``sign``) that is told apart from 0 is bold."""
    if value is None:
        return _noted(None, note)
    text = value.shown("{:+.1f}" if sign else "{:.1f}")
    return f"**{text}**" if sign and value.leaves_out_zero and not note else _noted(text, note)


def _costs(found: Collection) -> str:
    rows = [
        [
            "data",
            "method",
            "seconds an edit (median)",
            "training steps",
            "peak memory above what was held",
            "seconds before (once)",
            "the same, an edit",
        ]
    ]
    before = {key: seconds for manifest in found.manifests for key, seconds in _seconds_before(manifest).items()}
    for data in found.data_sets:
        for method in found.methods:
            if not (lines := found.of(data, method)):
                continue
            summary = summarize(lines)
            steps = [len(losses) for line in lines if (losses := line["losses"])]
            once = before.get((data, method))
            rows.append(
                [
                    literal(data),
                    literal(method),
                    _number(summary["seconds_per_edit"], "{:.2f}"),
                    _number(sum(steps) / len(steps) if steps else None, "{:.1f}"),
                    _number(summary["peak_bytes"], "{:.0f} MiB", 2**20),
                    _number(once, "{:.0f}"),
                    _number(once, "{:.2f}", len(lines)),
                ]
            )
    text = (
        "Time to compute and write one edit, evaluation apart. KNE's localisation and MEMIT's second moments are made"
        " once for a model, before the first edit: they are counted apart, here also spread over the records."
    )
    return f"{text}\n\n{table_of_rows(rows)}"


def _seconds_before(manifest: Mapping) -> dict[tuple[str, str], float | None]:
    """(data set, method) -> seconds of what is made once: localisation, second moments."""
    data = data_name(Path(manifest["data"]["name"]).stem)
    found = {(data, method): its.get("seconds") for method, its in manifest["second_moments"].items()}
    for method, its in manifest["localization"].items():
        known = its.get("seconds_per_fact") and its.get("facts")
        found[data, method] = its["seconds_per_fact"] * its["facts"] if known else None
    return found


def _answers(found: Collection) -> str:
    rows = [["data", "prompt", "new answer", "before", *_labels(found)]]
    for data in found.data_sets:
        for lines in found.first_records(data, "after", ANSWERS):
            one = next(iter(lines.values()))
            after = [_quoted(lines[m]["after"]) if m in lines else "-" for m in found.methods]
            rows.append(
                [
                    literal(data),
                    _quoted(one["prompt"], 90),
                    _quoted(one["target_new"]),
                    _quoted(one["before"]),
                    *after,
                ]
            )
    return table_of_rows(rows)


def what_was_run(found: Collection) -> str:
    """Versions and weights as a line, and the settings of every method as a table."""
    if not found.manifests:
        return "-"
    rows = [["data", "method", "settings", "fingerprint"]]
    for manifest in found.manifests:
        for method, settings in manifest["methods"].items():
            shown = {
                k: v
                for k, v in settings.items()
                if k not in ("alg_name", "device", "model_parallel") and v not in (None, [], "")
            }
            text = ", ".join(f"{k} {v}" for k, v in shown.items())
            rows.append(
                [
                    literal(Path(manifest["data"]["name"]).name),
                    literal(method),
                    literal(text),
                    literal(manifest["fingerprints"].get(method, "-")),
                ]
            )
    first = manifest_line(found.manifests[0])
    moments = dict.fromkeys(
        its["source"] for manifest in found.manifests for its in manifest["second_moments"].values()
    )
    if moments:
        first += f" Second moments: {'; '.join(map(literal, moments))}."
    unique = [rows[0], *dict.fromkeys(map(tuple, rows[1:]))]
    return f"{first}\n\n{table_of_rows(unique)}"


def manifest_line(manifest: Mapping) -> str:
    """The versions and weights that a run was made with, as one line."""
    environment = manifest["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", "torch", "transformers", "peft"))
    return literal(
        f"kne_easyedit {manifest['kne_easyedit']}; {versions}; EasyEdit {manifest['easyedit']['version']}, patches "
        f"{', '.join(map(str, manifest['easyedit']['patches']))}; weights sha256 {manifest['model']['sha256'][:16]}."
    )


def _quoted(text: str | None, length: int = 40) -> str:
    """The beginning of a prompt or an answer."""
    return literal(text or "", length) or "(nothing)"


def _labels(found: Collection) -> list[str]:
    return [literal(method) for method in found.methods]


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else form.format(value / unit)
