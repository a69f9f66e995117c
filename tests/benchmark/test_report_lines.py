"""Of a result line a report keeps what it shows, not the whole line."""

from __future__ import annotations

import gc
import json
import tracemalloc

import pytest

from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.report_line import reduce_metrics
from kne_easyedit.benchmark.result_line import line_head
from kne_easyedit.metrics import METRICS, check_metrics

NEIGHBOURS = 8


def made_up(i: int) -> dict:
    def metrics(x: float) -> dict:
        portability = {"a_acc": [x, x / 3], "b_acc": [[x], []], "c_acc": [], "a_output": [[7] * 20]}
        found = {"rewrite_acc": [x, 0.25], "portability": portability, "locality": {"r_acc": [x] * 4}}
        return found | {"fluency": {"ngram_entropy": x, "texts": ["of no metric"] * 9}}

    def neighbour(j: int) -> dict:
        texts = {"prompt": f"prompt {j}", "subject": f"subject {i} {j}", "kind": "relation", "before": " Paris"}
        return texts | {"after": " Rome", "kept": 1.0, "forced_before": i / 7 + j, "forced_after": i / 9 + j}

    head = line_head(fingerprint="f", settings="s", method="FT", index=i, record=f"r{i}")
    texts = {"data": "recent_test", "seed": 42, "mode": "single", "prompt": "p", "target_new": "Rome", "after": " Rome"}
    its = {"losses": [i / (step + 1) for step in range(20)], "neighbours": [neighbour(j) for j in range(NEIGHBOURS)]}
    return {**head, **texts, **its, "metrics": {"pre": metrics(i / 11), "post": metrics(i / 13)}}


def test_a_line_takes_less_than_half_of_what_it_is_as_json_objects(tmp_path):
    lines = 300
    text = "".join(json.dumps(made_up(i)) + "\n" for i in range(lines))
    (tmp_path / "results.jsonl").write_text(text)

    def size(read) -> float:
        gc.collect()
        tracemalloc.start()
        kept = read()
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(getattr(kept, "lines", kept)) == lines
        return held / lines

    collect([tmp_path])  # imports
    whole = size(lambda: [json.loads(its) for its in text.splitlines()])
    assert size(lambda: collect([tmp_path])) < whole / 2


def test_what_is_kept_is_what_was_there(tmp_path):
    line = made_up(3)
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    (kept,) = collect([tmp_path]).lines
    assert kept["data"] == "recent" and kept.get("nothing", 5) == 5 and kept["seconds"] is None
    assert list(kept["losses"]) == line["losses"] and len(kept["neighbours"]) == NEIGHBOURS
    names = ("prompt", "before", "after", "forced_before")
    assert list(kept["neighbours"]) == [{name: its[name] for name in names} for its in line["neighbours"]]
    assert dict(kept).keys() == set(kept) and kept == {**kept}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_each_metric_has_the_same_value_of_reduced_metrics(metric):
    whole = made_up(5)["metrics"]
    check_metrics(whole)
    for when in ("pre", "post"):
        lines = [{"metrics": {"post": its[when]}} for its in (whole, reduce_metrics(whole))]
        assert metric.value(lines[0]) == metric.value(lines[1])
        assert metric.categories(lines[0]) == metric.categories(lines[1])
