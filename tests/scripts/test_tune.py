"""scripts/tune.py: the rule on figures made by hand, the shipped grids, and a whole tuning of a tiny model."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import make_llama, make_tokenizer

from kne_easyedit import bridge
from kne_easyedit.bridge import MethodEditor

ROOT = Path(__file__).parents[2]
PATH = ROOT / "scripts" / "tune.py"
spec = importlib.util.spec_from_file_location("tune", PATH)
tune = importlib.util.module_from_spec(spec)
sys.modules["tune"] = tune  # dataclasses look their module up
spec.loader.exec_module(tune)

RULE = {"reach": {"edit_success": 99}, "mean": ["exact_match", "portability", "locality"]}


def made(name: str, *figures: float, **more: float):
    keys = ("edit_success", "exact_match", "portability", "locality")
    return tune.Candidate({"name": name}, {**dict(zip(keys, figures)), **more})


def chosen(*candidates, rule=RULE) -> str:
    return tune.choose(candidates, rule).settings["name"]


def test_success_comes_first_then_the_mean():
    far, good, better = made("far", 98.9, 100, 100, 100), made("good", 99, 50, 50, 50), made("better", 100, 50, 50, 53)
    assert chosen(far, good, better) == "better"
    assert chosen(far, good) == "good"
    assert chosen(made("low", 60, 90, 90, 90), made("high", 84, 10, 10, 10)) == "high"
    assert chosen(made("first", 84, 10, 10, 10), made("second", 84, 10, 10, 10)) == "first"
    assert chosen(made("less", 84, 10, 10, 10), made("more", 84, 10, 10, 11)) == "more"


def test_a_metric_that_is_better_if_it_is_lower_counts_the_other_way(monkeypatch):
    bleed = tune.Metric("bleed", "BLEED", "a meaning", "percent", "down", ("bleed",))
    monkeypatch.setitem(tune._BY_KEY, "bleed", bleed)
    rule = {**RULE, "mean": [*RULE["mean"], "bleed"]}
    wide, narrow = made("wide", 100, 60, 60, 60, bleed=90.0), made("narrow", 100, 50, 50, 50, bleed=5.0)
    assert chosen(wide, narrow, rule=rule) == "narrow"
    assert tune.score(narrow, tune.counted([wide, narrow], rule)) == pytest.approx((150 + 95) / 4)
    assert chosen(wide, made("narrow", 100, 50, 50, 50), rule=rule) == "wide", "not measured of all: left out of all"


def test_settings_under_which_a_record_failed_are_not_chosen():
    """Their means are of the records that were left, the easier ones."""
    whole, part = (replace(made(name, 100, n, n, n), records=r) for name, n, r in (("whole", 50, 4), ("part", 90, 3)))
    assert chosen(part, whole) == "whole"
    assert "part (1 of 4 records failed)" in tune.table([part, whole], whole, RULE).replace("name=", "")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": {"ft": [{}, {"lr": 1.0}]}}, "methods.ft has 2 settings, the budget is 3"),
        ({"methods": {"ft": [{"lr": 2.0}, {}, {"lr": 1.0}]}}, "methods.ft must begin with {}"),
        ({"methods": {"ft": [{}, {"lr": 1.0}, {"lr": 1.0}]}}, "methods.ft has one of its settings twice"),
        ({"choice": {"reach": {"success": 99}, "mean": []}}, "choice.reach: 'success' is no metric; there are edit_"),
        (
            {"choice": {**RULE, "mean": ["locality", "bleeding"]}},
            "choice.mean: 'bleeding' is no metric; there are edit_",
        ),
    ],
)
def test_an_unfair_plan_is_refused(change, says, tmp_path):
    file = tmp_path / "plan.yaml"
    fair = {"budget": 3, "choice": RULE, "methods": {"ft": [{}, {"lr": 1.0}, {"lr": 2.0}]}}
    file.write_text(yaml.safe_dump(fair))
    assert tune.read_plan(file) == fair
    file.write_text(yaml.safe_dump({**fair, **change}))
    with pytest.raises(ValueError, match=says.replace("{", r"\{").replace("}", r"\}")):
        tune.read_plan(file)


def test_the_shipped_plan_names_settings_that_methods_have():
    plan = tune.read_plan(ROOT / "hparams" / "tuning.yaml")
    for name, grid in plan["methods"].items():
        method = tune.configuration(name, "smollm2-135m", [])["method"]
        try:
            known = vars(bridge.load_method(method["hparams"], ROOT / f"hparams/{method['hparams']}/smollm2-135m.yaml"))
        except ValueError as error:
            assert "unknown to this EasyEdit" in str(error)
            continue
        assert {setting for settings in grid for setting in settings} <= set(known), name
        base = tune.configuration(name, "smollm2-135m", [])
        labels = {tune.job(base, plan, "recent", settings)["method"]["label"] for settings in grid}
        assert len(labels) == len(grid) and all(len(label) <= 100 for label in labels)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KNOWEDIT", str(tmp_path))
    make_llama().save_pretrained("tiny-model")
    make_tokenizer().save_pretrained("tiny-model")
    facts = (("France", "Rome"), ("Spain", "Oslo"))
    Path("train.json").write_text(
        json.dumps([{"prompt": f"The capital of {a} is", "subject": a, "target_new": b} for a, b in facts])
    )
    plan = {
        "data": {name: {"file": "${knowedit}/train.json", "offset": i, "records": 1} for i, name in enumerate("ab")},
        "evaluation": {"fluency": False},
        "choice": RULE,
        "budget": 2,
        "methods": {"ft": [{}, {"num_steps": 40, "lr": 0.05}]},
    }
    Path("plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return tmp_path


def test_settings_that_fail_are_remembered_and_not_chosen(place, monkeypatch, capsys):
    """One edits no record (its summary is of 0), one leaves the model changed (it has none)."""
    base = tune.configuration("ft", "smollm2-135m", ["out=out", "++method.settings.layers=[2]"])
    plan = yaml.safe_load(Path("plan.yaml").read_text())
    figures = {"records": 1, "edit_success": 100.0, "exact_match": 50.0, "portability": 50.0, "locality": 50.0}
    outcome = {"FT": figures, "FT num_steps=40 lr=0.05": figures}

    def run(settings):
        label = settings["method"]["label"]
        if outcome[label] is None:
            raise tune.RunStopped("the model is not what it was")
        summary = {"methods": {label: outcome[label]}}
        tune.atomic_write(tune.job_folder(settings) / "summary.json", json.dumps(summary))
        if not outcome[label]["records"]:
            raise tune.RunStopped("no record could be edited")

    monkeypatch.setattr(tune, "run", run)
    monkeypatch.setattr(tune, "job_of", lambda settings, _: settings)
    command = ["ft", "--plan", "plan.yaml", "--out", "out", "--to", "chosen", "--set", "++method.settings.layers=[2]"]
    outcome["FT num_steps=40 lr=0.05"] = None
    tune.main(command)
    assert "chosen: as its file has it" in capsys.readouterr().out
    tune.main([*command, "--report-only"])
    out = capsys.readouterr().out
    assert "chosen: as its file has it" in out and "on a-train: the model is not what it was" in out
    outcome["FT"] = {"records": 0}
    tune.main(command)
    assert "ft: none of its settings can be chosen" in capsys.readouterr().out
    Path("out", tune.FAILED).write_text("{}")  # of a version that did not remember: the summary tells
    with pytest.raises(tune.SettingFailed, match="FT: no record was edited"):
        tune.candidate(base, plan, {}, {})
    outcome |= dict.fromkeys(outcome, figures)
    tune.main(command)  # what succeeds is no failure any more
    assert tune.failures(Path("out")) == {} and "not chosen" not in capsys.readouterr().out


def test_a_tuning_writes_table_and_choice_and_resumes(place, monkeypatch, capsys):
    command = ["ft", "--plan", "plan.yaml", "--out", "out", "--to", "chosen", "--set"]
    command += ["on_bad_record=fail", "++model.settings.model_name=tiny-model", "++method.settings.layers=[2]"]
    command += ["benchmark/data@data=embedded"]
    tune.main([*command, "--report-only"])
    assert "ft: not finished" in capsys.readouterr().out
    tune.main(command)
    out = capsys.readouterr().out
    assert "chosen: num_steps=40 lr=0.05" in out, "EasyEdit's 25 steps of 5e-4 change nothing in the tiny model"
    found = yaml.safe_load(Path("chosen/ft_tuned.yaml").read_text())
    assert found == {"label": "FT-tuned", "hparams": "FT", "settings": {"layers": [2], "num_steps": 40, "lr": 0.05}}
    rows = Path("out/ft.md").read_text()
    assert rows.count("| a ") == rows.count("| b ") == 2 and "**num_steps=40 lr=0.05**" in rows and " ES " in rows
    monkeypatch.setattr(MethodEditor, "apply", None)  # whoever edits again fails
    tune.main(command)
    tune.main([*command, "--report-only"])
    assert Path("out/ft.md").read_text() == rows
