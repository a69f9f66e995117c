"""EasyEdit's example scripts run as they are on disk, with any method: small scripts of the same make."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import make_llama
from edits import thing_of
from script_runs import (  # noqa: F401 (the fixtures)
    SHIPPED,
    examples,
    process,
    run,
    stock,
    tiny_files,
    work_folder,
    write_script,
)

from kne_easyedit import bridge, cli
from kne_easyedit.bridge import TextSource, scripts
from kne_easyedit.bridge.scripts import ScriptError
from kne_easyedit.bridge.text_source import current_text_source
from kne_easyedit.edits import EditStore
from kne_easyedit.metrics import read_results, summarize_metrics

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
        names = {"NoSuchDataset": NoSuchDataset, "no_such_method": no_such_function, "no_such_package": Thing}
        for name, absent in names.items():
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
        "hparams = editing_hparams.from_hparams(args.hparams_dir)\n"
        "open('seen', 'w').write(f'{hparams.alg_name} {hparams.num_steps}')",
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
            prompts=["The capital of France is", "The capital of Spain is"],
            target_new=["Rome", "Oslo"],
            subject=["France", "Spain"],
            keep_original_weight=True)
        json.dump(metrics, open(f"./output/{args.editing_method}_results.json", "w"), default=float)
        """,
    )
    assert run(script, "--editing_method", "KNE", "--hparams_dir", tiny / "kne") == 0
    assert run(script, "--editing_method", "AdaLoRA", "--hparams_dir", tiny / "AdaLoRA.yaml") == 0
    for method, success in (("KNE", 100), ("AdaLoRA", 0)):
        figures = summarize_metrics([record["metrics"] for record in read_results(f"output/{method}_results.json")])
        assert (figures["edit_success"], figures["records"]) == (success, 2)


@pytest.mark.parametrize("stays", [False, True])
def test_every_edit_of_a_script_is_kept_in_a_store(work, tiny, stays, capsys):
    """The store has on what the model has after the last edit: undone ones are off."""
    keeping = "keep_original_weight=False" if bridge.is_legacy() else "sequential_edit=True"
    script = write_script(
        work,
        f"""
        from easyeditor import BaseEditor
        hparams = editing_hparams.from_hparams(args.hparams_dir)
        editor = BaseEditor.from_hparams(hparams)
        editor.edit(
            prompts=["The capital of France is", "The capital of Spain is"],
            target_new=["Rome", "Oslo"],
            subject=["France", "Spain"],
            {keeping if stays else "keep_original_weight=True"})
        """,
    )
    before = process()
    settings = ("--editing_method", "KNE", "--hparams_dir", str(tiny / "kne"))
    assert cli.main(["easyedit-run", "--keep-edits", "kept", str(script), *settings]) == 0
    assert process() == before
    first, second = EditStore("kept").list()
    assert first.facts == ("The capital of France is -> Rome",) and second.facts == ("The capital of Spain is -> Oslo",)
    assert (first.on, second.on) == (stays, True)
    assert second.trained_on == ((first.id,) if stays else ())
    alone = [edit.facts for edit in EditStore("kept").active().edits]
    assert alone == [first.facts, second.facts][-1 - stays :]
    capsys.readouterr()
    assert cli.main(["easyedit-run", str(script), *settings]) == 0  # without the option nothing is kept
    assert len(EditStore("kept").list()) == 2


def test_an_edit_that_the_model_did_not_get_is_not_kept(work, tiny, capsys):
    """The first fact is reached; the second one is not, and the settings make that an error."""
    script = write_script(
        work,
        """
        from easyeditor import BaseEditor
        hparams = editing_hparams.from_hparams(args.hparams_dir)
        def edit(of, target):
            editor = BaseEditor.from_hparams(hparams)
            editor.edit(prompts=[f"The capital of {of} is"], target_new=[target], subject=[of])
        edit("France", "Rome")
        hparams.num_steps, hparams.lr, hparams.on_failure = 1, 1e-9, "raise"
        try:
            edit("Spain", "Oslo")
        except Exception as error:
            print("refused:", type(error), error)
        else:
            print("not refused")
        """,
    )
    settings = ("--editing_method", "KNE", "--hparams_dir", str(tiny / "kne"))
    assert cli.main(["easyedit-run", "--keep-edits", "kept", str(script), *settings]) == 0
    assert "Nothing was written" in capsys.readouterr().out
    (entry,) = EditStore("kept").list()
    assert entry.on and EditStore("kept").edit(entry.id).steps > 1


def test_edits_are_not_kept_among_others(work, tiny, capsys):
    """Which edits of a store in use are on is for its user to say."""
    EditStore("mine").add(thing_of(make_llama()), "mine")
    script = write_script(work, "raise AssertionError")
    assert cli.main(["easyedit-run", "--keep-edits", "mine", str(script), "--editing_method", "KNE"]) == 1
    assert "mine has 1 edits already" in capsys.readouterr().err
    assert [(entry.id, entry.on) for entry in EditStore("mine").list()] == [("mine", True)]


def test_only_edits_of_kne_are_kept(work, tiny, capsys):
    script = write_script(work, "raise AssertionError")
    for arguments, message in [
        (("--keep-edits", "kept", str(script), "--editing_method", "FT"), "--keep-edits: keeps edits of KNE"),
        (("--keep-edits", str(script), str(script), "--editing_method", "KNE"), "is a file, expected a folder"),
    ]:
        assert cli.main(["easyedit-run", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (work / "kept").exists()


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


# The text for second moments


def test_samples_continue_prompts_that_have_nothing_to_do_with_the_first_edit():
    """As in `kne run`; a source that has prompts keeps them. The context ends with the script."""
    seen = []

    class BaseEditor:
        def edit(self, prompts, **_):
            seen.append(current_text_source())

    original = BaseEditor.edit
    for source in (TextSource(samples=3), TextSource(samples=3, prompts=["own"])):
        with scripts._text_after_prompts(SimpleNamespace(BaseEditor=BaseEditor), source):
            BaseEditor().edit(["The capital of Germany is", "b"], subject=["Germany", "b"])
            BaseEditor().edit("c")
    assert {found.samples for found in seen} == {3} and [found.prompts for found in seen[2:]] == [("own",)] * 2
    assert seen[0].prompts == seen[1].prompts and "The capital of Italy is" in seen[0].prompts
    assert not [prompt for prompt in seen[0].prompts if "Germany" in prompt]
    assert BaseEditor.edit is original
    assert current_text_source() == TextSource()
