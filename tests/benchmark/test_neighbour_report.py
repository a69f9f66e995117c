"""Neighbours in a report: figures, pictures, answers as harmless text; nothing of them where no line has them."""

from __future__ import annotations

import json

import pytest
from made_results import MANIFEST, line, write

from kne_easyedit import cli
from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.console import _lines, _print_answers, _print_neighbours
from kne_easyedit.benchmark.markdown_report import report_text
from kne_easyedit.benchmark.publish import publish
from kne_easyedit.benchmark.result_line import parse_result
from kne_easyedit.benchmark.tables import figures

PROMPTS = [f"The capital of {subject} is" for subject in ("Spain", "Peru", "<b>Italy</b>", "Ada", "Marie")]


def with_neighbours(method: str, index: int, success: float, bleeding: int, **changes) -> dict:
    """``bleeding`` of the five neighbours give the new answer."""
    neighbours = [
        {
            "prompt": prompt,
            "subject": "x",
            "kind": "relation",
            "before": " Madrid | *x*. And more",
            "after": " Rome.\nAnd <i>so</i> on" if i < bleeding else " Madrid | *x*. And",
            "kept": float(i >= bleeding),
            "forced_before": 0.25,
            "forced_after": float(i < bleeding),
        }
        for i, prompt in enumerate(PROMPTS)
    ]
    share = bleeding / len(PROMPTS)
    return line(
        method,
        index,
        success,
        neighbours=neighbours,
        aliases=[{"prompt": "The capital of Gaul is", "before": " Paris", "after": " Rome"}],
        probes=len(PROMPTS),
        neighbourhood=1 - share,
        neighbourhood_free=1 - share,
        bleed=share,
        bleed_forced=share,
        alias_beyond_bleed=1 - share,
        alias_beyond_bleed_forced=0.25 - share,
        answer_before="Paris.",
        answer_after="Rome.",
        whole_answer=1.0,
        denial_before=0.5,
        denial=0.25,
        **changes,
    )


LINES = [
    *(with_neighbours("KNE", i, 1.0, i % 2) for i in range(6)),
    *(with_neighbours("FT", i, 1.0, 3 + i % 3) for i in range(6)),
]


@pytest.fixture(name="made")
def made_fixture(tmp_path):
    write(tmp_path / "results.jsonl", LINES)
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, "localization": {}, "second_moments": {}}))
    return tmp_path


def test_a_report_has_means_intervals_and_differences_of_neighbours(made):
    found = figures(collect([made]))["counterfact"]
    assert (found["KNE"]["bleed"], found["FT"]["bleed"]) == pytest.approx((10, 80))
    interval = found["KNE"]["intervals"]["bleed"]
    assert interval["low"] < 10 < interval["high"] and interval["records"] == 6
    assert found["FT"]["lead_of"]["KNE"]["neighbourhood"]["mean"] == pytest.approx(70)
    assert found["FT"]["lead_of"]["KNE"]["alias_beyond_bleed"]["mean"] == pytest.approx(70)
    before = found["no edit"]
    assert (before["bleed_forced"], before["denial"], before["whole_answer"]) == (25, 50, 0)
    assert before["bleed"] is None and before["neighbourhood"] is None  # they compare with it
    text = report_text(collect([made]), "title", {})
    assert "| BLEED | - | - | <u>80.00</u> | **10.00** |" in text  # less is better
    assert "**PORT-B**, alias beyond bleed: share of prompts with an alias" in text


def test_answers_of_neighbours_are_shown_as_text(made):
    page = publish(collect([made]), made / "report")
    text, html = page.with_suffix(".md").read_text(), page.read_text()
    section = text.partition("## Neighbours before and after")[2].partition("\n## ")[0]
    assert "5 a record" in section
    rows = [row for row in section.splitlines() if row.startswith("|")]
    assert len(rows) == 2 + 3 * 4  # three records, four neighbours of each
    head = "| counterfact | The capital \\| of &lt;b&gt;France&lt;/b&gt; is → Rome | The capital of Spain is "
    assert rows[2] == f"{head}| Madrid \\| \\*x\\*. | **Rome.** | Madrid \\| \\*x\\*. |"
    assert "&lt;b&gt;Italy&lt;/b&gt;" in html and "<b>Italy" not in html and "<i>so" not in html
    for name in ("neighbourhood.png", "neighbourhood-intervals.png", "intervals.png"):
        assert (made / "report" / name).stat().st_size > 5000 and f"]({name})" in text


def test_without_neighbours_nothing_of_them_is_there(tmp_path):
    write(tmp_path / "results.jsonl", [line("KNE", i, 1.0) for i in range(3)])
    text = publish(collect([tmp_path]), tmp_path / "report").with_suffix(".md").read_text()
    assert "eighbour" not in text and "BLEED" not in text and "WHOLE" not in text
    assert not list((tmp_path / "report").glob("neighbour*"))


def test_methods_with_other_neighbours_stand_beside_each_other(tmp_path):
    """They may be localised on other facts."""
    other = with_neighbours("FT", 0, 1.0, 0)
    other |= {"neighbours": other["neighbours"][1:], "probes": 4}
    write(tmp_path / "results.jsonl", [with_neighbours("KNE", 0, 1.0, 0), other])
    text = report_text(collect([tmp_path]), "title", {})
    assert "4 to 5 a record" in text
    row = next(row for row in text.splitlines() if "| The capital of Peru is |" in row)
    assert row.count("Madrid") == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": "all"}, r"neighbours: 'all' is not a list"),
        ({"neighbours": ["x"]}, r"neighbours\[0\]: 'x' is not a mapping"),
        ({"aliases": [{"prompt": "p", "before": 1, "after": ""}]}, r"aliases\[0\]\.before: 1 is not a text"),
        ({"bleed": "much"}, "bleed: 'much' is not a finite number"),
    ],
)
def test_neighbours_of_others_are_checked(changes, message):
    entry = {**with_neighbours("KNE", 0, 1.0, 1), **changes}
    with pytest.raises(ValueError, match=message):
        parse_result(entry)


def test_the_command_says_what_it_has_asked(made, capsys):
    assert cli.main(["summarize", str(made / "results.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "| bleed |" in shown and " 80.00 |" in shown


def test_what_a_run_prints_has_no_effect_on_a_terminal(made, capsys):
    """Prompts and answers come from files and models."""
    escape = "\x1b[31m"
    entry = with_neighbours(
        "KNE", 0, 1.0, 1, prompt=f"The {escape}capital is", target_new=f"Rome{escape}", after=escape
    )
    for its in entry["neighbours"]:
        its |= {"prompt": its["prompt"] + escape, "before": f"a{escape}b", "after": f"c{escape}d"}
    write(made / "results.jsonl", [entry])
    _print_neighbours(_lines(made), {"methods": {"KNE": {}}}, None)
    _print_answers(_lines(made), {"methods": {"KNE": {}}}, 3)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "The [31mcapital is" in shown and "a [31mb" in shown


def test_a_run_prints_the_neighbours_of_one_record(made, capsys):
    """The first that has some, or the one that is asked for."""
    second = with_neighbours("KNE", 1, 1.0, 1, prompt="The capital of Chad is")
    write(made / "results.jsonl", [line("KNE", 7, 1.0), with_neighbours("KNE", 0, 1.0, 0), second])
    lines = _lines(made)
    for prompt, shown, bled in (
        (None, "The capital | of <b>France</b> is", 0),
        ("The capital of Chad is", "The capital of Chad is", 1),
        ("The capital of Mali is", "The capital | of <b>France</b> is", 0),
    ):
        _print_neighbours(lines, {"methods": {"KNE": {}}}, prompt)
        printed = capsys.readouterr().out
        assert f"before and after the edit  {shown}  ->  Rome" in printed
        assert printed.count("    before   Madrid") == 5 and printed.count("    KNE      Rome.\n") == bled
    _print_neighbours([parse_result(line("KNE", 0, 1.0))], {"methods": {"KNE": {}}}, None)
    assert capsys.readouterr().out == ""
