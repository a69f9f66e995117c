"""Values from result lines: exact match, and the means over records."""

from __future__ import annotations

import pytest
from pytest import approx

from kne_easyedit.benchmark import summarize
from kne_easyedit.benchmark.answers import begins_with, one_line


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        (" Rome, of course", "Rome", True),
        ("rome", "Rome", True),
        (" Romeo", "Rome", False),
        ("The answer is Rome", "Rome", False),
        (" New\nYork City", "New York", True),
        ("", "Rome", False),
    ],
)
def test_exact_match_is_about_the_beginning_of_a_free_answer(answer, target, right):
    assert begins_with(answer, target) is right


def test_summary_averages_as_easyedits_script_does():
    """A record: mean over categories of the mean over prompts; what is missing is left out."""

    def line(post, seconds=1.0):
        return {"metrics": {"post": post}, "seconds": seconds}

    figures = summarize(
        [
            line(
                {
                    "rewrite_acc": [1.0],
                    "portability": {"A_acc": [1.0, 0.0], "B_acc": [0.0]},
                    "locality": {"L_acc": [1.0], "L_output": [[3]]},
                    "fluency": {"ngram_entropy": 5.0},
                }
            ),
            line(
                {
                    "rewrite_acc": [0.5],
                    "portability": {},
                    "locality": {"L_acc": [0.0], "M_acc": [0.5]},
                    "fluency": {"ngram_entropy": 6.0},
                },
                3.0,
            ),
            line({}, 10.0),
        ]
    )
    assert figures["rephrase"] is None and figures["exact_match"] is None
    wanted = {
        "edit_success": 75,
        "portability": 25,
        "locality": 62.5,
        "fluency": 550,
        "seconds_per_edit": 3,
        "records": 3,
    }
    assert {name: figures[name] for name in wanted} == approx(wanted)
    assert summarize([line({"rewrite_acc": [1.0], "portability": {}, "locality": {}})])["portability"] is None


def test_an_answer_on_the_terminal_is_one_line():
    assert one_line(" one\u2028two\n three ") == "one two three"
    assert one_line("x" * 99) == "x" * 70
    assert one_line(" \n") == "(ends at once)"
