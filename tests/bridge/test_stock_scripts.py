"""EasyEdit's own example scripts, if a checkout is imported."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import numpy
import pytest
from script_runs import (  # noqa: F401 (the fixtures)
    examples,
    run,
    stock,
    tiny_files,
    work_folder,
)

from kne_easyedit.bridge import script_syntax, scripts
from kne_easyedit.bridge.scripts import ScriptError
from kne_easyedit.metrics import read_results, summarize_metrics


def test_stock_knowedit(tiny, capsys):
    script = stock("run_knowedit_llama2.py")
    figures = {}
    for method in ("KNE", "FT", "AdaLoRA"):
        arguments = {
            "editing_method": method,
            "data_dir": "knowedit.json",
            "datatype": "counterfact",
            "hparams_dir": f"{method}.yaml",
        }
        arguments["hparams_dir"] = arguments["hparams_dir"].replace("KNE", "kne")
        assert run(script, *(part for name, value in arguments.items() for part in (f"--{name}", value))) == 0
        metrics = [record["metrics"] for record in read_results(f"output/{method}_counterfact_tiny-smol_results.json")]
        figures[method] = summarize_metrics(metrics)
        out = capsys.readouterr().out
        if "Fluency:" in out:  # the script's own figures, where its eval() comes to its end
            own = {line.partition(":")[0]: float(line.partition(":")[2]) for line in out.splitlines()[-4:]}
            ours = [figures[method][name] for name in ("edit_success", "portability", "locality", "fluency")]
            assert [*own.values()] == pytest.approx(ours)
        else:
            assert ("the results are complete in" in out) == ("def eval(" in script.read_text())
    assert figures["KNE"]["edit_success"] == 100
    assert {f["records"] for f in figures.values()} == {3}
    assert figures["FT"]["locality"] < 100  # the edit took place
    assert Path(
        "tiny-smol_counterfact_pre_edit.json.kne.json"
    ).is_file()  # and all three shared one file of figures before it


def test_our_averages_are_those_of_easyedits_own_eval(work, capsys):
    """Its closing function itself, on a file by hand in which records lack categories, or a whole section."""
    source = stock("run_knowedit_llama2.py").read_text()
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "eval"]
    if not found:
        pytest.skip("THE SCRIPT OF THIS EASYEDIT HAS NO eval(): THERE IS NOTHING TO COMPARE WITH")
    fluent = {"fluency": {"ngram_entropy": 5.25}}
    rich = {
        "portability": {"A_acc": [1.0, 0.5], "B_acc": [0.25]},
        "locality": {"C_acc": [0.2, 0.6, 1.0], "D_acc": [0.0]},
    }
    posts = [
        {"rewrite_acc": [0.5], **rich, **fluent},
        {"rewrite_acc": [1.0], "portability": {"B_acc": [0.0, 1.0, 1.0]}, "locality": {}, **fluent},
        {"rewrite_acc": [0.25], "portability": {}, "locality": {"D_acc": [1.0]}, "fluency": {"ngram_entropy": 3.5}},
    ]
    (work / "results.json").write_text(json.dumps([{"post": post} for post in posts]))
    names = {"json": json, "np": numpy, "path": os.path}
    exec(compile(ast.Module(found, []), "run_knowedit_llama2.py", "exec"), names)
    names["eval"](work / "results.json")
    own = [float(line.partition(":")[2]) for line in capsys.readouterr().out.splitlines()]
    figures = summarize_metrics([record["metrics"] for record in read_results(work / "results.json")])
    assert [figures[name] for name in ("edit_success", "portability", "locality", "fluency")] == pytest.approx(own)


def test_stock_knowedit_names_bad_records_and_leaves_them_out(tiny, capsys):
    script = stock("run_knowedit_llama2.py")
    records = json.loads((tiny / "knowedit.json").read_text())
    records[1]["subject"] = "Italy"
    (tiny / "knowedit.json").write_text(json.dumps(records))
    arguments = [
        "--editing_method",
        "KNE",
        "--hparams_dir",
        "kne.yaml",
        "--data_dir",
        "knowedit.json",
        "--datatype",
        "counterfact",
    ]
    with pytest.raises(
        ScriptError, match=r"record 1: subject 'Italy', prompt 'The capital of Spain is'.*easyedit-run --skip-bad"
    ):
        run(script, *arguments)
    assert run(script, *arguments, skip_bad=True) == 0
    assert "1 records left out, their subject is not in their prompt: 1" in capsys.readouterr().out
    assert len(read_results("output/KNE_counterfact_tiny-smol_results.json")) == 2
    records[1]["subject"] = "Spain"
    (tiny / "knowedit.json").write_text(json.dumps(records))
    with pytest.raises(ScriptError, match=r"pre_file.*delete it or move it away"):  # three records now
        run(script, *arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "results"),
    [
        ("run_zsre_llama2.py", ["--ds_size", "2"], "output/KNE_results.json"),
        (
            "run_wise_editing.py",
            ["--data_type", "ZsRE", "--ds_size", "2"],
            "outputs/tiny-smol_KNE_N=2_Sequential=False.json",
        ),
        (
            "run_AlphaEdit_editing.py",
            ["--data_type", "ZsRE", "--ds_size", "2", "--sequential_edit"],
            "outputs/tiny-smol_KNE_N=2_Sequential=True.json",
        ),
    ],
)
def test_stock_scripts(tiny, name, arguments, results):
    assert run(stock(name), "--editing_method", "KNE", "--hparams_dir", "kne.yaml", "--data_dir", ".", *arguments) == 0
    figures = summarize_metrics([record["metrics"] for record in read_results(results)])
    assert figures["records"] == 2
    assert figures["rephrase"] is not None
    if "--sequential_edit" not in arguments:
        assert figures["edit_success"] == 100


def test_every_stock_script_can_be_opened():
    """Each one that takes a method has a place for any, but those whose branches are functions of their own."""
    stock("run_knowedit_llama2.py")
    closed = []
    for path in sorted(examples().glob("*.py")):
        tree = scripts._parse(path)
        if script_syntax.METHOD_OPTION in script_syntax.constants_in(tree):
            changes = script_syntax.OpenedMethods(tree)
            compile(ast.fix_missing_locations(changes.visit(tree)), str(path), "exec", dont_inherit=True)
            closed += [path.name] if not changes.places else []
    assert closed == ["run_personality_editing.py"]
