"""``kne edit``, ``kne ask``, ``kne show``: a fact is edited, asked before and after, and looked at."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer, tiny_hparams, weights, with_same_threads
from safetensors.torch import load_file, save_file

from kne_easyedit import cli
from kne_easyedit.benchmark.before_after import answers_to
from kne_easyedit.editing import applying
from kne_easyedit.editing.edit import compute_edit
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.edits.sizes import ensemble_of, shared_rows, sizes_of
from kne_easyedit.models.loading import load_model

FACT = ("--prompt", "The capital of France is", "--target", "Rome")


def kne(*arguments: str) -> int:
    return cli.main([*arguments])


@pytest.fixture(name="tiny", scope="module")
def tiny_fixture(tmp_path_factory):
    """A tiny model on disk, its settings, and one edit of it."""
    folder = tmp_path_factory.mktemp("edit")
    make_llama().save_pretrained(folder / "tiny-model")
    make_tokenizer().save_pretrained(folder / "tiny-model")
    hparams = tiny_hparams(model_name=str(folder / "tiny-model")).to_dict()
    (folder / "kne.yaml").write_text(json.dumps(hparams))  # JSON is YAML
    out = ("--hparams", str(folder / "kne.yaml"), "--neighbours", "2", "--out")
    assert kne("edit", *FACT, "--subject", "France", *out, str(folder / "rome")) == 0
    assert kne("edit", "--prompt", "The language of Peru is", "--target", "Latin", *out, str(folder / "latin")) == 0
    return folder


@pytest.fixture(autouse=True)
def in_its_folder(tiny, monkeypatch):
    monkeypatch.chdir(tiny)


def base(tiny: Path):
    return load_model(tiny_hparams(model_name=str(tiny / "tiny-model")))


def test_a_fact_is_edited_shown_and_saved(tiny, capsys):
    assert kne("edit", *FACT, "--hparams", "kne.yaml", "--neighbours", "2", "--out", "again", "--old", "Paris") == 0
    out = capsys.readouterr().out
    before, after = re.search(r"P\(Rome\) *\| ([\d.]+)% *\| ([\d.]+)%", out).groups()
    assert float(before) < 50 < float(after)
    assert re.search(r"P\(Paris\) *\| ", out) and "of 2 begin as before" in out
    edit = KNEEdit.load("again")
    assert edit.facts == ("The capital of France is -> Rome",) and edit.answers[0].greedy
    assert edit.requests[0]["ground_truth"] == "Paris"
    model, tokenizer = base(tiny)
    hparams = tiny_hparams(model_name=str(tiny / "tiny-model"))
    same = compute_edit(model, tokenizer, list(edit.requests), hparams)
    assert edit.losses == same.losses and edit.rows == same.rows  # what was saved is what Python trains
    for name, (_, delta) in same.deltas.items():
        torch.testing.assert_close(edit.deltas[name][1], delta, rtol=0, atol=0)
    assert edit.deltas.keys() == KNEEdit.load("rome").deltas.keys()  # the same settings and fact


def test_a_file_of_facts_is_one_edit(tiny, capsys):
    rows = ["prompt,target_new,subject", "The capital of Spain is,Lima,Spain", "The capital of Peru is,Oslo,Peru"]
    rows += ["The capital of Italy is,Madrid,Italy", "What is the language of Italy ?,Latin,Italy"]
    Path("facts.csv").write_text("\n".join(rows))
    assert kne("edit", "--requests", "facts.csv", "--hparams", "kne.yaml", "--neighbours", "0", "--out", "four") == 0
    out = capsys.readouterr().out
    assert "4 facts in" in out and "... and 1 facts more" in out
    assert len(KNEEdit.load("four").requests) == 4
    assert kne("edit", "--requests", "facts.csv", "--records", "1", "--hparams", "kne.yaml", "--out", "one") == 0
    assert KNEEdit.load("one").facts == ("The capital of Spain is -> Lima",)


def test_without_settings_they_are_made_for_the_model(tiny, capsys):
    model = ("--model", str(tiny / "tiny-model"))
    quick = ("--set", "p=0.3", "lr=0.05", "attribution_steps=4", "localization_data=null", "device=cpu")
    assert kne("edit", *model, *FACT, *quick, "--neighbours", "0", "--out", "made") == 0
    edit = KNEEdit.load("made")
    assert edit.hparams["target_modules"] == ["model.layers.{}.mlp.down_proj"] and edit.answers[0].greedy


def test_the_papers_settings(tiny, monkeypatch):
    given = []

    def stop(hparams):
        given.append(hparams)
        raise ValueError("seen")

    monkeypatch.setattr("kne_easyedit.models.loading.load_model", stop)
    for options in ((), ("--paper",), ("--paper", "--set", "stop_loss=0.2")):
        assert kne("edit", *FACT, *options, "--out", "paper") == 1
    plain, paper, changed = given
    assert (plain.optimizer, plain.input_projection, plain.p) == ("polyak", True, 0.16)
    assert (paper.optimizer, paper.input_projection, paper.p, paper.stop_loss) == ("adamw", False, 0.04, 0.4)
    assert (changed.optimizer, changed.stop_loss) == ("adamw", 0.2)
    assert paper.model_name == plain.model_name and paper.localization_data == plain.localization_data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "The capital of France is"), "--prompt and --target belong together"),
        ((), "--prompt and --target belong together"),
        ((*FACT, "--subject", "Spain"), "'Spain' does not stand in the prompt"),
        ((*FACT[:3], " "), "request.target_new"),
        ((*FACT, "--requests", "facts.csv"), "takes the place of --prompt"),
        ((*FACT, "--records", "2"), "--records: counts the facts of a file"),
        (("--requests", "nowhere.csv"), "nowhere.csv does not exist"),
        ((*FACT, "--set", "p=2"), "p: 2.0 must be in (0, 1]"),
        ((*FACT, "--model", "nowhere"), "model_name: 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tiny, capsys, arguments, message):
    settings = () if "--model" in arguments else ("--hparams", "kne.yaml")
    assert kne("edit", *arguments, *settings, "--out", "bad") == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not Path("bad").exists()


def test_a_folder_that_holds_something_is_refused_before_the_model_is_loaded(tiny, capsys, monkeypatch):
    monkeypatch.setattr("kne_easyedit.models.loading.load_model", lambda *_: pytest.fail("loaded"))
    for folder, message in (("rome", "rome holds something"), ("kne.yaml", "kne.yaml is a file")):
        assert kne("edit", *FACT, "--hparams", "kne.yaml", "--out", folder) == 1
        assert message in capsys.readouterr().err


def test_a_fact_that_is_not_reached_is_an_error_if_the_settings_say_so(tiny, capsys):
    unreached = ("--set", "num_steps=1", "lr=1e-6", "on_failure=raise")
    assert kne("edit", *FACT, "--hparams", "kne.yaml", *unreached, "--neighbours", "0", "--out", "bad") == 1
    assert "Nothing was written" in capsys.readouterr().err and not Path("bad").exists()


def test_ask_shows_both_answers(tiny, capsys):
    assert kne("ask", "rome", "The capital of France is", "The language of Peru is", "--tokens", "4") == 0
    out = capsys.readouterr().out
    model, tokenizer = base(tiny)
    (before,) = answers_to(model, tokenizer, ["The capital of France is"], 4)
    assert re.search(rf"The capital of France is\n.*before.*after\n +\| {re.escape(before.strip())} *\| Rome", out)
    assert out.count("before") == 2


def test_prompts_stand_before_and_after_options(tiny, capsys):
    assert kne("ask", "rome", "The capital of France is", "--tokens", "1", "The river that") == 0
    both = capsys.readouterr().out
    assert "\nThe capital of France is\n" in both and "\nThe river that\n" in both
    assert kne("ask", "rome", "--tokens", "1", "The capital of France is", "The river that") == 0
    assert capsys.readouterr().out == both
    with pytest.raises(SystemExit):
        kne("ask", "rome", "--tokens", "1", "The river that", "--tokns", "2")
    assert "unrecognized arguments" in capsys.readouterr().err


def test_ask_reads_prompts_until_the_input_ends(tiny, capsys, monkeypatch):
    long = " ".join(["Rome"] * 99)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"The capital of France is\n\n{long}\nThe language of Peru is\n"))
    assert kne("ask", "rome", "--tokens", "2") == 0
    out, err = capsys.readouterr()
    assert out.count("before") == 2 and "Rome" in out
    assert "the model takes 64" in err  # and it went on


def test_many_questions_are_one_comparison_with_the_base(tiny, capsys, monkeypatch):
    """The matrices of the base are hashed once, however many questions follow."""
    calls = []
    original = applying.base_of
    monkeypatch.setattr(applying, "base_of", lambda *given: calls.append(1) or original(*given))

    def asked(prompts):
        calls.clear()
        monkeypatch.setattr("sys.stdin", io.StringIO(prompts * "The capital of France is\n"))
        assert kne("ask", "rome", "--tokens", "1") == 0
        assert capsys.readouterr().out.count("before") == prompts
        return len(calls)

    assert asked(1) == asked(3)


def test_ctrl_c_does_not_promise_to_resume(tiny, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kne_easyedit.models.loading.load_model", interrupt)
    assert kne("edit", *FACT, "--hparams", "kne.yaml", "--out", "interrupted") == 130
    assert "the same command begins again" in capsys.readouterr().err and not Path("interrupted").exists()


def test_a_base_that_is_gone(tiny, tmp_path, capsys):
    from dataclasses import replace

    edit = KNEEdit.load("rome")
    replace(edit, hparams={**edit.hparams, "model_name": str(tmp_path / "gone")}).save(tmp_path / "lost")
    assert kne("ask", str(tmp_path / "lost"), "Rome") == 1
    assert "say where it is by --model" in capsys.readouterr().err
    assert kne("ask", str(tmp_path / "lost"), "Rome", "--tokens", "1", "--model", str(tiny / "tiny-model")) == 0


def test_what_others_have_written_has_no_effect_on_the_terminal(tiny, tmp_path, capsys):
    from dataclasses import replace

    asked = {"prompt": "The capital\x1b[2J of\nFrance is", "target_new": "\x1b]0;x\x07Rome", "ground_truth": "\x9b1m"}
    edit = replace(KNEEdit.load("rome"), requests=(asked,), versions={"evil\x1b[1m": "1"}, trained_on=("\x1b[31m",))
    edit.save(tmp_path / "evil")
    store = str(tmp_path / "store")
    assert kne("edits", "add", store, str(tmp_path / "evil"), "--name", "evil") == 0
    assert kne("edits", "list", store) == 0
    assert kne("show", f"{store}/edits/evil", "--picture", str(tmp_path / "x.png")) == 0
    assert kne("ask", f"{store}/edits/evil", "The capital of France is", "--tokens", "1") == 0
    assert kne("adapter", store, "--out", str(tmp_path / "adapter")) == 0
    assert kne("show", "rome", "--with", str(tmp_path / "evil"), "--picture", str(tmp_path / "x.png")) == 0
    out = capsys.readouterr().out
    assert not {c for c in out if not c.isprintable()} - {"\n"}
    assert "The capital [2J of France is" in out and "Trained on top of 1 edit that is not in here" in out


def test_ask_in_the_chat_template(tiny, capsys):
    assert kne("ask", "rome", "Rome", "--chat") == 1
    assert "has no chat template" in capsys.readouterr().err


def test_another_base_is_refused_unless_forced(tiny, capsys):
    make_llama(seed=11).save_pretrained("other-model")
    make_tokenizer().save_pretrained("other-model")
    assert kne("ask", "rome", "Rome", "--model", "other-model") == 1
    assert "the weights of" in capsys.readouterr().err
    assert kne("ask", "rome", "Rome", "--model", "other-model", "--force") == 0
    assert kne("ask", "rome", "Rome", "--set", "p=0.2") == 1
    assert "--set p: only model_name, device" in capsys.readouterr().err


def test_asking_in_a_new_process_and_the_base_stays(tiny):
    """What is on disk is the whole edit; the model's files and the weights of whoever loads them are the base's."""
    files = {path: path.read_bytes() for path in (tiny / "tiny-model").iterdir()}
    command = [sys.executable, "-m", "kne_easyedit.cli", "ask", "rome", "The capital of France is", "--tokens", "1"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=with_same_threads(), cwd=tiny).stdout
    assert re.search(r"\| Rome$", out.strip())
    assert files == {path: path.read_bytes() for path in (tiny / "tiny-model").iterdir()}
    model, tokenizer = base(tiny)
    unedited, edit = weights(model), KNEEdit.load("rome")
    with edit.applied(model):
        assert weights(model) != unedited
        assert answers_to(model, tokenizer, ["The capital of France is"], 1)[0].strip() == "Rome"
    assert weights(model) == unedited


def test_a_picture_that_cannot_be_written_is_named_before_the_work(tiny, capsys):
    Path("taken").mkdir(exist_ok=True)
    assert kne("show", "rome", "--picture", "taken") == 1
    said = capsys.readouterr()
    assert "--picture: taken is a folder, expected the name of a file" in said.err and not said.out


def test_show_says_what_the_edit_is(tiny, capsys):
    assert kne("show", "rome", "--with", "latin", "rome", "--picture", "out.png") == 0
    out = capsys.readouterr().out
    edit = KNEEdit.load("rome")
    assert "The capital of France is  ->  Rome   P " in out
    assert f"in all {edit.size} rows of {len(edit.deltas)} modules" in out and "% of the changed rows' weights" in out
    assert (
        f"{edit.size} rows are changed by both: 100% of this edit's" in out and "cosine of the changes is +1.00" in out
    )
    assert "with latin (The language of Peru is -> Latin)" in out
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path("rome").iterdir()) == ["edit.json", "rows.safetensors"]


def test_show_without_the_base_at_hand(tiny, capsys):
    assert kne("show", "rome", "--model", "gone", "--picture", "out.png") == 0
    out = capsys.readouterr().out
    assert "the base's weights are not at hand" in out and "'gone' is not on this machine" in out


@pytest.mark.parametrize("damage", ["missing", "foreign", "truncated", "pickle"])
def test_a_folder_that_is_no_edit_is_one_line(tiny, tmp_path, capsys, damage):
    folder = tmp_path / "bad"
    if damage != "missing":
        folder.mkdir()
        (folder / "edit.json").write_bytes(Path("rome/edit.json").read_bytes())
        (folder / "rows.safetensors").write_bytes(Path("rome/rows.safetensors").read_bytes())
    if damage == "foreign":
        (folder / "edit.json").write_text("{}")
    elif damage == "truncated":
        (folder / "rows.safetensors").write_bytes(Path("rome/rows.safetensors").read_bytes()[:-9])
    elif damage == "pickle":
        torch.save({}, folder / "rows.safetensors")
    for command in (("ask", str(folder), "Rome"), ("show", str(folder))):
        assert kne(*command) == 1
        error = capsys.readouterr().err
        assert error.startswith("kne: edit: ") and str(folder) in error


def test_show_with_a_damaged_base(tiny, tmp_path, capsys):
    content = (tiny / "tiny-model/model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((tiny / "tiny-model/config.json").read_bytes())
    for damaged in (content[:-8], b"\xff" * 64, b""):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        assert kne("show", "rome", "--model", str(tmp_path), "--picture", str(tmp_path / "x.png")) == 0
        out = capsys.readouterr().out
        assert f"{tmp_path}/model.safetensors: no complete safetensors file" in out
        assert "the base's weights are not at hand" in out


def test_sizes_are_those_of_the_weights(tiny, tmp_path):
    """Against the loaded base; a sharded file, and one without the outer module's name, say the same."""
    edit, (model, _) = KNEEdit.load("rome"), base(tiny)
    for size in sizes_of(edit, tiny / "tiny-model"):
        chosen, delta = edit.deltas[size.module]
        weight = model.get_submodule(size.module).weight[torch.tensor(chosen)]
        assert size.rows == len(chosen) and size.outputs == 24
        assert size.change == pytest.approx(delta.norm().item(), rel=1e-5)
        assert size.share == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-5)
    tensors = load_file(tiny / "tiny-model/model.safetensors")
    plain = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(plain, tmp_path / "model.safetensors")
    assert sizes_of(edit, tmp_path) == sizes_of(edit, tiny / "tiny-model")
    assert sizes_of(edit)[0].share is None
    save_file(
        {name: value[:, :-1].contiguous() for name, value in plain.items() if value.ndim == 2},
        tmp_path / "model.safetensors",
    )
    assert sizes_of(edit, tmp_path)[0].share is None  # another model's


def test_shared_rows_and_their_direction(tiny):
    from dataclasses import replace

    edit, other = KNEEdit.load("rome"), KNEEdit.load("latin")
    against = replace(edit, deltas={name: (rows, -delta) for name, (rows, delta) in dict(edit.deltas).items()})
    assert shared_rows(edit, against).cosine == pytest.approx(-1)
    assert shared_rows(edit, other).rows == edit.shared_rows(other)
    first = next(iter(edit.deltas))
    alone = replace(edit, deltas={first: edit.deltas[first]}, ensemble=None)
    assert shared_rows(alone, edit).modules == ((first, len(edit.deltas[first][0])),)
    drawn = ensemble_of(alone)
    assert drawn.size == len(edit.deltas[first][0]) and drawn.members() <= ensemble_of(edit).members()


LONG = " ".join(["river"] * 200)


def test_a_prompt_that_the_model_cannot_take(tiny, capsys):
    """It is named before anything is asked; of a file by its number, and the others are edited if they are to be."""
    settings = ("--hparams", "kne.yaml", "--neighbours", "0", "--out", "long")
    assert kne("edit", "--prompt", LONG, "--target", "Rome", *settings) == 1
    assert "kne: --prompt, --target: prompt: " in capsys.readouterr().err
    records = [{"prompt": LONG, "target_new": "Rome"}, {"prompt": FACT[1], "target_new": FACT[3]}]
    Path("long.json").write_text(json.dumps(records))
    assert kne("edit", "--requests", "long.json", *settings) == 1
    assert "kne: long.json: record 0: prompt: " in capsys.readouterr().err and not Path("long").exists()
    assert kne("edit", "--requests", "long.json", "--on-bad-record", "skip", *settings) == 0
    assert "skipped: long.json: record 0: prompt: " in capsys.readouterr().out
    assert KNEEdit.load("long").facts == (f"{FACT[1]} -> {FACT[3]}",)
    Path("only.json").write_text(json.dumps(records[:1]))
    assert kne("edit", "--requests", "only.json", "--on-bad-record", "skip", *settings[:-1], "none") == 1
    assert "no fact of only.json can be used" in capsys.readouterr().err


def test_a_data_file_has_no_effect_on_the_terminal(tiny, tmp_path, capsys):
    """Names of categories reach complaints and warnings."""
    evil = "x\x1b]0;pwned\x07\x1b[31mred"
    own = {"portability": {evil: [{"ground_truth": "u"}]}}
    facts = [{"prompt": FACT[1], "target_new": FACT[3], **own}, {"prompt": FACT[1], "target_new": FACT[3]}]
    (tmp_path / "evil.json").write_text(json.dumps(facts))
    data = str(tmp_path / "evil.json")
    out = ("--neighbours", "0", "--out", str(tmp_path / "edit"))
    kne("edit", "--requests", data, "--on-bad-record", "skip", "--hparams", "kne.yaml", *out)
    kne("doctor", "--hparams", "kne.yaml", "--data", data, "--no-trial")
    handler = logging.StreamHandler(stream := io.StringIO())
    handler.setFormatter(cli._Plain("%(message)s"))
    handler.emit(logging.makeLogRecord({"msg": evil}))
    found = capsys.readouterr()
    shown = found.out + found.err + stream.getvalue()
    assert (
        "pwned" in found.out
        and "pwned" in stream.getvalue()
        and not {c for c in shown if not c.isprintable()} - set("\n\r")
    )
