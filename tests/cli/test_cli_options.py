"""What a user can put into an option: it works, or one line says which option or file is wrong, and why."""

from __future__ import annotations

import argparse
import configparser
import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_hparams
from test_cli import kne, tiny_fixture  # noqa: F401  (a fixture)

from kne_easyedit import cli
from kne_easyedit._util.progress import suppress_progress_bars
from kne_easyedit.benchmark import Run
from kne_easyedit.cli import run

pytestmark = pytest.mark.easyedit

ROOT = Path(__file__).parents[2]
RUN = ["run", "--data", "records.json", "--methods", "KNE", "--hparams", "kne.yaml", "--out", "out", "--records", "1"]
UP = "model.layers.{}.mlp.up_proj"


def manifest(folder: Path) -> dict:
    return json.loads((folder / "out/manifest.json").read_text())


def test_run_takes_what_its_sisters_take(tiny):
    (tiny / "tiny-model").rename(tiny / "elsewhere")
    assert kne(*RUN, "--model", "elsewhere", "--modules", UP, "--set", "num_steps=3", "KNE.stop_loss=0") == 0
    found = manifest(tiny)
    assert found["model"]["name"] == "elsewhere"
    settings = found["methods"]["KNE"]
    assert (settings["target_modules"], settings["num_steps"], settings["stop_loss"]) == ([UP], 3, 0)


def test_one_file_with_a_model_of_ones_own_serves_baselines_too(tiny):
    arguments = [*RUN, "--set", "FT.layers=[2]", "FT.num_steps=2", "FT.lr=1e-3"]
    arguments[arguments.index("KNE")] = "KNE,FT"
    assert kne(*arguments) == 0
    found = manifest(tiny)["methods"]["FT"]
    assert (found["layers"], found["num_steps"], found["lr"]) == ([2], 2, 1e-3)


def test_a_shipped_file_that_does_not_fit_the_model_is_refused_before_the_run(tiny, capsys):
    arguments = [*RUN]
    arguments[arguments.index("KNE")] = "KNE,FT"
    assert kne(*arguments) == 1
    error = capsys.readouterr().err
    assert re.search(
        r"FT: the shipped \S*FT/smollm2-135m.yaml does not fit this model: layers: \[21\] out of range; "
        r".*--set FT.NAME=VALUE",
        error,
    )
    assert not (tiny / "out").exists()


def test_settings_of_ones_own_that_the_model_lacks_are_no_fault_of_a_record(tiny, capsys):
    arguments = [*RUN, "--set", "FT.layers=[99]", "--on-bad-record", "skip"]
    arguments[arguments.index("KNE")] = "KNE,FT"
    (tiny / "ft.yaml").write_text((ROOT / "hparams/FT/smollm2-135m.yaml").read_text())
    assert kne(*arguments) == 1
    error = capsys.readouterr().err
    assert "layers: [99] out of range" in error and "--set FT.NAME=VALUE" in error and "record" not in error
    assert not (tiny / "out").exists()


def test_a_device_is_that_of_all_methods_with_and_without_kne():
    arguments = argparse.Namespace(localization_data=None, localization_size=None, modules=None)
    for methods in (["FT"], ["KNE", "FT"]):
        files = {"KNE": tiny_hparams(), "FT": SimpleNamespace(device=0)}
        hparams = {method: files[method] for method in methods}
        run._override(hparams, {"device": "cpu"}, arguments)
        assert {its.device for its in hparams.values()} == {"cpu"}


def test_two_files_with_different_models_are_told_apart(tiny, capsys):
    (tiny / "ft.yaml").write_text((ROOT / "hparams/FT/smollm2-135m.yaml").read_text())
    assert kne("run", "--data", "records.json", "--hparams", "kne.yaml", "ft.yaml") == 1
    error = capsys.readouterr().err
    assert "kne.yaml has " in error and "ft.yaml has smollm2-135m" in error and "--model" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "p=x"], r"--set: p: 'x' is a str"),
        (["--set", "p=7"], r"--set: p: 7.0 must be in \(0, 1\]"),
        (["--set", "="], "--set '=': expected NAME=VALUE"),
        (["--set", "p"], "--set 'p': expected NAME=VALUE"),
        (["--set", "layers=["], r"--set 'layers=\[': '\[' is no value that YAML can read"),
        (["--set", "layers=" + "[" * 5000], "--set 'layers=.* is no value that YAML can read"),
        (["--set", "pp=1"], "--set: unknown setting 'pp'"),
        (["--set", "ROME.lr=1"], "--set ROME.lr: 'ROME' is none of the methods KNE"),
        (["--set", "KNE.model_name=tiny-model"], "--set KNE.model_name: one run has one model .*; say --model NAME"),
        (["--set", "KNE.device=cpu"], "--set KNE.device: one run has one model on one device; say --set device="),
        (
            ["--methods", "FT", "--hparams", "ft.yaml", "--set", "FT.alg_name=KN"],
            "--set FT.alg_name: .*--methods names",
        ),
        (["--set", "model_name=3"], "--model: 3 names no model"),
        (["--model", "no/such/model"], "model_name: 'no/such/model'"),
        (["--modules", "x"], "--modules: "),
        (["--seed", "-1"], r"seed: -1 must be in \[0, 2\*\*32\)"),
        (["--offset", "-1"], "offset: -1 out of range"),
        (["--out", "kne.yaml"], "--out: kne.yaml is a file, expected a folder"),
        (["--out", "kne.yaml/deeper"], "--out: kne.yaml is a file, expected a folder"),
        (["--hparams", "."], r"hparams: \. is a folder"),
        (["--hparams", "binary.yaml"], "hparams: binary.yaml is not a YAML file"),
        (["--hparams", "broken.yaml"], "hparams: broken.yaml is not a YAML file"),
        (["--hparams", "list.yaml"], "hparams: list.yaml holds a list, expected settings"),
        (["--hparams", "kne.yaml", "kne.yaml"], "kne.yaml is the second file of KNE"),
        (["--methods", "KNE,KNE"], "methods: KNE is named twice"),
        (["--methods", "../KNE", "--hparams"], "methods: '../KNE' is unknown"),
        (["--data", "."], r"\."),
        (["--stats-text", "none.txt"], "statistics text none.txt does not exist"),
        (
            ["--methods", "FT", "--hparams", "ft.yaml", "--set", "p=0.5"],
            "--set p: is a setting of KNE's, which is none of the methods FT",
        ),
        (["--methods", "FT", "--hparams", "ft.yaml", "--set", "FT.lrr=1"], "--set FT.lrr: FT has no setting 'lrr'"),
        (
            ["--methods", "FT", "--hparams", "ft.yaml", "--set", "FT.layers=7"],
            r"--set FT.layers: 7 is a int, expected a list",
        ),
        (
            ["--methods", "FT", "--hparams", "ft.yaml", "--set", "FT.layers=[x]"],
            r"--set FT.layers: \['x'\] is a str, expected a int",
        ),
        (
            ["--methods", "FT", "--hparams", "unknown.yaml"],
            "unknown.yaml: FTHyperParams cannot be made of it: .*num_steps",
        ),
    ],
)
def test_odd_values_are_one_clear_line(tiny, capsys, arguments, message):
    ft = (ROOT / "hparams/FT/smollm2-135m.yaml").read_text()
    (tiny / "ft.yaml").write_text(ft)
    (tiny / "unknown.yaml").write_text(ft.replace("num_steps: 25", "nonsense: 25"))
    (tiny / "binary.yaml").write_bytes(bytes(range(256)))
    (tiny / "broken.yaml").write_text("a: [1, 2")
    (tiny / "list.yaml").write_text("- 1\n- 2\n")
    command = [one for one in RUN if one not in ("--hparams", "kne.yaml")] if "--hparams" in arguments else RUN
    assert kne(*command, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("kne: ") and error.count("\n") == 1, error
    assert re.search(message, error), error


@pytest.mark.parametrize(
    "arguments",
    [["--records", "0"], ["--records", "x"], ["--title", "caf\udce9"], ["--out", "a\x00b"], ["--batch-size", "0"]],
)
def test_what_the_parser_refuses(tiny, capsys, arguments):
    command = ["report", "."] if "--title" in arguments else RUN
    with pytest.raises(SystemExit) as refused:
        kne(*command, *arguments)
    assert refused.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content", [bytes(range(256)), b"a: [1, 2", b"- 1", b"[" * 5000, b""])
@pytest.mark.parametrize("command", ["localize", "explain"])
def test_files_that_hold_no_settings(tiny, capsys, command, content):
    (tiny / "odd.yaml").write_bytes(content)
    for path in ("odd.yaml", "."):
        assert kne(command, "--hparams", path, "--size", "1") == 1
        error = capsys.readouterr().err
        assert error.startswith(f"kne: hparams: {path} ") and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "command", [["localize", "--size", "1"], ["explain", "--size", "1"], ["report", "."], ["data", "fetch"]]
)
def test_a_file_in_the_place_of_the_results(tiny, capsys, command):
    assert cli.main([*command, "--out", "kne.yaml"]) == 1
    assert "--out: kne.yaml is a file, expected a folder" in capsys.readouterr().err


def test_options_reach_the_run(tiny, monkeypatch):
    """By the names of its settings; without options they are its defaults."""
    jobs = []

    def seen(job, again):
        jobs.append(job)
        raise ValueError("seen")

    monkeypatch.setattr("kne_easyedit.cli.comparison.run", seen)
    options = {"mode": "batch", "batch-size": "2", "seed": "7", "retention-every": "3", "workers": "2"}
    assert kne(*RUN, *(text for name, value in options.items() for text in (f"--{name}", value))) == 1
    assert kne(*RUN, "--chat-template", "--stats-samples", "9", "--on-bad-record", "skip", "--workers", "1") == 1
    given, others = jobs
    names = [name.replace("-", "_") for name in options]
    assert [getattr(given, name) for name in names] == ["batch", 2, 7, 3, 2]
    defaults = {field.name: field.default for field in fields(Run)}
    assert [getattr(others, name) for name in names] == [defaults[name] for name in names]
    assert (others.chat_template, others.text_source.samples, others.skip_bad) == (True, 9, True)
    assert (given.chat_template, given.text_source.samples, given.skip_bad) == (False, 512, False)


# The screen


def test_the_screen_shows_our_bars_and_no_others(tiny, capfd):
    assert kne(*RUN) == 0
    out, error = capfd.readouterr()
    bars = set(re.findall(r"(?:^|\r|\n)([^\r\n:]+): +\d+%", error))
    assert bars == {"edit"}
    steps = re.findall(r"step (\d) of (\d): ([a-z]+)", out)
    assert [step[2] for step in steps] == ["load", "edit", "write"]


def test_bars_come_back():
    import io

    import tqdm
    from tqdm.auto import tqdm as auto

    original, screen = tqdm.tqdm.__init__, io.StringIO()
    with pytest.raises(KeyError), suppress_progress_bars():
        list(auto(range(3), file=screen))
        raise KeyError
    assert screen.getvalue() == "" and tqdm.tqdm.__init__ is original
    list(auto(range(3), file=screen))
    assert "3/3" in screen.getvalue()  # the converse


# Extras


def extras() -> dict[str, str]:
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return dict(found["options.extras_require"])


def test_every_extra_that_a_message_or_a_page_names_is_there():
    sources = [*ROOT.glob("kne_easyedit/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "Makefile"]
    named = {
        (path.name, extra)
        for path in sources
        for names in re.findall(r"(?:kne_easyedit|'\.)\[([a-z0-9,]+)\]", path.read_text())
        for extra in names.split(",")
    }
    assert {extra for _, extra in named} >= {"plots", "report", "easyedit"}
    assert not [pair for pair in named if pair[1] not in extras()]


def test_the_extra_of_the_report_has_all_that_a_report_imports():
    report = extras()["report"]
    assert all(package in report for package in ("matplotlib", "markdown-it-py", "scipy"))


@pytest.mark.parametrize("command", ["edit --out x", "study share", "run --data x", "ask rome", "edits check store"])
def test_settings_may_be_given_one_by_one(command):
    arguments = cli._parser().parse_args([*command.split(), "--set", "p=0.02", "--set", "device=cpu", "fp16=false"])
    assert arguments.set == ["p=0.02", "device=cpu", "fp16=false"]


def test_files_and_edits_may_be_given_one_by_one():
    parse = cli._parser().parse_args
    assert parse(["show", "a", "--with", "b", "--with", "c"]).others == [Path("b"), Path("c")]
    assert parse(["run", "--data", "x", "--hparams", "a", "--hparams", "b"]).hparams == [Path("a"), Path("b")]
    assert parse(["doctor", "--hparams", "a", "--hparams", "b"]).hparams == [Path("a"), Path("b")]
    assert parse(["edit", "--out", "x", "--modules", "a", "--modules", "b"]).modules == ["a", "b"]
