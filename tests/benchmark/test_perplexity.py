"""The perplexity of a text: against a literal reference, token by token, and what cannot have one."""

from __future__ import annotations

import json
import math

import pytest
import torch
from accelerate import cpu_offload
from conftest import make_llama, make_tokenizer
from pytest import approx
from runs import counting, job_fixture, lines_of, quick_fixture, record  # noqa: F401  (fixtures)

from kne_easyedit.benchmark import run
from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.general import Examination
from kne_easyedit.benchmark.markdown_report import report_text
from kne_easyedit.benchmark.perplexity import _windows, perplexity, read_text
from kne_easyedit.benchmark.summary import general_summary

TEXT = "The capital of France is Paris . The river that flows through Rome is the Tiber . Ada was spoken to in Lima ."


@torch.no_grad()
def slow(model, ids: list[int], window: int) -> float:
    """Every token by a pass of its own over its context: all before it, or what its window holds."""
    total = 0.0
    for i in range(1, len(ids)):
        end = window
        while i >= end:
            end += window // 2
        begin = max(0, min(end, len(ids)) - window)
        logits = model(input_ids=torch.tensor([ids[begin:i]])).logits[0, -1].double()
        total -= logits.log_softmax(-1)[ids[i]].item()
    return math.exp(total / (len(ids) - 1))


@pytest.mark.parametrize("window", [6, 7, 1024])
def test_it_is_that_of_the_literal_reference(window):
    model, tokenizer = make_llama(), make_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > 20
    expected = slow(model, ids, min(window, 64))
    assert perplexity(model, tokenizer, TEXT, window) == approx(expected, rel=1e-5)
    if window < len(ids):
        assert perplexity(model, tokenizer, TEXT) != approx(expected, rel=1e-5), "less context, other figures"


def test_an_offloaded_model_has_that_of_the_whole_one():
    tokenizer, expected = make_tokenizer(), perplexity(make_llama(), make_tokenizer(), TEXT)
    assert perplexity(cpu_offload(make_llama()), tokenizer, TEXT) == expected


@pytest.mark.parametrize("size", [2, 3, 8, 9])
@pytest.mark.parametrize("tokens", [2, 3, 8, 9, 40, 41])
def test_every_token_is_scored_once_with_half_a_window_before_it(tokens, size):
    windows = list(_windows(tokens, size))
    assert [i for _, first, end in windows for i in range(first, end)] == list(range(1, tokens))
    assert all(end - begin <= size and first - begin >= min(first, size // 2) for begin, first, end in windows)


def test_a_model_that_gives_no_numbers_has_none():
    model, tokenizer = make_llama(), make_tokenizer()
    model.lm_head.weight.data[:] = float("nan")
    assert perplexity(model, tokenizer, TEXT) is None


def test_a_text_of_one_token_and_files_that_are_no_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="perplexity: the text has 1 tokens; at least 2"):
        perplexity(make_llama(), make_tokenizer(), "Rome")
    for name, content, says in (("a", b"\xff\xfe\xff", "no UTF-8 text"), ("b", b" \n", "is empty")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            read_text(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"perplexity: .*nowhere\.txt is no file"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="ability_limit: 3 belongs to tasks, and none is named"):
        Examination(limit=3).require()


@pytest.mark.parametrize("mode", [pytest.param("single", marks=pytest.mark.slow), "batch", "sequential"])
def test_a_run_has_it_before_and_after(mode, job, quick, tmp_path, monkeypatch):
    job.mode, job.neighbours, job.batch_size = mode, 0, 2 if mode == "batch" else 1
    job.perplexity = tmp_path / "text.txt"
    job.perplexity.write_text(TEXT)
    expected = perplexity(job.model, job.tokenizer, TEXT)
    own = run(job)["methods"]["KNE"]
    lines = lines_of(job)
    assert {line["perplexity_before"] for line in lines} == {expected} == {own["perplexity_before"]}
    if mode == "sequential":
        again = [json.loads(line) for line in (job.folder / "retention.jsonl").read_text().splitlines()]
        assert [line["perplexity"] for line in again] == [own["perplexity"]] * 2
        assert {line["perplexity"] for line in lines} == {None}
        assert own["retention"][-1]["perplexity"] == own["perplexity"]
    else:
        after = [line["perplexity"] for line in lines]
        assert own["perplexity"] == approx(sum(after) / 2) and len(set(after)) == (1 if mode == "batch" else 2)
    assert own["perplexity"] != approx(expected, rel=1e-5), "an edit of a tiny model changes it"
    found = collect([job.folder])
    assert {line["perplexity"] for line in found.lines} >= {own["perplexity"]} or mode == "single"
    assert f"| PPL | {expected:.2f} | - | **{own['perplexity']:.2f}**" in report_text(found, "Report", {})
    # The same text under another name is the same, another text is not.
    edited = counting(monkeypatch)
    job.perplexity = job.perplexity.rename(tmp_path / "moved.txt")
    run(job)
    assert not edited
    job.perplexity.write_text(TEXT + " The Tiber .")
    run(job)
    assert len(edited) == 2


def test_a_run_that_does_not_ask_has_none(job, quick):
    job.requests = job.requests[:1]
    run(job)
    fields = ("perplexity_before", "perplexity", "ability_before", "ability")
    assert [lines_of(job)[0][name] for name in fields] == [None] * 4
    assert "general" not in json.loads((job.folder / "manifest.json").read_text())
    assert not list(job.folder.rglob("general-*.json"))


def test_the_summary_says_which_edits_have_broken_the_model():
    """A mean over those that are left would make the worst method the best."""
    lines = [{"perplexity": value, "perplexity_before": 13.5} for value in (14.0, None, 16.0, None)]
    found = general_summary(lines, [])
    assert (found["perplexity_before"], found["perplexity"], found["perplexity_not_finite"]) == (13.5, None, 2)
    whole = general_summary([lines[0], lines[2]], [])
    assert (whole["perplexity"], whole["perplexity_not_finite"]) == (15.0, 0)
    at_end = [{"after": after, **line} for after, line in ((2, lines[0]), (4, lines[1]))]
    assert general_summary(lines[:1], at_end)["perplexity"] is None  # of a sequence its end counts
    assert general_summary([{}], [])["perplexity_not_finite"] == 0  # nobody asked
