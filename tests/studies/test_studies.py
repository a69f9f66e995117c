"""The paper's studies as values: labels, points and what cannot be filled, from a ground made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import LLAMA_DOWN, make_gpt2, make_llama

from kne_easyedit.benchmark.config import job_folder
from kne_easyedit.benchmark.labels import is_kne
from kne_easyedit.localization.selection import SHUFFLED, Selection
from kne_easyedit.models.targets import LinearLayer, find_linear
from kne_easyedit.studies.definitions import STUDIES, THIRDS, Place, place_of
from kne_easyedit.studies.points import Ground, module_names, plan_study

ROOT = Path(__file__).parents[2]
GROUND = Ground(find_linear(make_llama()), [LLAMA_DOWN], [], 0.1, "layer", True, range(1, 101), 40)
BASE = {
    "seed": 42,
    "shard": "0/1",
    "out": "out",
    "model": {"file": "tiny", "settings": {}},
    "data": {
        "name": "d",
        "file": "d.json",
        "offset": 0,
        "records": 40,
        "localization": {"file": "f", "offset": 1, "size": 9},
    },
    "method": {"label": "KNE", "hparams": "KNE", "settings": {"lr": 0.1}},
    "evaluation": {"mode": "single", "batch_size": 1, "retention_every": 10},
}


def labels(plan) -> list[str]:
    return [point.place.label for point in plan.points]


@pytest.mark.parametrize(
    "label",
    [
        "KNE-rows@down_proj",
        "KNE-tuned-facts.2@200",
        "a-b-random.11@0.25",
        "KNE-depth@first third",
        "KNE-rows@mlp.c_proj",
    ],
)
def test_a_label_says_what_it_is_of(label):
    place = place_of(label)
    assert place is not None and place.label == label and place.series in place.study.series
    assert is_kne(label) == label.startswith("KNE")


@pytest.mark.parametrize(
    "label", ["KNE", "FT@25", "KNE-rows", "KNE-rowsdown@2", "rows@2", "KNE-facts.0@2", "KNE-facts.x@2"]
)
def test_other_labels_are_of_no_study(label):
    assert place_of(label) is None


def test_a_draw_is_named_only_if_there_is_another():
    assert Place("KNE", "facts", 1, "20").label == "KNE-facts@20"
    assert Place("KNE", "facts", 2, "20").label == "KNE-facts.2@20"


@pytest.mark.parametrize("name", STUDIES)
def test_every_job_has_a_folder_of_its_own_and_leaves_the_configuration_as_it_is(name):
    before = json.dumps(BASE)
    plan = plan_study(name, GROUND, draws=2 if name in ("facts", "share") else None)
    jobs = [point.configured(BASE) for point in plan.points]
    assert json.dumps(BASE) == before
    assert len({job_folder(job) for job in jobs}) == len(jobs) > 1
    assert all(job["method"]["settings"]["lr"] == 0.1 for job in jobs)
    assert [plan.point(label) for label in labels(plan)] == list(plan.points)
    with pytest.raises(ValueError, match=r"study\.point: 'KNE-nothing@1' must be one of"):
        plan.point("KNE-nothing@1")


# Where it sits


def rows_of(point) -> int:
    """How many rows the point's ensemble has, by the rule that chooses them."""
    (template,) = point.settings["target_modules"]
    (its,) = (each for each in GROUND.linear if each.template == template)
    return Selection(point.settings["p"]).budget(its.outputs * len(point.settings["layers"] or its.layers))


def test_modules_have_as_many_rows_or_as_many_parameters():
    """The ensemble of the settings: a tenth of 4 layers of 24 neurons with 40 inputs each."""
    plan = plan_study("location", GROUND)
    by_label = {point.place.label: point for point in plan.points}
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [label for label in by_label if "-rows@" in label] == [f"KNE-rows@{name}" for name in names]
    assert {rows_of(by_label[f"KNE-rows@{name}"]) for name in names} == {9}
    for name in names:
        wanted = 9 if name == "down_proj" else 15  # 9 rows of 40 are 360 parameters, 15 rows of 24, too
        assert rows_of(by_label[f"KNE-parameters@{name}"]) == wanted
    thirds = [by_label[f"KNE-depth@{third}"] for third in THIRDS]
    assert [point.settings["layers"] for point in thirds] == [[0], [1], [2, 3]]
    assert {rows_of(point) for point in thirds} == {9}
    assert {point.settings["target_modules"][0] for point in thirds} == {LLAMA_DOWN}


def test_modules_bear_the_models_own_names():
    """GPT-2 has two c_proj; nothing here knows Llama's names."""
    assert list(module_names(find_linear(make_gpt2())).values()) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


def test_the_layers_of_the_settings_stay():
    plan = plan_study("location", replace(GROUND, layers=[1, 2, 3], p=0.125))
    assert {rows_of(point) for point in plan.points if point.place.series != "parameters"} == {9}
    assert [point.settings["layers"] for point in plan.points[-3:]] == [[1], [2], [3]]
    assert all(set(point.settings["layers"]) <= {1, 2, 3} for point in plan.points)


def test_a_module_that_is_too_narrow_is_left_out_and_said_so():
    plan = plan_study("location", replace(GROUND, p=0.5))
    assert "KNE-rows@k_proj" in labels(plan) and "KNE-parameters@k_proj" not in labels(plan)
    (reason,) = (its for its in plan.left_out if its.startswith("k_proj (same number of parameters)"))
    assert "80 rows are needed, 48 are there; a smaller share needs fewer (--set p=...)" in reason
    with pytest.raises(ValueError, match=r"study location: k_proj .*80 rows are needed, 48 are there"):
        plan_study("location", replace(GROUND, p=0.5), values=["k_proj"])
    with pytest.raises(ValueError, match=r"values: 'down' must be one of .*did you mean 'down_proj'"):
        plan_study("location", GROUND, values=["down"])


def test_a_module_that_is_in_some_layers_only():
    linear = [LinearLayer("m.{}.a", "MLP output", (0, 1, 2), 4, 10), LinearLayer("m.{}.b", None, (1,), 4, 10)]
    plan = plan_study("location", replace(GROUND, linear=linear, modules=["m.{}.a"], p=0.2))
    by_label = {point.place.label: point.settings for point in plan.points}
    assert by_label["KNE-rows@b"] == {"target_modules": ["m.{}.b"], "layers": [1], "p": 0.6}


def test_a_module_that_cannot_be_edited_is_left_out():
    ground = replace(GROUND, refused=["m.{}.x: has different widths over the layers: [4, 8]"])
    assert plan_study("location", ground).left_out == tuple(ground.refused)
    assert plan_study("location", ground, values=["down_proj"]).left_out == ()


# How many facts


def test_draws_share_no_fact_and_a_larger_one_holds_a_smaller():
    plan = plan_study("facts", GROUND, values=["1", "20", "50", "5"], draws=3)
    spans: dict[str, dict[int, range]] = {}
    for point in plan.points:
        start, size = (point.settings[f"localization_{name}"] for name in ("offset", "size"))
        spans.setdefault(point.place.value, {})[point.place.draw] = range(start, start + size)
        assert point.localization == {"offset": 1, "size": 100}, "the same facts are kept out of all points' questions"
    assert list(spans) == ["1", "5", "20", "50"] and [len(its) for its in spans.values()] == [3, 3, 3, 1]
    for own in spans.values():
        facts = [fact for its in own.values() for fact in its]
        assert len(set(facts)) == len(facts) and set(facts) <= set(GROUND.facts)
    assert set(spans["5"][2]) < set(spans["20"][2]) and not set(spans["5"][2]) & set(spans["20"][1])


def test_more_draws_leave_the_first_ones_as_they_are():
    """Or the same label would stand for other facts, and no report would take both."""
    few, many = (
        {
            each.place.label: each.settings
            for each in plan_study("facts", GROUND, values=["1", "10", "30"], draws=n).points
        }
        for n in (2, 9)
    )
    assert few.items() < many.items()
    assert [label for label in many if label.endswith("@10")] == [
        "KNE-facts@10",
        *(f"KNE-facts.{draw}@10" for draw in range(2, 10)),
    ]
    assert [label for label in many if label.endswith("@30")] == ["KNE-facts@30", "KNE-facts.2@30", "KNE-facts.3@30"]


def test_fewer_facts_than_are_asked_for():
    plan = plan_study("facts", GROUND)
    assert [point.place.value for point in plan.points][-1] == "100"
    assert [reason.partition(":")[0] for reason in plan.left_out] == ["200 facts", "400 facts", "800 facts"]
    with pytest.raises(ValueError, match=r"101 facts: .* has 100 that are not edited; give a larger file"):
        plan_study("facts", GROUND, values=["10", "101"])
    with pytest.raises(ValueError, match="1 facts: the data to localise on has 0"):
        plan_study("facts", replace(GROUND, facts=range(3, 3)))


# How many rows


@pytest.mark.parametrize("scale", SHUFFLED)
def test_each_share_has_random_rows_of_the_same_scale_beside_it(scale):
    plan = plan_study("share", replace(GROUND, scale=scale), values=["0.5", "0.1"], draws=3)
    assert labels(plan) == [
        *("KNE-share@0.1", "KNE-share@0.5", "KNE-random@0.1", "KNE-random.2@0.1", "KNE-random.3@0.1"),
        *("KNE-random@0.5", "KNE-random.2@0.5", "KNE-random.3@0.5", "KNE-step@0.1", "KNE-step@0.5"),
        *("KNE-magnitude@0.1", "KNE-magnitude@0.5"),
    ]
    settings = {point.place.label: point.settings for point in plan.points}
    assert "score_scale" not in settings["KNE-share@0.5"] and settings["KNE-share@0.5"] == {"p": 0.5}
    assert [settings[f"KNE-random{i}@0.5"]["score_scale"] for i in ("", ".2", ".3")] == list(SHUFFLED[scale][:3])
    assert settings["KNE-magnitude@0.5"] == {"p": 0.5, "ensemble": "magnitude"}
    assert settings["KNE-step@0.1"] == {"p": 0.1, "attribution_steps": 1, "quadrature": "riemann"}


def test_a_control_has_no_control_of_its_own():
    with pytest.raises(ValueError, match="score_scale: 'shuffled' is a control itself"):
        plan_study("share", replace(GROUND, scale="shuffled"))
    with pytest.raises(ValueError, match="draws: 6 of random rows, at most 5"):
        plan_study("share", GROUND, draws=6)


# How many edits


def test_batches_are_full_and_sequences_are_asked_at_their_end():
    plan = plan_study("batch", replace(GROUND, records=45), values=["10", "1"], sequences=["20"])
    jobs = {point.place.label: point.configured(BASE) for point in plan.points}
    assert list(jobs) == ["KNE-batch@1", "KNE-batch@10", "KNE-sequence@20"]
    assert [job["data"]["records"] for job in jobs.values()] == [45, 40, 20]
    assert jobs["KNE-batch@10"]["evaluation"] == {"mode": "batch", "batch_size": 10, "retention_every": 10}
    assert jobs["KNE-sequence@20"]["evaluation"] == {"mode": "sequential", "batch_size": 1, "retention_every": 20}


def test_fewer_records_than_a_batch_needs():
    plan = plan_study("batch", GROUND)
    assert labels(plan) == [*(f"KNE-batch@{n}" for n in (1, 2, 5, 10, 20)), "KNE-sequence@10"]
    assert [its.partition(":")[0] for its in plan.left_out] == [
        "50 facts in one edit",
        "100 facts in one edit",
        "100 edits one after the other",
        "500 edits one after the other",
    ]
    for options in ({"values": ["50"]}, {"sequences": ["50"]}):
        with pytest.raises(ValueError, match=r"50 .*: there are 40 records; give more \(--records\)"):
            plan_study("batch", GROUND, **options)


def test_a_number_that_was_asked_for_in_one_series_asks_for_nothing_in_the_other():
    plan = plan_study("batch", GROUND, sequences=["10"])
    assert labels(plan) == [*(f"KNE-batch@{n}" for n in (1, 2, 5, 10, 20)), "KNE-sequence@10"]
    assert [its.partition(":")[0] for its in plan.left_out] == ["50 facts in one edit", "100 facts in one edit"]
    plan = plan_study("batch", GROUND, values=["10"], series=["batch", "sequence"])
    assert labels(plan) == ["KNE-batch@10", "KNE-sequence@10"] and len(plan.left_out) == 2


# Some series of a study


@pytest.mark.parametrize("name", STUDIES)
def test_a_series_alone_has_the_points_that_it_has_among_all(name):
    whole = plan_study(name, GROUND).points
    for series in STUDIES[name].series:
        alone = plan_study(name, GROUND, series=[series]).points
        assert alone and list(alone) == [point for point in whole if point.place.series == series]
    both = list(STUDIES[name].series)[:2]
    assert {point.place.series for point in plan_study(name, GROUND, series=both[::-1]).points} == {*both}


def test_sequences_without_batches_need_no_number():
    assert labels(plan_study("batch", GROUND, series=["sequence"])) == ["KNE-sequence@10"]
    assert labels(plan_study("batch", GROUND, values=["5"], series=["batch"])) == ["KNE-batch@5"]


@pytest.mark.parametrize(
    ("study", "options", "says"),
    [
        ("share", {"series": ["randoms"]}, "series: 'randoms' must be one of .*did you mean 'random'"),
        ("share", {"series": ["rows"]}, "series: 'rows' must be one of"),
        ("share", {"series": []}, "series: an empty list; null, or some of share, random"),
        (
            "location",
            {"series": ["depth"], "values": ["down_proj"]},
            "values: 'down_proj' must be one of .*'first third'",
        ),
        ("location", {"series": ["rows"], "values": ["first third"]}, "values: 'first third' must be one of"),
        ("batch", {"series": ["sequence"], "values": ["5"]}, "values: 5; they belong to the series batch"),
        ("batch", {"series": ["batch"], "sequences": ["5"]}, "sequences: 5; they belong to the series sequence"),
        ("share", {"sequences": ["5"]}, "sequences: 5; they belong to the study batch, not to share: leave them out"),
        ("batch", {"draws": 2}, "draws: 2; they belong to the studies facts and share, not to batch"),
    ],
)
def test_a_series_that_leaves_nothing_to_plan_is_named(study, options, says):
    with pytest.raises(ValueError, match=says):
        plan_study(study, GROUND, **options)


# Bad input


@pytest.mark.parametrize(
    ("study", "values", "says"),
    [
        ("facts", ["0"], "values: '0' is not right here; expected whole numbers of facts"),
        ("facts", ["2.5"], "values: '2.5' is not right here"),
        ("share", ["2"], r"values: '2' is not right here; expected shares of the rows, in \(0, 1\]"),
        ("share", ["nan"], "values: 'nan' is not right here"),
        ("share", ["4%"], "values: '4%' is not right here"),
        ("batch", ["-1"], "values: '-1' is not right here"),
        ("locations", None, "study: 'locations' must be one of .*did you mean 'location'"),
    ],
)
def test_odd_values_are_named(study, values, says):
    with pytest.raises(ValueError, match=says):
        plan_study(study, GROUND, values=values)


def test_settings_that_do_not_localise_are_refused_where_the_study_localises():
    fixed = replace(GROUND, localised=False)
    for study in ("location", "facts", "share"):
        with pytest.raises(ValueError, match=f"study {study}: the settings do not localise on a file of facts"):
            plan_study(study, fixed)
    assert plan_study("batch", fixed).points
    with pytest.raises(ValueError, match=r"target_modules: 'm\.{}\.x' is no linear layer of this model; it has mod"):
        plan_study("location", replace(GROUND, modules=["m.{}.x"]))
    with pytest.raises(ValueError, match="draws: 0 must be at least 1"):
        plan_study("facts", GROUND, draws=0)


def test_the_shipped_files_name_the_studies():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "hparams/study").glob("*.yaml")}
    assert set(files) == set(STUDIES)
    for name, content in files.items():
        assert content["study"]["name"] == name
        assert content["hydra"]["sweeper"]["params"] == {"study.point": "${study_points:}"}
