"""Errors of example scripts: before anything runs, of the script itself, and in the command's words."""

from __future__ import annotations

import json
from textwrap import dedent

import pytest
from script_runs import (  # noqa: F401 (the fixtures)
    run,
    work_folder,
    write_script,
)

from kne_easyedit import cli
from kne_easyedit.bridge.scripts import ScriptError

# Errors before anything runs

REFUSED = [
    ("run_itt.py", [], "run_itt.py: there is no such file; did you mean run_it.py?"),
    ("run_it.sh", [], r"run_it.sh, line 1: not Python .*run_\*.py"),
    ("other.py", [], "other.py takes no --editing_method.*these do: functions.py, run_it.py"),
    ("run_it.py", ["--editing_method", "RME"], "'RME' is unknown to this EasyEdit; did you mean ROME"),
    ("run_it.py", ["--editing_method=KNEE"], "'KNEE' is unknown to this EasyEdit; did you mean KNE"),
    (
        "functions.py",
        ["--editing_method", "KNE"],
        "functions.py has code of its own for each of IKE, MEND_train, and no place for KNE",
    ),
    (
        "run_it.py",
        ["--editing_method", "KNE", "--hparams_dir", "none/x"],
        "--hparams_dir: none/x does not exist.*relative paths start at",
    ),
    (
        "run_it.py",
        ["--editing_method", "KNE", "--hparams_path=smoll.yaml"],
        "--hparams_path: smoll.yaml does not exist.*mean smol.yaml",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED)
def test_refused_before_anything_runs(work, name, arguments, message):
    write_script(work, "open('ran', 'w')")
    (work / "run_it.sh").write_text("python run_it.py --editing_method FT\n")
    (work / "other.py").write_text("open('ran', 'w')")
    write_script(
        work,
        """
        open('ran', 'w')
        args = parse("--editing_method")
        if args.editing_method == "IKE":
            edit_func = edit_IKE
        elif args.editing_method == "MEND_train":
            edit_func = train_MEND
        else:
            raise NotImplementedError
        """,
        "functions.py",
        choice="",
    )
    (work / "smol.yaml").touch()
    with pytest.raises(ValueError, match=message) as caught:
        run(work / name, *arguments)
    assert not isinstance(caught.value, ScriptError)
    assert not (work / "ran").exists()


def test_bytes_are_not_python(work):
    (work / "run_it.py").write_bytes(b"\x00\xff\x00")
    with pytest.raises(ValueError, match="not Python"):
        run(work / "run_it.py")


# Errors of the script


def test_an_exception_names_the_scripts_line(work):
    script = write_script(work, "\n\ndef deep():\n    json.loads('{')\n\ndeep()\n")
    line = script.read_text().splitlines().index("    json.loads('{')") + 1
    with pytest.raises(
        ScriptError, match=rf"^run_it.py, line {line}: JSONDecodeError: Expecting property name"
    ) as caught:
        run(script, "--editing_method", "KNE")
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)


def test_an_exception_without_a_message_shows_the_statement(work):
    script = write_script(work, "assert 1 + 1 == 3\n")
    with pytest.raises(ScriptError, match=r"AssertionError: assert 1 \+ 1 == 3$"):
        run(script, "--editing_method", "KNE")


def test_a_pre_edit_file_of_another_length_says_what_to_do(work):
    script = write_script(work, "prompts, pre_edit = [1], []\nassert len(pre_edit) == len(prompts)\n")
    with pytest.raises(ScriptError, match=r"line .*other records: delete it or move it away"):
        run(script, "--editing_method", "KNE")


EVAL = """
    def eval(result_path):
        return sum([[1]])

    result_path = "results.json"
    json.dump({content}, open(result_path, "w"))
    eval(result_path)
"""
METRICS = '[{"post": {"rewrite_acc": [1.0], "locality": {"Near_acc": [0.5], "Near_output": [[1]]}}}]'


def test_a_closing_eval_that_fails_loses_nothing(work, capsys):
    assert run(write_script(work, EVAL.format(content=METRICS)), "--editing_method", "FT") == 0
    out = capsys.readouterr().out
    assert (
        "run_it.py: the results are complete in results.json; "
        "only the script's own closing eval() failed (TypeError: unsupported" in out
    )
    assert "| results.json |       100.00 |           - |    50.00 |" in out


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def eval(", "def evaluate(result_path): pass\ndef other("),
        (METRICS, "[1]"),
        ('open(result_path, "w")', 'open("elsewhere.json", "w")'),
    ],
)
def test_other_failures_are_failures(work, old, new):
    source = dedent(EVAL.format(content=METRICS)).replace(old, new)
    script = write_script(work, source.replace("\neval(", "\nother(") if "other(" in new else source)
    with pytest.raises(ScriptError, match="TypeError"):
        run(script, "--editing_method", "FT")


# The command


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run_it.py", "--editing_method", "RME"], 1, "kne: methods: 'RME' is unknown to this EasyEdit"),
        (
            ["--skip-bad", "run_it.py", "--editing_method", "KNE"],
            1,
            "kne: --skip-bad: run_it.py reads its records by itself",
        ),
        (
            ["--stats-text", "none.txt", "run_it.py", "--editing_method", "KNE"],
            1,
            "kne: statistics text none.txt does not exist",
        ),
        (["run_it.py", "--editing_method", "KNE"], 1, "kne: run_it.py, line 22: RuntimeError: two lines"),
        (["run_it.py", "--editing_method", "FT"], 5, ""),
        (["run_it.py", "--editing_method", "IKE"], 130, "kne: interrupted; EasyEdit's scripts begin again"),
    ],
)
def test_errors_are_one_line_and_a_code(work, capsys, arguments, code, message):
    ends = {"KNE": "raise RuntimeError('two\\n lines')", "FT": "raise SystemExit(5)", "IKE": "raise KeyboardInterrupt"}
    source = "".join(f"if args.editing_method == '{method}': {end}\n" for method, end in ends.items())
    write_script(work, source)
    assert cli.main(["easyedit-run", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == bool(message)


def test_verbose_shows_the_whole_traceback(work):
    script = write_script(work, "raise RuntimeError('deep')")
    with pytest.raises(ScriptError) as caught:
        cli.main(["-v", "easyedit-run", str(script), "--editing_method", "KNE"])
    assert str(caught.value.__cause__) == "deep"
