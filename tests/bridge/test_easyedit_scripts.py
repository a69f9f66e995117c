"""EasyEdit's example scripts run as they are on disk, with any method.

Small scripts of the same make here, so that every EasyEdit is served; the stock ones where a checkout is imported.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import random
import sys
from pathlib import Path
from textwrap import dedent

import numpy
import pytest
import torch
import yaml
from conftest import make_llama, make_tokenizer, tiny_hparams, weights

from kne_easyedit import bridge, cli
from kne_easyedit.bridge import TextSource, patches, script_syntax, scripts
from kne_easyedit.bridge.scripts import ScriptError, run_script
from kne_easyedit.bridge.text_source import current_text_source
from kne_easyedit.metrics import read_results, summarize_metrics

SHIPPED = Path(__file__).parents[2] / "hparams"

CHOICE = """
    import argparse
    import json
    from easyeditor import FTHyperParams

    parser = argparse.ArgumentParser()
    parser.add_argument("--editing_method", required=True, choices=["FT", "IKE"])
    parser.add_argument("--hparams_dir")
    args = parser.parse_args()


    class OwnHyperParams(FTHyperParams):
        pass


    if args.editing_method == "FT":
        editing_hparams = OwnHyperParams
    elif args.editing_method == "IKE" or args.editing_method.lower() == "special":
        editing_hparams = OwnHyperParams
    else:
        raise NotImplementedError
"""


@pytest.fixture(autouse=True)
def work(tmp_path_factory, monkeypatch):
    """An empty working directory; its path holds no word ('gpt', ...) by which EasyEdit would guess a kind of model."""
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(folder)
    yield folder
    for name in list(
        logging.root.manager.loggerDict
    ):  # each editor adds handlers, here to streams that are closed soon
        if name.startswith("easyeditor."):
            logging.getLogger(name).handlers.clear()


def process() -> dict:
    """What a script must leave as it was."""
    dataset = getattr(bridge.register(), "KnowEditDataset", None)
    placeholders = [
        n for n, m in list(sys.modules.items()) if "_PlaceholderType" in (type(m).__name__, type(type(m)).__name__)
    ]
    return {
        "main": id(sys.modules["__main__"]),
        "argv": (id(sys.argv), list(sys.argv)),
        "path": list(sys.path),
        "placeholders": placeholders,
        "random": random.getstate(),
        "numpy": [str(part) for part in numpy.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "dataset": dataset and id(dataset.__init__),
    }


def run(script: Path, *arguments, **options) -> int:
    """`run_script`, and the process is as it was, whatever happens."""
    before = process()
    try:
        return run_script(script, [*map(str, arguments)], **options)
    finally:
        assert process() == before


def write_script(folder: Path, source: str, name: str = "run_it.py", choice: str = CHOICE) -> Path:
    """A script that chooses its hyperparameter class as the stock ones do, and goes on with ``source``."""
    path = folder / name
    path.write_text(dedent(choice) + dedent(source))
    return path


# How a script runs


def test_a_script_runs_as_main_under_easyedits_seed(work):
    folder = work / "examples"
    folder.mkdir()
    (folder / "beside.py").write_text("VALUE = 5")
    script = write_script(
        folder,
        """
        import random, sys
        import numpy, torch
        import beside

        def typed(x: int): pass

        json.dump({
            "typed": typed.__annotations__["x"] is int,
            "name": __name__, "argv": sys.argv, "file": __file__, "main": sys.modules["__main__"].__dict__ is globals(),
            "beside": beside.VALUE, "drawn": [random.random(), numpy.random.rand(), torch.rand(1).item()],
        }, open("seen.json", "w"))
        """,
    )
    assert run(script, "--editing_method", "FT") == 0
    seen = json.loads((work / "seen.json").read_text())
    random.seed(42), numpy.random.seed(42), torch.manual_seed(42)
    drawn = [random.random(), numpy.random.rand(), torch.rand(1).item()]
    command = [str(script), "--editing_method", "FT"]
    expected = {
        "typed": True,
        "name": "__main__",
        "argv": command,
        "file": str(script),
        "main": True,
        "beside": 5,
        "drawn": drawn,
    }
    assert seen == expected
    assert "beside" not in sys.modules  # another script's is another one


def test_what_is_not_installed_raises_on_use_only(work):
    script = write_script(
        work,
        """
        from easyeditor import BaseEditor, NoSuchDataset
        from easyeditor.models.no_such_method import no_such_function
        from no_such_package.part import Thing
        for absent, name in ((NoSuchDataset, "NoSuchDataset"), (no_such_function, "no_such_method"), (Thing, "no_such_package")):
            try:
                absent("argument")
            except ImportError as error:
                assert name in str(error), error
            else:
                raise SystemExit(f"{absent} works")
        """,
    )
    assert run(script, "--editing_method", "FT") == 0


def test_results_go_into_folders_that_are_not_there_yet(work):
    script = write_script(work, "json.dump([1], open('output/new/results.json', 'w'))")
    assert run(script, "--editing_method", "FT") == 0
    assert json.loads((work / "output/new/results.json").read_text()) == [1]
    script.write_text(script.read_text().replace("'w'", "'r'").replace("new", "other"))
    with pytest.raises(ScriptError, match="FileNotFoundError"):  # reading makes none
        run(script, "--editing_method", "FT")
    assert not (work / "output/other").exists()


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(3)", 3), ("sys.exit('no luck')", 1), ("", 0)]
)
def test_exit_codes(work, capsys, end, code):
    script = write_script(work, f"import sys\n{end}")
    assert run(script, "--editing_method", "FT") == code
    assert ("no luck" in capsys.readouterr().err) == ("luck" in end)


def test_wrong_arguments_are_the_scripts_own_business(work, capsys):
    script = write_script(work, "")
    assert run(script, "--editing_method", "FT", "--size", "3") == 2
    assert "run_it.py: error: unrecognized arguments: --size 3" in capsys.readouterr().err
    assert run(script) == 2
    assert "--editing_method" in capsys.readouterr().err


# Any method


@pytest.mark.parametrize(
    ("method", "chosen"),
    [
        ("KNE", "KNEHyperParams"),
        ("ROME", "ROMEHyperParams"),
        ("LoRA", "LoRAHyperParams"),
        ("FT", "OwnHyperParams"),
        ("SPECIAL", "OwnHyperParams"),
    ],
)
def test_a_chain_takes_any_method_and_keeps_its_own_branches(work, method, chosen):
    script = write_script(
        work,
        """
        if args.editing_method == "FT":
            default_hparams = FTHyperParams
        else:  # a choice, not a refusal
            default_hparams = None
        assert (default_hparams is None) == (args.editing_method != "FT")
        open("seen", "w").write(editing_hparams.__name__)
        """,
    )
    assert run(script, f"--editing_method={method}") == 0
    assert (work / "seen").read_text() == chosen


def test_a_chain_within_a_function_and_of_a_plain_name(work):
    script = write_script(
        work,
        """
        import sys
        from easyeditor import FTHyperParams

        def choose(editing_method):
            if editing_method == "FT":
                hparams_class = FTHyperParams
            else:
                print("unknown")
                raise NotImplementedError(f"{editing_method} is not implemented")
            return hparams_class

        assert choose(sys.argv[sys.argv.index("--editing_method") + 1]).__name__ == "KNEHyperParams"
        """,
        choice="",
    )
    assert run(script, "--editing_method", "KNE") == 0


def test_a_label_brings_its_settings(work):
    script = write_script(
        work,
        "hparams = editing_hparams.from_hparams(args.hparams_dir)\nopen('seen', 'w').write(f'{hparams.alg_name} {hparams.num_steps}')",
    )
    assert run(script, "--editing_method", "AdaLoRA", "--hparams_dir", SHIPPED / "AdaLoRA/smollm2-135m") == 0
    assert (work / "seen").read_text() == "LoRA 70"
    with pytest.raises(
        ScriptError, match="objective_optimization is 'target_new', but FT-L is objective_optimization: prompt_last"
    ):
        run(script, "--editing_method", "FT-L", "--hparams_dir", SHIPPED / "FT/smollm2-135m.yaml")


TABLE = """
    import sys
    from easyeditor import FTHyperParams, ROMEHyperParams
    TABLE = {"FT": FTHyperParams, "Mine": ROMEHyperParams}
    OTHER = {"FT": 1}

    class args:
        editing_method = sys.argv[sys.argv.index("--editing_method") + 1]

    assert "nonsense" not in TABLE and list(TABLE) == ["FT", "Mine"] and type(OTHER) is dict
    assert args.editing_method in TABLE, "not in the table"
    open("seen", "w").write(TABLE[args.editing_method].__name__)
"""


@pytest.mark.parametrize(
    ("method", "chosen"), [("KNE", "KNEHyperParams"), ("MEMIT", "MEMITHyperParams"), ("Mine", "ROMEHyperParams")]
)
def test_a_table_takes_any_method(work, method, chosen):
    assert run(write_script(work, TABLE, choice=""), "--editing_method", method) == 0
    assert (work / "seen").read_text() == chosen


def test_the_file_on_disk_stays(work):
    script = write_script(work, "")
    before = script.read_bytes()
    run(script, "--editing_method", "KNE")
    assert script.read_bytes() == before
    assert list(work.iterdir()) == [script]


def test_a_whole_edit(work, tiny):
    """Load, edit, evaluate, dump, as the stock scripts do it."""
    script = write_script(
        work,
        """
        from easyeditor import BaseEditor
        hparams = editing_hparams.from_hparams(args.hparams_dir)
        editor = BaseEditor.from_hparams(hparams)
        metrics, edited_model, _ = editor.edit(
            prompts=["The capital of France is", "The capital of Spain is"], target_new=["Rome", "Oslo"], subject=["France", "Spain"],
            keep_original_weight=True)
        json.dump(metrics, open(f"./output/{args.editing_method}_results.json", "w"), default=float)
        """,
    )
    assert run(script, "--editing_method", "KNE", "--hparams_dir", tiny / "kne") == 0
    assert run(script, "--editing_method", "AdaLoRA", "--hparams_dir", tiny / "AdaLoRA.yaml") == 0
    for method, success in (("KNE", 100), ("AdaLoRA", 0)):
        figures = summarize_metrics([record["metrics"] for record in read_results(f"output/{method}_results.json")])
        assert (figures["edit_success"], figures["records"]) == (success, 2)


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
    with pytest.raises(ScriptError, match="line .*other records: delete it or move it away"):
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
        "run_it.py: the results are complete in results.json; only the script's own closing eval() failed (TypeError: unsupported"
        in out
    )
    assert "| results.json |       100.00 |        - |           - |    50.00 |" in out


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


# Records that EasyEdit refuses


def edit(editor, **changes) -> list[dict]:
    given = {
        "prompts": ["The capital of France is", "The capital of Spain is"],
        "target_new": ["Rome", "Oslo"],
        "subject": ["France", "Spain"],
        "keep_original_weight": True,
        "verbose": False,
    }
    return editor.edit(**{**given, **changes})[0]


def test_all_records_whose_subject_is_not_in_the_prompt_are_named():
    editor = bridge.editor_for(tiny_hparams(), make_llama(), make_tokenizer())
    subjects = ["France", "Peru", None, "spain", "Italy", "Rome"]
    prompts = [f"The capital of {name} is" for name in ("France", "Spain", "Peru", "Spain", "Italy", "Lima")]
    with pytest.raises(
        ValueError,
        match="in 4 of 6 records it does not: 1, 2, 3, 5 .record 1: subject 'Peru', prompt 'The capital of Spain is'",
    ) as caught:
        edit(editor, prompts=prompts, target_new=["Rome"] * 6, subject=subjects)
    assert "leave them out: `kne easyedit-run --skip-bad`" in str(caught.value)
    with pytest.raises(ValueError, match="subject: 1 for 2 prompts"):
        edit(editor, subject=["France"])
    assert len(edit(editor)) == 2


RECORDS = [
    {
        "subject": s,
        "prompt": f"The capital of {p} is",
        "target_new": "Rome",
        "ground_truth": "Paris",
        "portability": {},
        "locality": {},
    }
    for s, p in (("France", "France"), ("Peru", "Spain"), ("Spain", "Spain"), ("Rome", "Peru"))
]
DATASET = """
    from easyeditor import KnowEditDataset
    data = KnowEditDataset("records.json")
    json.dump([record["subject"] for record in data], open("seen.json", "w"))
"""


def test_bad_records_are_left_out_only_if_asked(work, capsys):
    (work / "records.json").write_text(json.dumps(RECORDS))
    script = write_script(work, DATASET)
    if not hasattr(bridge.register(), "KnowEditDataset"):
        with pytest.raises(ValueError, match="--skip-bad: this EasyEdit has no KnowEditDataset"):
            run(script, "--editing_method", "FT", skip_bad=True)
        with pytest.raises(ScriptError, match="ImportError: easyeditor.KnowEditDataset is not available"):
            run(script, "--editing_method", "FT")
        return
    assert run(script, "--editing_method", "FT") == 0
    assert json.loads((work / "seen.json").read_text()) == ["France", "Peru", "Spain", "Rome"]
    assert "left out" not in capsys.readouterr().out
    assert run(script, "--editing_method", "FT", skip_bad=True) == 0
    assert json.loads((work / "seen.json").read_text()) == ["France", "Spain"]
    assert "records.json: 2 records left out, their subject is not in their prompt: 1, 3" in capsys.readouterr().out


def test_nothing_can_be_left_out_of_other_data(work):
    with pytest.raises(ValueError, match="--skip-bad: run_it.py reads its records by itself"):
        run(write_script(work, "open('ran', 'w')"), "--editing_method", "FT", skip_bad=True)
    assert not (work / "ran").exists()


# Files of figures before the edit


@pytest.fixture
def pre_file(work):
    state = next(patch.state for patch in patches.report() if patch.name == "pre-edit-file")
    if state != patches.APPLIED:
        assert bridge.is_legacy()
        pytest.skip("the EasyEdit of 2023 neither reads nor writes a file of figures before the edit")
    return work / "tiny_pre_edit.json"


def test_a_pre_edit_file_serves_the_same_records_and_model(pre_file, monkeypatch):
    model, evaluated = make_llama(), []
    editors = sys.modules["easyeditor.editors.editor"]
    original = editors.compute_edit_quality
    monkeypatch.setattr(editors, "compute_edit_quality", lambda *a, **k: evaluated.append(1) or original(*a, **k))
    first = edit(bridge.editor_for(tiny_hparams(), model, make_tokenizer()), pre_file=str(pre_file))
    assert len(evaluated) == 4
    ft = bridge.load_method("FT", SHIPPED / "FT/smollm2-135m.yaml")
    ft.layers, ft.num_steps = [2], 1
    again = edit(
        bridge.editor_for(ft, model, make_tokenizer()),
        pre_file=str(pre_file),
        pre_edit=json.loads(pre_file.read_text()),
    )
    assert len(evaluated) == 6
    assert [m["pre"] for m in again] == json.loads(json.dumps([m["pre"] for m in first]))


def test_a_pre_edit_file_of_anything_else_is_refused(pre_file):
    model = make_llama()
    editor = bridge.editor_for(tiny_hparams(), model, make_tokenizer())
    edit(editor, pre_file=str(pre_file))
    before = weights(model)
    pre_edit = json.loads(pre_file.read_text())
    known = {"pre_file": str(pre_file), "pre_edit": pre_edit}
    other = bridge.editor_for(tiny_hparams(), make_llama(seed=11), make_tokenizer())
    for changed, changes in (
        (editor, {"target_new": ["Rome", "Paris"]}),
        (editor, {"test_generation": True}),
        (other, {}),
    ):
        with pytest.raises(
            ValueError,
            match="tiny_pre_edit.json: these figures before the edit are of other records.*delete the file or move it away",
        ):
            edit(changed, **known, **changes)
    sidecar = pre_file.with_name(f"{pre_file.name}.kne.json")
    text = sidecar.read_text()
    for content in (text[:5], "[]"):
        sidecar.write_text(content)
        with pytest.raises(ValueError, match="delete the file"):
            edit(editor, **known)
    sidecar.unlink()  # a run without this check
    with pytest.raises(ValueError, match="delete the file"):
        edit(editor, **known)
    assert weights(model) == before
    sidecar.write_text(text)
    edit(editor, **known)


def test_an_old_pre_edit_file_is_not_trusted_while_it_is_made_anew(pre_file, monkeypatch):
    editor = bridge.editor_for(tiny_hparams(), make_llama(), make_tokenizer())
    edit(editor, pre_file=str(pre_file))
    sidecar = pre_file.with_name(f"{pre_file.name}.kne.json")
    old = sidecar.read_text()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["easyeditor.editors.editor"], "compute_edit_quality", interrupted)
        with pytest.raises(KeyboardInterrupt):
            edit(editor, target_new=["Oslo", "Rome"], pre_file=str(pre_file))
    assert not sidecar.exists()
    edit(editor, target_new=["Oslo", "Rome"], pre_file=str(pre_file))
    assert sidecar.read_text() != old


# The command


def test_all_behind_the_script_is_the_scripts(work):
    (work / "text.txt").write_text("some text\n")
    script = write_script(
        work,
        "import sys\nfrom kne_easyedit.bridge.text_source import current_text_source\n'--editing_method'\n"
        "open('seen', 'w').write(' '.join(sys.argv[1:]))\n"
        "open('source', 'w').write(f'{current_text_source().file} {current_text_source().samples}')",
        choice="",
    )
    wanted = ["--editing_method", "KNE", "--skip-bad", "-v", "--stats-text", "none", "--s", "--help"]
    before = process()
    assert cli.main(["easyedit-run", "--stats-text", "text.txt", "--stats-samples", "7", str(script), *wanted]) == 0
    assert process() == before
    assert (work / "seen").read_text() == " ".join(wanted)
    assert (work / "source").read_text() == f"{Path('text.txt').absolute()} 7"
    assert current_text_source() == TextSource()


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


# The stock scripts


@pytest.fixture
def tiny(work):
    """A tiny model under a name that no EasyEdit knows, hyperparameters of three methods, and records of every format."""
    make_llama().save_pretrained(work / "tiny-smol")
    make_tokenizer().save_pretrained(work / "tiny-smol")
    model = str(work / "tiny-smol")
    (work / "kne.yaml").write_text(json.dumps(tiny_hparams(model_name=model).to_dict()))  # JSON is YAML
    for method, changes in (("FT", {"layers": [2], "lr": 0.05}), ("AdaLoRA", {"num_steps": 2})):
        settings = yaml.safe_load((SHIPPED / method / "smollm2-135m.yaml").read_text())
        (work / f"{method}.yaml").write_text(json.dumps({**settings, **changes, "model_name": model}))

    def probe(prompt: str, answer: str) -> dict:
        return {"prompt": prompt, "ground_truth": [[answer]]}

    facts = (("France", "Rome"), ("Spain", "Oslo"), ("Peru", "Lima"))
    knowedit = [
        {
            "subject": subject,
            "prompt": f"The capital of {subject} is",
            "target_new": target,
            "ground_truth": "Paris",
            "portability": {
                "Reasoning": [probe(f"The river that flows through the capital of {subject} is", "the Tiber")]
            },
            "locality": {"Relation_Specificity": [probe(f"The language spoken in {subject} is", "Latin")]},
        }
        for subject, target in facts
    ]
    zsre = [
        {
            "src": f"What is the capital of {subject} ?",
            "rephrase": f"The capital of {subject} is",
            "alt": target,
            "subject": subject,
            "loc": "The river that flows through Rome is",
            "loc_ans": "the Tiber",
            "portability": {"New Question": f"The language spoken in {subject} is", "New Answer": "Latin"},
        }
        for subject, target in facts
    ]
    (work / "ZsRE").mkdir()
    for name, data in (
        ("knowedit.json", knowedit),
        ("zsre_mend_eval_portability_gpt4.json", zsre),
        ("zsre_mend_eval.json", zsre),
        ("ZsRE/zsre_mend_edit.json", zsre),
        ("ZsRE/zsre_mend_train.json", zsre),
    ):
        (work / name).write_text(json.dumps(data))
    return work


def examples() -> Path:
    return bridge.locate() / "examples"


def stock(name: str) -> Path:
    if not (examples() / "run_knowedit_llama2.py").is_file():
        pytest.skip(
            "THIS EASYEDIT HAS NO EXAMPLES BESIDE IT: ITS SCRIPTS WERE NOT RUN (set EASYEDIT_HOME to a checkout)"
        )
    if not (examples() / name).is_file():
        pytest.skip(f"THIS EASYEDIT HAS NO {name}: IT WAS NOT RUN")
    return examples() / name


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
        ScriptError, match="record 1: subject 'Italy', prompt 'The capital of Spain is'.*easyedit-run --skip-bad"
    ):
        run(script, *arguments)
    assert run(script, *arguments, skip_bad=True) == 0
    assert "1 records left out, their subject is not in their prompt: 1" in capsys.readouterr().out
    assert len(read_results("output/KNE_counterfact_tiny-smol_results.json")) == 2
    records[1]["subject"] = "Spain"
    (tiny / "knowedit.json").write_text(json.dumps(records))
    with pytest.raises(ScriptError, match="pre_file.*delete it or move it away"):  # three records now
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
