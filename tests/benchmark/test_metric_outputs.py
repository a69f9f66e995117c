"""Every output of a comparison derives from the table of metrics: a metric is shown by all of them, or by none."""

from __future__ import annotations

import json

import pytest
from made_results import line, write

from kne_easyedit import cli, metrics
from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.markdown_report import report_text
from kne_easyedit.benchmark.summary import retention, summarize
from kne_easyedit.benchmark.tables import figures
from kne_easyedit.metrics import Metric, table


def with_post(**more) -> dict:
    entry = line("KNE", 0, 1.0)
    return {**entry, "metrics": {**entry["metrics"], "post": {**entry["metrics"]["post"], **more}}}


def test_rephrase_is_shown_where_a_record_has_it_and_nowhere_else(tmp_path, capsys):
    """In every command and in the report; a summary keeps the key."""
    poor = line("KNE", 0, 1.0)
    for name, lines in (("with", [with_post(rephrase_acc=[1.0]), {**poor, "index": 1}]), ("without", [poor])):
        write(tmp_path / f"{name}.jsonl", lines)
        summary = summarize(lines)
        shown = {
            "table": "rephrase" in table({"KNE": summary}),
            "run": "rephrase" in [metric.key for metric in metrics.run_columns(summary)],
            "retention": "rephrase" in retention([{**entry, "after": 1} for entry in lines])[0],
        }
        found = collect([tmp_path / f"{name}.jsonl"])
        text = report_text(found, "title", {})
        shown |= {"report": "| REPH |" in text, "meaning": "**REPH**, rephrase: as edit_success" in text}
        shown |= {"numbers": "rephrase" in figures(found)["counterfact"]["KNE"]["intervals"]}
        assert cli.main(["summarize", str(tmp_path / f"{name}.jsonl")]) == 0
        shown |= {"summarize": "| rephrase |" in capsys.readouterr().out}
        assert set(shown.values()) == {name == "with"}, shown
        assert "rephrase" in summary


def test_a_new_metric_is_one_entry(tmp_path, monkeypatch, capsys):
    """One that EasyEdit gives and one that a run measures reach every output; without the entries none does."""
    new = (
        Metric("tone", "TON", "share of polite words", "percent", "up", ("metrics", "post", "tone"), by_category=True),
        Metric("length", "LEN", "tokens of the answer", "bytes", "down", ("length",)),
    )
    lines = [{**with_post(tone={"Formal_acc": [0.5]}), "length": 4}]
    path = tmp_path / "results.jsonl"
    write(path, lines)

    def outputs() -> list[str]:
        found, summary = collect([path]), summarize(lines)
        assert cli.main(["summarize", str(path)]) == 0
        columns = " ".join(metric.key for metric in metrics.run_columns(summary))
        again = " ".join(retention([{**lines[0], "after": 1}])[0])
        return [report_text(found, "title", {}), json.dumps(figures(found)), capsys.readouterr().out, columns, again]

    assert not any("tone" in text or "length" in text for text in outputs())
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, *new))
    report, numbers, printed, columns, again = outputs()
    assert "|  | TON | - | - | **50.00** |" in report and "|  | LEN | - | - | **4.00** |" in report
    assert "| TON | LEN | records |" in report and "| counterfact | TON | Formal | 1 | - | **50.00** |" in report
    assert '"tone": {"Formal": 50.0}' in numbers and '"length": {"mean": 4.0' in numbers
    assert all("tone" in text and "length" in text for text in (printed, columns))
    assert "tone" in again and "length" not in again  # no answer is generated there
    with pytest.raises(ValueError, match=r"metrics\.post\.tone\.Formal_acc that is a str"):
        metrics.check_metrics({"post": {"tone": {"Formal_acc": "x"}}})
