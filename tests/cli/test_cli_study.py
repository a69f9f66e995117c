"""``kne study`` and ``kne report --study``: every study on a tiny model with two points, resumed, and bad input."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import LLAMA_DOWN
from test_cli import kne, tiny_fixture  # noqa: F401  (a fixture)

from kne_easyedit.benchmark.collect import collect
from kne_easyedit.bridge import MethodEditor
from kne_easyedit.localization.ensemble import NeuronEnsemble

pytestmark = pytest.mark.easyedit

OPTIONS = ["--data", "records.json", "--hparams", "kne.yaml", "--out", "out", "--no-fluency"]
SPED_UP = ["--set", "num_steps=2", "localization_data=facts.json", "localization_size=2", "attribution_steps=2"]
STUDIES = {
    "location": (["--values", "down_proj,k_proj"], 4),
    "facts": (["--values", "1,2", "--draws", "2"], 3),
    "share": (["--values", "0.1,0.4"], 8),
    "batch": (["--values", "1,2", "--sequences", "2"], 3),
}


@pytest.fixture(name="place")
def place_fixture(tiny):
    records = json.loads((tiny / "records.json").read_text())
    others = [("Spain", "Oslo"), ("Peru", "Rome"), ("Italy", "Lima"), ("Ada", "Marie")]
    facts = [{**records[0], "subject": a, "prompt": f"The capital of {a} is", "target_new": b} for a, b in others]
    (tiny / "facts.json").write_text(json.dumps(facts))
    (tiny / "records.json").write_text(json.dumps([records[0], {**facts[0], "target_new": "Lima"}]))
    return tiny


@pytest.fixture(autouse=True)
def sped_up(monkeypatch):
    """Without pictures of ensembles, and with few resamples: nothing here is concluded from an interval."""
    monkeypatch.setattr("kne_easyedit.benchmark.intervals.RESAMPLES", 200)
    monkeypatch.setattr("kne_easyedit.benchmark.figures.draw_ensemble", lambda *_args, **_kwargs: None)
    monkeypatch.setattr("kne_easyedit.benchmark.figures.draw_retention", lambda *_args, **_kwargs: None)


def study(name: str, *options: str) -> int:
    return kne("study", name, *OPTIONS, *options, *SPED_UP)


@pytest.mark.parametrize(
    "name", ["facts", "share", *(pytest.param(name, marks=pytest.mark.slow) for name in ("location", "batch"))]
)
def test_a_study_from_one_command_to_its_page(name, place, capsys, monkeypatch):
    options, points = STUDIES[name]
    assert study(name, *options, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert f"{points} points" in printed and printed.count("0 done  out/tiny-model/records/KNE-") == points
    assert "unknown until the first points are there" in printed and not Path("out").exists()
    assert study(name, *options) == 0
    printed = capsys.readouterr().out
    assert f"point {points} of {points}: KNE-" in printed and "kne report --study out" in printed
    lines = collect([Path("out")]).lines
    assert len(list(Path("out").rglob("results.jsonl"))) == points and len(lines) == 2 * points
    assert kne("report", "--study", "out") == 0
    text, page = Path("out/report/studies.md").read_text(), Path("out/report/studies.html").read_text()
    assert f"({name}-1.png)" in text and "Here: cannot be told." in text and "they have fewer than 20" in text
    assert 'src="data:image/png;base64,' in page and "http" not in re.sub(r"base64,[^\"]*", "", page)
    with Path("out/report/studies.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    content = json.loads(Path("out/report/studies.json").read_text())
    assert len(rows) == len(content["points"]) and {row["study"] for row in rows} == {name}
    assert {row["metric"] for row in rows} >= {"edit_success", "neighbourhood", "seconds_per_edit"}
    assert [its["verdict"] for its in content["studies"]] == ["cannot be told"]
    if name == "facts":
        assert [its["facts"] for its in content["studies"][0]["overlap"]] == [1, 2] and "ensembles are (Dice" in text
    # Resumed, nothing is edited again, and the estimate says so.
    monkeypatch.setattr(MethodEditor, "apply", None)
    assert study(name, *options) == 0
    assert "all edits are made" in capsys.readouterr().out


def test_only_the_ensembles_of_many_draws(place, capsys, monkeypatch):
    monkeypatch.setattr(MethodEditor, "apply", None)
    options = ("facts", "--ensembles-only", "--values", "1,2", "--draws", "3")
    assert study(*options, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "5 ensembles, 4 different facts" in printed and not Path("out").exists()
    assert study(*options) == 0
    printed = capsys.readouterr().out
    assert "| 1 | 3 | " in printed and "5 of 5: KNE-facts.3@2, " in printed
    assert Path("out/ensembles/KNE-facts.3@2.json").is_file()
    found = json.loads(Path("out/report/ensembles.json").read_text())["overlap"]
    assert [(its["facts"], its["draws"]) for its in found] == [(1, 3), (2, 2)]
    assert 0 <= found[0]["between_draws"] <= 1 and Path("out/report/ensembles.html").is_file()
    assert not list(Path("out").rglob("results.jsonl"))


def test_the_perplexity_of_a_text_is_a_panel(place):
    Path("text.txt").write_text("The capital of France is Paris . The river that flows through Rome is the Tiber .")
    assert study("batch", "--values", "1", "--sequences", "2", "--perplexity", "text.txt") == 0
    assert kne("report", "--study", "out") == 0
    points = json.loads(Path("out/report/studies.json").read_text())["points"]
    found = {row["series"]: (row["mean"], row["records"]) for row in points if row["metric"] == "perplexity"}
    assert set(found) == {"batch", "sequence"} and all(mean > 1 and n == 2 for mean, n in found.values())


def test_random_rows_are_as_many_of_each_layer(place):
    assert study("share", "--values", "0.3", "--draws", "2", "--records", "1", "--series", "random, share") == 0
    found = {path.stem.rpartition("-")[2]: NeuronEnsemble.load(path) for path in Path("out").rglob("ensemble-*.json")}
    localised, *others = (found[name] for name in ("share@0.3", "random@0.3", "random.2@0.3"))
    assert all(its.counts() == localised.counts() and its.size == localised.size for its in others)
    assert len({frozenset(its.members()) for its in (localised, *others)}) == 3


def test_interrupted_it_goes_on_and_estimates(place, capsys, monkeypatch):
    apply, calls = MethodEditor.apply, []

    def stopping(self, requests):
        calls.append(requests)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return apply(self, requests)

    monkeypatch.setattr(MethodEditor, "apply", stopping)
    options = ("location", "--values", "down_proj")
    assert study(*options) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert study(*options, "--dry-run") == 0
    assert re.search(r"3 edits are left: about 0\.0 h, by the 1 that were made here, eval", capsys.readouterr().out)
    assert study(*options) == 0
    assert len(calls) == 5, "one line was there"


def test_settings_come_from_where_they_are_said_to(place, capsys):
    assert study("share", "--values", "0.1", "--records", "1", "--paper", "--seed", "7") == 0
    manifests = [json.loads(path.read_text()) for path in Path("out").rglob("manifest.json")]
    settings = {label: its for manifest in manifests for label, its in manifest["methods"].items()}
    assert set(settings) == {f"KNE-paper-{series}@0.1" for series in ("share", "random", "step", "magnitude")}
    own = settings["KNE-paper-share@0.1"]
    assert (own["p"], own["lr"], own["stop_loss"], own["num_steps"]) == (0.1, 5e-3, 0.4, 2)
    assert own["target_modules"] == [LLAMA_DOWN] and own["localization_data"].endswith("facts.json")
    assert {manifest["seed"] for manifest in manifests} == {7}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["facts", "--values", "1,9"],
            r"study facts: 9 facts: the data to localise on has 4 .*\(--localization-data\)",
        ),
        (["location", "--values", "down"], r"values: 'down' must be one of .*'q_proj'.*did you mean 'down_proj'"),
        (["share", "--values", "7"], r"values: '7' is not right here; expected shares of the rows"),
        (["batch", "--values", "3"], r"3 facts in one edit: there are 2 records; give more \(--records\)"),
        (["batch", "--shard", "0/2"], r"shard: 0/2; batches and sequences need all their records in one job"),
        (["share", "--shard", "2"], r"shard: '2' is no part i/n"),
        (["share", "--sequences", "3"], "sequences: 3; they belong to the study batch, not to share"),
        (["location", "--draws", "2"], "draws: 2; they belong to the studies facts and share, not to location"),
        (["share", "--series", "share,rows"], "series: 'rows' must be one of .*'share', 'random', 'step', 'magnitude'"),
        (["share", "--ensembles-only"], "--ensembles-only: belongs to the study facts, not to share"),
        (["share", "--values", "0.5", "--perplexity", "nowhere.txt"], r"perplexity: .*nowhere\.txt is no file"),
        (["share", "--draws", "6"], "draws: 6 of random rows, at most 5"),
        (["share", "--data", "nowhere"], "nowhere does not exist"),
        (["share", "--model", "no/such/model"], "model_name: 'no/such/model' is not on this machine"),
        (["share", "--modules", "model.layers.{}.mlp.x"], "target_modules: 'model.layers.{}.mlp.x' matches no module"),
        (["share", "--offset", "5"], "data.offset: 5 out of range; records.json has 2 records"),
        (["share", "--label", "a/b"], r"method.label: 'a/b-share@0.0025' holds a character"),
        (["share", "--values", "0.5", "--neighbours", "-1"], "neighbours: -1 must be at least 0"),
    ],
)
def test_bad_input_is_named_before_the_first_edit(arguments, says, place, capsys):
    assert study(*arguments) == 1
    assert re.search(says, capsys.readouterr().err)
    assert not list(Path("out").rglob("results.jsonl"))


def test_a_command_that_is_refused_leaves_the_kept_settings(place, capsys):
    kept = Path("out/settings/KNE/tiny-model.yaml")
    kept.parent.mkdir(parents=True)
    kept.write_text("of an earlier command\n")
    for arguments in (["--values", "7"], ["--series", "none"], ["--data", "nowhere"], ["--label", "a/b"]):
        assert study("share", *arguments) == 1, arguments
        assert kept.read_text() == "of an earlier command\n", arguments


def test_what_cannot_be_filled_is_said_and_the_rest_is_planned(place, capsys):
    assert study("facts", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "KNE-facts@2 " in printed and "left out: 200 facts: the data to localise on has 4" in printed
    assert study("facts", "--dry-run", "--localization-data", "records.json") == 1, "all of them are edited"
    assert "1 facts: the data to localise on has 0" in capsys.readouterr().err


def test_a_report_of_other_results_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = {"method": "KNE", "fingerprint": "f", "index": 0, "record": "r", "data": "d", "mode": "single", "seed": 1}
    Path("run").mkdir()
    Path("run/results.jsonl").write_text(json.dumps({**line, "metrics": {"pre": {}, "post": {}}}) + "\n")
    assert kne("report", "--study", "run") == 1
    assert "no label in run is that of a study's point" in capsys.readouterr().err


def folders(printed: str) -> list[str]:
    return re.findall(r"out/\S+", printed)


def test_points_of_two_files_of_settings_are_in_folders_of_their_own(place, capsys):
    """Else a run that is interrupted would leave a study of which half has other settings."""
    found = []
    for changes in ({}, {"lr": 0.125}, {}, {"device": "cpu:0"}):
        given = yaml.safe_load((place / "kne.yaml").read_text()) | changes
        (place / "own.yaml").write_text(yaml.safe_dump(given))
        assert (
            kne("study", "share", "--dry-run", "--data", "records.json", "--hparams", "own.yaml", "--out", "out") == 0
        )
        found.append(folders(capsys.readouterr().out))
    assert found[0] == found[2] == found[3] and len(found[0]) == len({*found[0]}) > 1
    assert not {*found[0]} & {*found[1]}


def test_a_file_is_the_same_however_it_is_named(place, capsys):
    """Facts that are edited are not localised on, whether the settings name their file absolutely or not."""
    records = json.loads((place / "records.json").read_text()) + json.loads((place / "facts.json").read_text())
    (place / "both.json").write_text(json.dumps(records))
    given = yaml.safe_load((place / "kne.yaml").read_text())
    plans = []
    for named in ("both.json", str(place / "both.json")):
        (place / "own.yaml").write_text(yaml.safe_dump(given | {"localization_data": named}))
        for data in ("both.json", str(place / "both.json")):
            command = ("study", "facts", "--values", "4", "--records", "2", "--data", data, "--hparams", "own.yaml")
            assert kne(*command, "--out", "out", "--dry-run") == 0
            plans.append(re.sub(r"-[0-9a-f]{8}/", "/", capsys.readouterr().out))
            assert kne(*command[:3], "5", *command[4:], "--out", "out", "--dry-run") == 1, "two of six are edited"
            assert "has 4 that are not edited" in capsys.readouterr().err
    assert len({*plans}) == 1
