"""Answers before and after an edit: what is asked, and how it is printed."""

from __future__ import annotations

import pytest
import torch
from conftest import make_gpt2

from kne_easyedit import cli
from kne_easyedit.benchmark.before_after import Questions, answers_to
from kne_easyedit.cli.side_by_side import print_questions, print_rows
from kne_easyedit.editing.row_training import measured_answers


def test_columns_are_as_wide_as_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    print_rows([("", "before", "after"), ("one", "word " * 20, "other " * 20)])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 60 for line in lines) and len(lines) > 4
    assert sum(line.count("word") for line in lines) == 20 == sum(line.count("other") for line in lines)


def test_neighbours_that_were_not_wanted_are_not_said_to_be_unknown(tokenizer, capsys):
    model, request = make_gpt2(), {"prompt": "Ada is", "target_new": "Rome"}
    questions = Questions(model, tokenizer, [request], neighbours=0)
    said = questions.ask(model)
    print_questions(questions, said, said, 0)
    assert "neighbours" not in capsys.readouterr().out
    print_questions(questions, said, said, 2)  # converse: they were wanted, and there are none
    assert "no neighbours are known" in capsys.readouterr().out


def test_a_number_of_neighbours_is_not_negative(capsys):
    with pytest.raises(SystemExit):
        cli.main(["edit", "--prompt", "a", "--target", "b", "--neighbours", "-1", "--out", "edit"])
    assert "--neighbours: -1 must be at least 0" in capsys.readouterr().err


def test_the_old_answer_is_given_or_what_the_model_says(tokenizer):
    model = make_gpt2()
    request = {"prompt": "The capital of France is", "target_new": "the Tiber ."}
    (fact,) = Questions(model, tokenizer, [request], neighbours=0).facts
    (said,) = answers_to(model, tokenizer, [request["prompt"]], len(fact.new.answer))
    assert fact.old is not None and fact.old.target == said.strip()
    (fact,) = Questions(model, tokenizer, [{**request, "ground_truth": "Paris"}], neighbours=0).facts
    assert fact.old.target == "Paris"
    found = Questions(model, tokenizer, [{**request, "subject": "France"}], neighbours=3)
    assert len(found.neighbours[0]) == 3 and "France" not in str(found.neighbours)
    said = found.ask(model)
    (measured,) = measured_answers(model, [found.facts[0].new])
    assert said[found.facts[0]].new == pytest.approx(measured.probability, rel=1e-4)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert found.ask(model)[found.facts[0]].new != said[found.facts[0]].new
