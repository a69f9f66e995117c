"""The sentences and verdicts of studies, from figures made by hand: ties and reversals, too."""

from __future__ import annotations

import re

import pytest
from study_lines import write_points

from kne_easyedit.benchmark.intervals import FEW, Interval
from kne_easyedit.studies.findings import HOLDS, NOT, UNKNOWN, Check, checks, findings, lead, verdict
from kne_easyedit.studies.reading import read_studies

MODULES = {
    "q_proj": "model.layers.{}.self_attn.q_proj",
    "o_proj": "model.layers.{}.self_attn.o_proj",
    "gate_proj": "model.layers.{}.mlp.gate_proj",
    "up_proj": "model.layers.{}.mlp.up_proj",
    "down_proj": "model.layers.{}.mlp.down_proj",
}


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    """Far from a border they decide as more do."""
    monkeypatch.setattr("kne_easyedit.benchmark.intervals.RESAMPLES", 1000)


@pytest.fixture(name="study")
def study_fixture(tmp_path):
    """Points -> the one study that they are of."""

    def read(points, **options):
        (curves,) = read_studies([write_points(tmp_path / "run", points, **options)]).curves
        return curves

    return read


def verdicts(curves) -> list[str]:
    return [check.verdict for check in checks(curves)]


# Which of two points leads


@pytest.mark.parametrize(
    ("key", "values", "says"),
    [
        ("edit_success", (1.2, 0.3, 2.1), "down_proj leads gate_proj in ES by 1.2 [0.3, 2.1]"),
        ("edit_success", (-1.2, -2.1, -0.3), "gate_proj leads down_proj in ES by 1.2 [0.3, 2.1]"),
        ("locality", (0.4, -0.3, 1.1), "down_proj and gate_proj cannot be told apart in LOC: +0.4 [-0.3, +1.1]"),
        ("locality", (0.5, 0.0, 1.1), "down_proj and gate_proj cannot be told apart in LOC: +0.5 [+0.0, +1.1]"),
        ("locality", (0.0, 0.0, 0.0), "down_proj and gate_proj are equal in LOC"),
        ("bleed", (1.2, 0.3, 2.1), "gate_proj leads down_proj in BLEED by 1.2 [0.3, 2.1] (less is better)"),
        ("bleed", (-1.2, -2.1, -0.3), "down_proj leads gate_proj in BLEED by 1.2 [0.3, 2.1] (less is better)"),
    ],
)
def test_who_leads(key, values, says):
    assert lead("down_proj", "gate_proj", key, Interval(*values, FEW)) == says
    few = lead("down_proj", "gate_proj", key, Interval(*values, FEW - 1))
    assert few.startswith("down_proj minus gate_proj in ") and few.endswith("over 19 records too few to tell")
    assert lead("down_proj", "gate_proj", key, None) is None


@pytest.mark.parametrize(
    ("interval", "sign", "border", "expected"),
    [
        ((2.0, 1.0, 3.0, FEW), 1, 0.0, HOLDS),
        ((2.0, 1.0, 3.0, FEW), -1, 0.0, NOT),
        ((-2.0, -3.0, -1.0, FEW), -1, 0.0, HOLDS),
        ((-2.0, -3.0, -1.0, FEW), 1, 0.0, NOT),
        ((0.5, -0.5, 1.0, FEW), 1, 0.0, UNKNOWN),
        ((0.5, 0.0, 1.0, FEW), 1, 0.0, UNKNOWN),
        ((-0.5, -0.9, 0.1, FEW), 1, -1.0, HOLDS),
        ((-2.0, -3.0, -1.1, FEW), 1, -1.0, NOT),
        ((2.0, 1.0, 3.0, FEW - 1), 1, 0.0, UNKNOWN),
        (None, 1, 0.0, UNKNOWN),
    ],
)
def test_a_part_of_a_claim(interval, sign, border, expected):
    check = Check("a minus b", interval and Interval(*interval), sign, border)
    assert check.verdict == expected and expected in check.sentence
    assert ("was not measured" in check.sentence) == (interval is None)
    assert ("19 records are too few" in check.sentence) == (interval is not None and interval[-1] < FEW)


def test_a_claim_holds_if_all_parts_do_and_falls_with_one():
    yes, no, open_ = (Check("", Interval(mean, mean - 1, mean + 1, FEW), 1) for mean in (2.0, -2.0, 0.0))
    assert verdict([yes, yes]) == HOLDS
    assert verdict([yes, open_]) == UNKNOWN
    assert verdict([yes, open_, no]) == NOT
    assert verdict([]) == UNKNOWN


# Where it sits


def module_points(**changes) -> dict:
    best = {"ES": 0.95, "PORT": 0.6, "LOC": 0.60, "FLU": 5.8}
    others = {
        "q_proj": {"ES": 0.8, "PORT": 0.5, "LOC": 0.65, "FLU": 5.9},
        "o_proj": {"ES": 0.8, "PORT": 0.5, "LOC": 0.50, "FLU": 5.7},
        "gate_proj": {"ES": 0.9, "PORT": 0.5, "LOC": 0.66, "FLU": 5.9},
        "up_proj": {"ES": 0.9, "PORT": 0.5, "LOC": 0.67, "FLU": 5.9},
    }
    points = {**others, "down_proj": best}
    return {f"KNE-rows@{name}": {**its, **changes.get(name, {})} for name, its in points.items()}


def test_modules_are_told_apart_and_the_claim_holds(study):
    curves = study(module_points(), modules=MODULES)
    assert verdicts(curves) == [HOLDS] * 6
    assert [cell.value for cell in curves.of("rows")] == list(MODULES), "in the order of a decoder layer"
    of_success, _, of_locality, *_ = findings(curves)
    assert of_success.startswith("ES, same number of rows: down_proj is first with ")
    assert "it leads q_proj by 15.0 [" in of_success and "not surely" not in of_success
    assert of_locality.startswith("LOC, same number of rows: up_proj is first with ")


def test_a_reversal_is_said_and_the_claim_falls(study):
    curves = study(module_points(up_proj={"ES": 0.99, "PORT": 0.7}), modules=MODULES)
    assert verdict(checks(curves)) == NOT
    assert findings(curves)[0].startswith("ES, same number of rows: up_proj is first with ")
    (check,) = (its for its in checks(curves) if its.text.startswith("down_proj minus up_proj"))
    assert check.verdict == NOT and check.interval.high < 0


def test_a_tie_is_no_lead(study):
    same = {"ES": 0.95, "PORT": 0.6, "LOC": 0.6, "FLU": 5.8}
    curves = study(module_points(up_proj=same), modules=MODULES, noise=0)
    assert findings(curves)[0].startswith(
        "ES, same number of rows: up_proj and down_proj are first with 95.0; it leads"
    )
    (check,) = (its for its in checks(curves) if its.text.startswith("down_proj minus up_proj"))
    assert check.verdict == UNKNOWN


def test_roles_decide_not_names(study):
    names = {"fc_out": "transformer.h.{}.mlp.fc_out", "fc_in": "transformer.h.{}.mlp.fc_in"}
    good, poor = {"ES": 0.9, "PORT": 0.5, "LOC": 0.6}, {"ES": 0.5, "PORT": 0.5, "LOC": 0.7}
    curves = study({"KNE-rows@fc_in": poor, "KNE-rows@fc_out": good}, modules=names)
    (overall, locality, fluency) = checks(curves)
    assert overall.text.startswith("fc_out minus fc_in") and overall.verdict == HOLDS
    assert locality.text == "the mean of fc_in minus that of fc_out in LOC" and locality.verdict == HOLDS
    assert fluency.sentence == "the mean of fc_in minus that of fc_out in FLU: was not measured; cannot be told"


def test_without_manifests_roles_are_unknown(study):
    assert set(verdicts(study(module_points()))) == {UNKNOWN}


# How many facts


def facts_points(at_200: float, at_800: float) -> dict:
    values = {"20": 0.5, "200": at_200, "800": at_800}
    points = {f"KNE-facts@{n}": {"ES": its, "PORT": its, "LOC": its} for n, its in values.items()}
    return {**points, "KNE-facts.2@200": points["KNE-facts@200"]}


@pytest.mark.parametrize(
    ("at_200", "at_800", "expected"),
    [(0.8, 0.7, [HOLDS, HOLDS]), (0.8, 0.8, [HOLDS, UNKNOWN]), (0.7, 0.8, [NOT, NOT]), (0.795, 0.8, [HOLDS, NOT])],
)
def test_two_hundred_facts_against_all(study, at_200, at_800, expected):
    curves = study(facts_points(at_200, at_800), noise=0.01)
    assert verdicts(curves) == expected
    text = "\n".join(findings(curves))
    # By hand: log2 of 20, 200 and 800 facts, less their mean, is -2.881, 0.441 and 2.441.
    slope = 100 * (-2.881 * 0.5 + 0.441 * at_200 + 2.441 * at_800) / (2.881**2 + 0.441**2 + 2.441**2)
    (found,) = re.findall(r"with every doubling of the facts, ES changes by (\+\d+\.\d) ", text)
    assert float(found) == pytest.approx(slope, abs=0.15)
    if at_200 == at_800:
        assert "ES: from 200 facts on it cannot be told from that of 800 facts" in text
    else:
        first, second = ("200", "800") if at_200 > at_800 else ("800", "200")
        assert f"{first} facts lead {second} facts in ES by" in text and "from 200 facts on" not in text


def test_the_claim_needs_a_point_beyond_two_hundred(study):
    curves = study({"KNE-facts@20": {"ES": 0.5}, "KNE-facts@200": {"ES": 0.9}})
    assert verdicts(curves) == [UNKNOWN, UNKNOWN]
    (text,) = findings(curves)
    assert text.startswith(("200 facts lead 20 facts in ES by 4", "200 facts lead 20 facts in ES by 39"))


# How many rows


def share_points(success=0.05, locality=-0.05, gain=0.1) -> dict:
    points = {}
    for i, p in enumerate(("0.1", "0.2", "0.4")):
        figures = {"ES": 0.6 + success * i, "PORT": 0.4 + success * i, "LOC": 0.7 + locality * i}
        points[f"KNE-share@{p}"] = figures
        for draw in ("", ".2"):
            points[f"KNE-random{draw}@{p}"] = {name: value - gain for name, value in figures.items()}
    return points


def test_more_rows_and_whether_it_matters_which(study):
    curves = study(share_points())
    assert verdicts(curves) == [HOLDS] * 3
    text = findings(curves)
    assert text[0].startswith("with every doubling of p, ES changes by +5.")
    assert any(its.startswith("localised rows lead random rows in ES by 1") for its in text)
    assert any(its.endswith("(mean over 3 shares, p = 10 % to p = 40 %; told apart at each)") for its in text)


def test_one_share_alone_is_named(study):
    points = {label: its for label, its in share_points().items() if "random" not in label or label.endswith("@0.2")}
    text = [its for its in findings(study(points)) if "random" in its]
    assert text and all(its.endswith(" (p = 20 %)") for its in text)


def test_further_draws_at_one_share_take_no_sentence_away(study):
    points = {label: its for label, its in share_points().items() if "random.2" not in label}
    curves = study({**points, **{f"KNE-random.{draw}@0.2": points["KNE-random@0.2"] for draw in (2, 3)}})
    assert curves.cells["random", "0.2"].draws == 3
    text = [its for its in findings(curves) if "random" in its]
    assert [its.partition(" by ")[0].rpartition(" ")[2] for its in text] == ["ES", "PORT", "LOC"]
    assert all("(mean over 3 shares, p = 10 % to p = 40 %; told apart at each)" in its for its in text)


def test_rows_by_their_weights_alone_are_a_control_too(study):
    points = share_points()
    points |= {
        f"KNE-magnitude@{p}": {name: value - 0.2 for name, value in points[f"KNE-share@{p}"].items()}
        for p in ("0.1", "0.2", "0.4")
    }
    text = findings(study(points))
    assert any(its.startswith("localised rows lead rows by their weights alone in ES by 20") for its in text)
    assert any(its.startswith("localised rows lead random rows in ES by 1") for its in text)


@pytest.mark.parametrize(
    ("gain", "says"), [(-0.1, "random rows lead localised rows in ES by"), (0.0, "cannot be told")]
)
def test_localisation_that_does_not_matter_or_harms(study, gain, says):
    curves = study(share_points(success=-0.05, gain=gain))
    assert verdicts(curves) == [NOT, NOT, HOLDS]
    (text,) = (its for its in findings(curves) if "random" in its and " ES" in its)
    assert says in text


def test_a_point_of_few_records_takes_none_from_the_others(study):
    points = share_points()
    records = {label: 3 if label == "KNE-share@0.4" else 24 for label in points}
    curves = study(points, records=records)
    assert verdicts(curves) == [HOLDS] * 3 and checks(curves)[0].interval.records == 24
    assert any("mean over 2 shares, p = 10 % to p = 20 %" in its for its in findings(curves))


# How many edits


def batch_points(success: list[float], locality: list[float], fluency: list[float]) -> dict:
    sizes = ("1", "10", "100")
    return {
        f"KNE-batch@{n}": {"ES": es, "PORT": es / 2, "LOC": loc, "FLU": flu}
        for n, es, loc, flu in zip(sizes, success, locality, fluency)
    }


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (([1.0, 0.6, 0.5], [0.5, 0.7, 0.6], [5.0, 5.2, 5.4]), HOLDS),
        (([1.0, 0.9, 0.4], [0.5, 0.7, 0.6], [5.0, 5.2, 5.4]), NOT),  # falls more and more
        (([0.9, 0.5, 0.9], [0.5, 0.7, 0.6], [5.0, 5.2, 5.4]), UNKNOWN),  # rises back
        (([0.8, 0.5, 0.95], [0.5, 0.7, 0.6], [5.0, 5.2, 5.4]), NOT),  # and beyond
        (([0.9, 0.5, 0.55], [0.5, 0.7, 0.6], [5.0, 5.2, 5.4]), HOLDS),
        (([1.0, 0.6, 0.5], [0.5, 0.5, 0.5], [5.0, 5.2, 5.4]), UNKNOWN),
        (([1.0, 0.6, 0.5], [0.5, 0.7, 0.6], [5.4, 5.2, 5.0]), NOT),
    ],
)
def test_batches(study, figures, expected):
    curves = study(batch_points(*figures))
    assert verdict(checks(curves)) == expected
    assert findings(curves)[0].startswith("ES changes from 1 an edit to 10 an edit by -")


def test_two_sizes_of_batches_tell_no_shape(study):
    points = batch_points([1.0, 0.6, 0.5], [0.5, 0.7, 0.6], [5.0, 5.2, 5.4])
    del points["KNE-batch@10"]
    curves = study(points)
    assert verdicts(curves) == [UNKNOWN]
    assert findings(curves)[0].startswith("ES changes from 1 an edit to 100 an edit by -")
