"""The comparison's statistics, its merging of shards, and its page."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy
import pytest
from made_results import LINES, MANIFEST, PRE, line, write
from pytest import approx

from kne_easyedit import cli
from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.intervals import interval, paired
from kne_easyedit.benchmark.markdown_report import _quoted, _ranked
from kne_easyedit.benchmark.publish import publish
from kne_easyedit.benchmark.tables import figures
from kne_easyedit.metrics import METRICS

# Statistics


def test_the_interval_of_a_known_case():
    """Of 400 coin tosses the mean's standard error is 0.025: 1.96 of them on either side."""
    found = interval([0.0, 1.0] * 200)
    assert (found.mean, found.records) == (0.5, 400)
    assert found.low == approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert found.high == approx(0.5 + 1.96 * 0.025, abs=0.004)


def test_intervals_are_the_same_every_time_and_narrow_with_the_records():
    values = numpy.random.default_rng(1).normal(50, 10, 400)
    few, many = interval(values[:25]), interval(values)
    assert interval(values) == many
    assert (few.high - few.low) / (many.high - many.low) == approx(4, rel=0.4)  # the square root of 16


def test_intervals_of_hardly_anything():
    assert interval([]) is None
    assert interval([3.0]).low == interval([3.0]).high == 3.0
    assert interval([100.0] * 7).low == 100.0


def test_what_records_share_cancels_out_of_a_difference():
    generator = numpy.random.default_rng(2)
    hardness = generator.normal(0, 30, 60)
    ours = {i: h + 5 + generator.normal(0, 1) for i, h in enumerate(hardness)}
    theirs = dict(enumerate(hardness)) | {"only theirs": 1000.0}
    difference = paired(ours, theirs)
    assert difference.records == 60
    assert 4 < difference.low < difference.mean < difference.high < 6
    assert interval(list(ours.values())).high - interval(list(ours.values())).low > 10 * (
        difference.high - difference.low
    )


# Merging


def test_shards_merge_to_the_lines_of_one_run(tmp_path):
    write(tmp_path / "whole/results.jsonl", LINES)
    for i in range(3):
        write(tmp_path / f"shards/{i}/results.jsonl", LINES[i::3])
    merged, whole = (
        {(its["data"], its["method"], its["record"], its["seed"]): its for its in collect([tmp_path / name]).lines}
        for name in ("shards", "whole")
    )
    assert merged == whole and len(whole) == len(LINES)
    assert figures(collect([tmp_path / "shards"])) == figures(collect([tmp_path / "whole"]))
    twice = collect([tmp_path / "whole", tmp_path / "shards"])
    assert len(twice.lines) == len(LINES)


def test_settings_never_mix(tmp_path):
    write(tmp_path / "a/results.jsonl", [line("KNE", 0, 1.0)])
    write(tmp_path / "b/results.jsonl", [line("KNE", 1, 1.0, fingerprint="other")])
    with pytest.raises(
        ValueError, match=r"a/results\.jsonl and .*b/results\.jsonl: KNE on counterfact under different settings"
    ):
        collect([tmp_path])


def made_of(folder, method: str, manifest: dict) -> None:
    write(folder / "results.jsonl", [line(method, i, 1.0) for i in range(3)])
    whole = {**MANIFEST, "localization": {}, "second_moments": {}, "fingerprints": {method: f"{method}-test_cf"}}
    (folder / "manifest.json").write_text(json.dumps(whole | manifest))


def test_models_never_mix(tmp_path):
    """A difference of methods would be one of models, and there is one row of the unedited model."""
    made_of(tmp_path / "a", "KNE", {"model": {"name": "tiny", "sha256": "0" * 64}})
    made_of(tmp_path / "b", "FT", {"model": {"name": "other", "sha256": "9" * 64}})
    with pytest.raises(
        ValueError, match=r"a/results.* and .*b/results.*: edits of two models on counterfact, tiny .*0"
    ):
        collect([tmp_path])
    made_of(tmp_path / "b", "FT", {"model": {"name": "tiny, elsewhere", "sha256": "0" * 64}})
    assert len(collect([tmp_path]).lines) == 6
    other = {"model": {"name": "other", "sha256": "9" * 64}, "data": {"name": "ZsRE-test-all.json"}}
    made_of(tmp_path / "b", "FT", other)  # of other data nothing is compared
    assert len(collect([tmp_path]).lines) == 6


def test_lines_that_their_manifest_does_not_know(tmp_path):
    """As a run leaves them that was stopped after its manifest and before its first edit."""
    made_of(tmp_path, "KNE", {"fingerprints": {"KNE": "newer"}})
    with pytest.raises(ValueError, match=r"results\.jsonl: line 1: KNE was run under other settings .*newer.*again"):
        collect([tmp_path])


def test_a_number_of_a_data_set_is_one_record(tmp_path):
    """Two files of one name; a record that is another in a later version of its file."""
    write(tmp_path / "a/results.jsonl", [line("KNE", i, 1.0, "test", record=f"a{i}") for i in range(5)])
    write(tmp_path / "b/results.jsonl", [line("KNE", i, 0.0, "test", record=f"b{i}") for i in range(5)])
    write(
        tmp_path / "c/results.jsonl", [line("FT", 5, 0.0, "test", record="a5"), line("FT", 4, 0.0, "test", record="x")]
    )
    says = r"record {} of test is another in each: they are of two data files of one name"
    with pytest.raises(ValueError, match=r"a/results\.jsonl and .*b/results\.jsonl: " + says.format(0)):
        collect([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match=r"a/results\.jsonl and .*c/results\.jsonl: " + says.format(4)):
        collect([tmp_path / "a", tmp_path / "c"])
    write(
        tmp_path / "c/results.jsonl", [line("FT", 5, 0.0, "test", record="a5"), line("FT", 4, 0.0, "test", record="a4")]
    )
    assert len(collect([tmp_path / "a", tmp_path / "c"]).lines) == 7
    chat = [line("FT-chat", i, 1.0, "test", record=f"chat-a{i}", chat_template=True) for i in range(5)]
    write(tmp_path / "d/results.jsonl", chat)  # the same records, in the model's chat template
    assert len(collect([tmp_path / "a", tmp_path / "d"]).lines) == 10
    for name in "ab":  # lines of early versions name no data set
        lines = [line("KNE", 0, 1.0, record=name, data=None)]
        write(tmp_path / f"early/{name}/results.jsonl", lines)
    assert len(collect([tmp_path / "early"]).lines) == 2


def test_nothing_to_report(tmp_path):
    with pytest.raises(
        ValueError, match=r"there are none: no results\.jsonl of a run in it or below, and no records\.jsonl"
    ):
        collect([tmp_path])
    write(tmp_path / "run/results.jsonl", LINES)  # one folder that holds some makes no other good
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: there are none"):
        collect([tmp_path / "run", tmp_path / "empty"])
    write(tmp_path / "begun/results.jsonl", [])
    with pytest.raises(ValueError, match=r"results: there are none in .*begun"):
        collect([tmp_path / "begun"])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        collect([tmp_path / "nowhere"])


def test_methods_and_data_sets_stand_in_the_papers_order(tmp_path):
    """Others behind them by name, KNE and its variants last."""
    methods = ["KNE-up", "KNE", "x", "MEMIT", "ROME", "KN", "AdaLoRA", "LoRA", "FT-L", "FT-M", "FT", "KNEE"]
    files = ["train_cf", "recent_test", "ZsRE-test-all", "test_cf", "other"]
    write(tmp_path / "results.jsonl", [line(method, 0, 1.0, data) for method in methods for data in files])
    found = collect([tmp_path])
    last = ["KNEE", "x", "KNE", "KNE-up"]
    assert found.methods == ["FT", "FT-M", "FT-L", "LoRA", "AdaLoRA", "KN", "ROME", "MEMIT", *last]
    assert found.data_sets == ["counterfact", "zsre", "recent", "counterfact (train)", "other"]


# The page


@pytest.fixture
def found(tmp_path):
    write(tmp_path / "run/results.jsonl", LINES)
    return collect([tmp_path / "run"])


def test_the_report_renders_with_missing_methods(found, tmp_path):
    page = publish(found, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]
    assert ["data", "metric", "*no edit*", "*baselines*", "FT", "MEMIT", "KNE", "KNE-up"] in rows
    assert ["counterfact", "ES", "25.00", "35.00", "50.00", "20.00", "**100.00**", "<u>80.00</u>"] in rows
    assert ["", "LOC", "-", "50.00", "**50.00**", "**50.00**", "**50.00**", "**50.00**"] in rows
    assert ["counterfact", "PORT", "Reasoning", "6", "12.50", "25.00", "10.00", "**50.00**", "<u>40.00</u>"] in rows
    assert ["zsre", "LOC", "L", "3", "-", "-", "-", "**50.00**", "-"] in rows
    assert ["", "records (5 shared)", "-", "-", "5", "5", "6", "6"] in rows
    assert sum(row[1].startswith("records") for row in rows) == 1  # zsre has one method only
    assert ["zsre", "ES", "25.00", "-", "-", "-", "**100.00**", "-"] in rows
    assert [
        "counterfact",
        "FT",
        "50.0 [10.0, 90.0]",
        "40.0 [0.0, 80.0]",
        "25.0 [5.0, 45.0]",
        "50.0 [50.0, 50.0]",
        "550.0 [550.0, 550.0]",
        "5",
    ] in rows
    leads = text.partition("## KNE-up against each method")[2].partition("## Cost")[0]
    assert "| counterfact | KNE | -20.0 [-20.0, -20.0] |" in leads and "zsre" not in leads
    assert "| counterfact | MEMIT | +60.0 [+60.0, +60.0] |" in leads and "**+" not in leads, "too few records"
    assert "another model and other records than above: not to be compared" in text
    html = page.read_text()
    assert "<table>" in html and 'src="data:image/png;base64,' in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)  # nothing from elsewhere
    assert "<script" not in html
    numbers = json.loads((tmp_path / "report/report.json").read_text())
    assert numbers["counterfact"]["FT"]["lead_of"]["KNE"]["edit_success"]["mean"] == approx(50)
    assert numbers["counterfact"]["FT"]["lead_of"]["KNE"]["edit_success"]["records"] == 5  # the records that both have
    assert numbers["counterfact"]["no edit"]["fluency"] == approx(600)
    assert numbers["zsre"]["KNE"]["lead_of"] == {}
    assert numbers["counterfact"]["KNE-up"]["categories"] == {
        "portability": {"Reasoning": approx(40)},
        "locality": {"L": approx(50)},
    }


def test_a_metric_that_one_data_set_has_not(tmp_path):
    """ZsRE alone asks the prompt in other words: the other panel is empty."""
    rephrased = {"pre": PRE, "post": {**LINES[0]["metrics"]["post"], "rephrase_acc": [0.5]}}
    lines = [*LINES[:6], *(line("KNE", i, 1.0, "ZsRE-test-all", metrics=rephrased) for i in range(3))]
    write(tmp_path / "run/results.jsonl", lines)
    publish(collect([tmp_path / "run"]), tmp_path / "report")
    assert (tmp_path / "report/intervals.png").is_file()
    numbers = json.loads((tmp_path / "report/report.json").read_text())
    assert numbers["zsre"]["KNE"]["rephrase"] == approx(50) and numbers["counterfact"]["KNE"]["rephrase"] is None


def test_what_is_made_once_is_counted_apart(tmp_path):
    """KNE's localisation and MEMIT's second moments; an edit that took long for another reason moves no median."""
    for method, once in (
        ("KNE", {"localization": {"KNE": {"facts": 200, "seconds_per_fact": 0.5, "seconds": 0.1}}}),
        ("MEMIT", {"second_moments": {"MEMIT": {"source": "text file a.txt", "files": [], "seconds": 60.0}}}),
    ):
        lines = [line(method, i, 1.0, seconds=seconds) for i, seconds in enumerate((90.0, 1.0, 2.0, 3.0))]
        write(tmp_path / method / "results.jsonl", lines)
        (tmp_path / method / "manifest.json").write_text(
            json.dumps({**MANIFEST, "localization": {}, "second_moments": {}, **once})
        )
    publish(collect([tmp_path]), tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "| counterfact | MEMIT | 2.50 | 3.0 | 3 MiB | 60 | 15.00 |" in text
    assert "| counterfact | KNE | 2.50 | 3.0 | 3 MiB | 100 | 25.00 |" in text
    assert "Second moments: text file a.txt." in text


def test_folders_of_a_machine_are_not_published(tmp_path):
    """Wherever they stand; what only looks like a path stays."""
    write(tmp_path / "run/results.jsonl", [line("MEMIT", i, 1.0) for i in range(3)])
    where = "/home/some one/data"
    manifest = {
        **MANIFEST,
        "data": {**MANIFEST["data"], "name": f"{where}/test_cf.json"},
        "localization": {},
        "fingerprints": {"MEMIT": "MEMIT-test_cf"},
        "methods": {
            "MEMIT": {
                "stats_dir": "./data/stats",
                "text": f"{where}/a.json",
                "model": "some-one/tiny",
                "page": "https://a.b/c/d",
            }
        },
        "second_moments": {
            "MEMIT": {"source": f"text file {where}/a.txt", "files": [f"{where}/m.npz"], "seconds": 60.0}
        },
    }
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    publish(collect([tmp_path]), tmp_path / "report")
    texts = {
        name: (tmp_path / "report" / name).read_text()
        for name in ("report.md", "report.html", "report.json", "manifests.json", "records.jsonl")
    }
    assert not [name for name, text in texts.items() if "some one" in text]
    settings = "stats_dir ./data/stats, text a.json, model some-one/tiny, page https&#58;//a.b/c/d"
    assert f"| test_cf.json | MEMIT | {settings} | MEMIT-test_cf |" in texts["report.md"]
    assert (
        "Second moments: text file a.txt." in texts["report.md"]
        and "| counterfact | MEMIT | 2.00 | 3.0 | 3 MiB | 60 | 20.00 |" in texts["report.md"]
    )
    assert json.loads(texts["manifests.json"])[0]["second_moments"]["MEMIT"]["files"] == ["m.npz"]


def test_the_command(found, tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "run"), "--title", "A title"]) == 0
    assert (tmp_path / "run/report/report.html").read_text().count("A title") == 2
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    assert "no such file or folder" in capsys.readouterr().err


def test_equal_figures_rank_alike():
    up, down = (replace(METRICS[0], better=better) for better in ("up", "down"))
    assert _ranked([1.0, 2.0, 3.0], down) == ["**1.00**", "<u>2.00</u>", "3.00"]
    assert _ranked([50.0, 99.999, 100.0, None, 50.001], up) == [
        "<u>50.00</u>",
        "**100.00**",
        "**100.00**",
        "-",
        "<u>50.00</u>",
    ]


@pytest.mark.parametrize(
    "text", ["a | b", "<script>alert(1)</script>", "*bold* _it_ `code` [x](y)", "# head\nand more"]
)
def test_what_a_model_says_stays_text(text, tmp_path):
    from markdown_it import MarkdownIt

    table = f"| a | b |\n|---|---|\n| {_quoted(text)} | end |"
    rendered = MarkdownIt("commonmark").enable("table").render(table)
    assert rendered.count("<td>") == 2
    cell = re.search(r"<td>(.*?)</td>", rendered)[1]
    assert "<" not in cell
