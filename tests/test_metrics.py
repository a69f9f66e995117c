"""The table of metrics, what is read by it from EasyEdit's metrics, and the two kinds of results files."""

from __future__ import annotations

import json

import pytest

from kne_easyedit import cli, metrics
from kne_easyedit.metrics import read_results, summarize_metrics, table

RICH = {
    "post": {
        "rewrite_acc": [0.5],
        "rephrase_acc": [1.0],
        # 0.75 (mean of 1 and 0.5) and 0.25: the record's portability is 0.5, whatever the number of prompts
        "portability": {"Reasoning_acc": [1.0, 0.5], "Alias_acc": [0.25]},
        # what EasyEdit leaves beside it since 2026: token ids, and what the metric is
        "locality": {"Near_acc": [0.2], "Near_output": [[7, 8, 9]], "metric_meta": {"kind_acc": "not a figure"}},
        "fluency": {"ngram_entropy": 5.0},
    }
}
POOR = {"post": {"rewrite_acc": 1.0, "portability": {}, "locality": {"Near_acc": []}}}


def test_means_over_prompts_then_categories_then_records():
    figures = summarize_metrics([RICH, POOR])
    assert figures == pytest.approx(
        {"edit_success": 75.0, "rephrase": 100.0, "portability": 50.0, "locality": 20.0, "fluency": 500.0, "records": 2}
    )


def test_what_no_record_has_is_none():
    figures = summarize_metrics([POOR])
    assert figures["edit_success"] == 100
    assert [figures[name] for name in ("rephrase", "portability", "locality", "fluency")] == [None] * 4
    assert summarize_metrics([])["edit_success"] is None
    assert "| -" in table({"x": figures}).replace("  ", "")


def test_as_the_script_of_easyedit_counts():
    """The closing eval() of run_knowedit_llama2.py, word for word in what it computes."""
    both = [RICH, {"post": {**RICH["post"], "rewrite_acc": [1.0], "portability": {"Alias_acc": [0.0, 1.0, 1.0]}}}]
    expected = []
    for record in both:
        cases = [sum(values) / len(values) * 100 for values in record["post"]["portability"].values()]
        expected.append(sum(cases) / len(cases))
    assert summarize_metrics(both)["portability"] == pytest.approx(sum(expected) / len(expected))


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_both_kinds_of_files(tmp_path):
    own = write(tmp_path / "results.json", [RICH, POOR])
    assert read_results(own) == [{"method": None, "metrics": RICH}, {"method": None, "metrics": POOR}]
    lines = [{"method": "KNE", "index": 0, "metrics": RICH}, {"method": "FT", "index": 0, "metrics": POOR}]
    ours = write(tmp_path / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert read_results(ours) == [{"method": "KNE", "metrics": RICH}, {"method": "FT", "metrics": POOR}]
    single = write(tmp_path / "single.jsonl", lines[0])
    assert read_results(single) == [{"method": "KNE", "metrics": RICH}]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "an empty file"),
        ("alg_name: KNE\n", "line 1: no JSON"),
        ({"pre": {}, "post": {}}, "line 1: a mapping of 'pre', 'post'"),
        ([{"prompt": "x"}], "entry 0: metrics that are a mapping of 'prompt'"),
        ([RICH, 3], "entry 1: metrics that are a int"),
        (
            json.dumps({"method": "KNE", "metrics": RICH}) + '\n{"method": "FT", "met',
            "line 2: no JSON .*the same `kne run` resumes it",
        ),
        (json.dumps({"method": "KNE", "metrics": []}), "line 1: metrics that are a list"),
        ("7", "line 1: a int"),
    ],
)
def test_other_files_are_refused_with_what_was_found(tmp_path, content, found):
    path = write(tmp_path / "strange.json", content)
    with pytest.raises(ValueError, match=f"strange.json: found {found}.*expected"):
        read_results(path)


def test_no_text_and_no_file(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"picture\.png: found no text"):
        read_results(tmp_path / "picture.png")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        read_results(tmp_path / "nowhere.json")


def line(method: str, index: int, metrics: dict, **changes) -> dict:
    return {
        "method": method,
        "index": index,
        "record": f"r{index}",
        "fingerprint": method,
        "data": "test_cf",
        "metrics": metrics,
        **changes,
    }


def test_one_table_of_many_files(tmp_path, capsys):
    """Ours are merged, a record that two files hold counts once; a script's file is a row of its own."""
    first = write(tmp_path / "first.jsonl", "".join(json.dumps(line(m, 0, RICH)) + "\n" for m in ("KNE", "FT")))
    second = write(
        tmp_path / "second.jsonl",
        "".join(json.dumps(line("KNE", i, metrics)) + "\n" for i, metrics in ((0, RICH), (1, POOR))),
    )
    script = write(tmp_path / "ROME_results.json", [RICH, POOR])
    assert cli.main(["summarize", first, second, script]) == 0
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows == {script: "75.00", "counterfact: KNE": "75.00", "counterfact: FT": "50.00"}
    assert cli.main(["summarize", str(tmp_path / "nowhere.json")]) == 1
    assert "nowhere.json does not exist" in capsys.readouterr().err


def test_lines_of_different_settings_are_not_merged(tmp_path, capsys):
    first = write(tmp_path / "first.jsonl", json.dumps(line("KNE", 0, RICH)))
    second = write(tmp_path / "second.jsonl", json.dumps(line("KNE", 1, RICH, fingerprint="other")))
    assert cli.main(["summarize", first, second]) == 1
    assert "KNE on counterfact under different settings" in capsys.readouterr().err


# The table


LINE = {
    "method": "KNE",
    "index": 0,
    "record": "r",
    "fingerprint": "f",
    "data": "test_cf",
    "prompt": "p",
    "target_new": "t",
    "before": "b",
    "after": "a",
    "exact_match": 1.0,
    "whole_answer": 0.0,
    "neighbourhood": 0.9,
    "neighbourhood_free": 0.75,
    "bleed": 0.125,
    "bleed_forced": 0.25,
    "alias_beyond_bleed": -0.125,
    "alias_beyond_bleed_forced": 0.5,
    "denial": 0.4,
    "seconds": 2.0,
    "peak_bytes": 7,
    "perplexity": 30.5,
    "metrics": RICH,
}


def test_every_metric_is_read_from_a_result_line():
    found = {metric.key: metric.value(LINE) for metric in metrics.METRICS}
    assert found == pytest.approx(
        {
            "edit_success": 50.0,
            "exact_match": 100.0,
            "whole_answer": 0.0,
            "neighbourhood": 90.0,
            "neighbourhood_free": 75.0,
            "bleed": 12.5,
            "bleed_forced": 25.0,
            "alias_beyond_bleed": -12.5,
            "alias_beyond_bleed_forced": 50.0,
            "denial": 40.0,
            "rephrase": 100.0,
            "portability": 50.0,
            "locality": 20.0,
            "fluency": 500.0,
            "perplexity": 30.5,
            "seconds_per_edit": 2.0,
            "peak_bytes": 7,
        }
    )
    assert all(metric.value({"metrics": {"post": {}}}) is None for metric in metrics.METRICS)


def test_names_of_metrics_are_unique_and_sections_have_categories():
    for name in ("key", "short", "meaning", "path"):
        assert len({getattr(metric, name) for metric in metrics.METRICS}) == len(metrics.METRICS)
    found = {metric.key: metric.categories(LINE) for metric in metrics.METRICS if metric.by_category}
    assert found == {"portability": {"Reasoning": 75.0, "Alias": 25.0}, "locality": {"Near": 20.0}}
    assert metrics.METRICS[0].categories(LINE) == {}


def test_records_are_averaged_as_the_metric_says():
    lines = [{**LINE, "seconds": seconds, "peak_bytes": peak} for seconds, peak in ((1.0, 5), (2.0, None), (90.0, 7))]
    assert {m.key: m.summarize(lines) for m in metrics.METRICS if not m.quality} == {
        "seconds_per_edit": 2.0,
        "peak_bytes": 7,
    }
