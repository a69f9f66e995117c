"""``kne edits``: a store from the command line; one of several edits is taken back exactly."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer, tiny_hparams, weights, with_same_threads

from kne_easyedit import cli
from kne_easyedit.benchmark.before_after import Questions
from kne_easyedit.edits import EditStore
from kne_easyedit.models.loading import load_model

FACTS = {"rome": "The capital of France is", "latin": "The language of Peru is", "oslo": "The name of the mother is"}


def kne(*arguments: str) -> int:
    return cli.main([*arguments])


@pytest.fixture(name="folder", scope="module")
def folder_fixture(tmp_path_factory):
    """A tiny model, its settings, and an edit of it."""
    folder = tmp_path_factory.mktemp("edits")
    make_llama().save_pretrained(folder / "tiny-model")
    make_tokenizer().save_pretrained(folder / "tiny-model")
    hparams = tiny_hparams(model_name=str(folder / "tiny-model")).to_dict()
    (folder / "kne.yaml").write_text(json.dumps(hparams))  # JSON is YAML
    assert kne("edit", "--prompt", FACTS["rome"], "--target", "Rome", *settings(folder), "--out", f"{folder}/rome") == 0
    store = str(folder / "two")
    assert kne("edits", "add", store, f"{folder}/rome", "--name", "rome") == 0
    target = ("--prompt", FACTS["latin"], "--target", "Latin")
    assert kne("edit", *target, *settings(folder), "--store", store, "--name", "latin") == 0
    return folder


def settings(folder: Path) -> tuple[str, ...]:
    return ("--hparams", str(folder / "kne.yaml"), "--neighbours", "0")


@pytest.fixture(name="store")
def store_fixture(folder, monkeypatch, tmp_path):
    """A store with two edits; the second one was trained on top of the first."""
    monkeypatch.chdir(folder)
    store = str(tmp_path / "store")
    shutil.copytree(folder / "two", store)
    return store


def base(folder: Path):
    return load_model(tiny_hparams(model_name=str(folder / "tiny-model")))[0]


def test_edit_ask_new_process_off_and_the_base_again(store, folder, capsys):
    model = base(folder)
    unedited = weights(model)
    capsys.readouterr()
    assert kne("edits", "list", store) == 0
    out = capsys.readouterr().out
    assert "2 edits, 2 on" in out and "The capital of France is -> Rome" in out and "trained on top of rome" in out
    assert kne("ask", store, *list(FACTS.values())[:2], "--tokens", "1") == 0
    out = capsys.readouterr().out
    assert re.search(r"\| Rome\n", out) and re.search(r"\| Latin\n", out)
    EditStore(store).apply(model)
    both = weights(model)
    assert both != unedited

    assert kne("edits", "off", store, "rome") == 0
    command = [sys.executable, "-m", "kne_easyedit.cli", "ask", store, FACTS["latin"], "--tokens", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=with_same_threads()).stdout
    assert "| Latin" in said or "before" in said
    EditStore(store).apply(model)
    alone = weights(model)
    assert alone not in (both, unedited)
    other = base(folder)
    EditStore(store).edit("latin").apply(other)
    assert weights(other) == alone  # bit for bit as if the first had never been

    assert kne("edits", "off", store, "latin") == 0
    EditStore(store).apply(model)
    assert weights(model) == unedited
    assert kne("edits", "on", store, "latin", "rome") == 0
    EditStore(store).apply(model)
    assert weights(model) == both


def test_a_data_file_is_localised_on_the_base(store, folder, tmp_path):
    """As in one process: so its scores are cached, and all edits of a store share their neurons."""
    data = tmp_path / "data.csv"
    data.write_text("prompt,target_new\nThe capital of Spain is,Madrid\nThe capital of Peru is,Lima\n")
    for fact, target in ((FACTS["oslo"], "Oslo"), ("The capital of Italy is", "Lima")):
        arguments = ("--prompt", fact, "--target", target, *settings(folder), "--set", f"localization_data={data}")
        assert kne("edit", *arguments, "--store", store, "--name", target) == 0
    edits = {entry.id: EditStore(store).edit(entry.id).ensemble.members() for entry in EditStore(store).list()}
    assert edits["Oslo"] == edits["Lima"]
    assert edits["rome"] != edits["latin"]  # each on its own request


def test_what_was_trained_on_top_is_named_and_measured(store, capsys, caplog):
    assert kne("edits", "check", store) == 0
    assert "every fact that was reached is there" in capsys.readouterr().out
    assert kne("edits", "off", store, "rome") == 0  # as asked, whatever it costs
    out = capsys.readouterr().out
    assert "latin was trained on top of rome" in caplog.text and "latin may have lost answers" in out
    assert "not active before it: rome" in out and re.search(r"P [\d.]+% -> [\d.]+%", out)
    assert kne("edits", "check", store) == int("LOST" in out)
    capsys.readouterr()
    assert kne("edits", "off", store, "latin") == 0
    assert "P " not in capsys.readouterr().out  # nothing counted on it
    assert kne("edits", "check", store) == 0
    assert "the model is the base" in capsys.readouterr().out


def test_switching_off_without_the_model(store, capsys, monkeypatch):
    """Unasked for, or not to be had: the edit is off, and what measures is named."""
    monkeypatch.setattr("kne_easyedit.models.loading.load_model", lambda hparams: pytest.fail("it was loaded"))
    assert kne("edits", "off", store, "rome", "--no-check") == 0
    out = capsys.readouterr().out
    assert f"latin may have lost answers by this; `kne edits check {store}`" in out and "%" not in out
    monkeypatch.undo()
    assert kne("edits", "on", store, "rome") == 0
    assert kne("edits", "off", store, "rome", "--model", "nowhere") == 0
    out = capsys.readouterr().out
    assert "not measured: model_name: 'nowhere'" in out and f"kne edits check {store}" in out
    assert [entry.on for entry in EditStore(store).list()] == [False, True]


def test_what_is_shown_after_an_edit_is_the_state_of_the_store(store, folder, capsys, monkeypatch):
    """In bfloat16 an edit that is written by itself is rounded by itself; the store rounds once."""
    asked = []

    def ask(questions, model):
        asked.append(weights(model))
        return original(questions, model)

    original = Questions.ask
    monkeypatch.setattr(Questions, "ask", ask)
    options = (*settings(folder), "--set", "bf16=true", "num_steps=30")
    new = str(Path(store).parent / "bf16")
    for name, target in (("oslo", "Oslo"), ("latin", "Latin")):
        assert kne("edit", "--prompt", FACTS[name], "--target", target, *options, "--store", new, "--name", name) == 0
    model = load_model(tiny_hparams(model_name=str(folder / "tiny-model"), bf16=True))[0]
    EditStore(new).apply(model)
    assert asked[-1] == weights(model)


def test_show_compares_with_the_others_of_the_store(store, folder, tmp_path, capsys):
    picture = ("--picture", str(tmp_path / "x.png"))
    edit, other = (EditStore(store).edit(name) for name in ("rome", "latin"))
    assert edit.shared_rows(other)
    assert kne("show", f"{store}/edits/rome", *picture) == 0
    out = capsys.readouterr().out
    assert "with latin of this store, which is on (The language of Peru is -> Latin)" in out
    assert f"{edit.shared_rows(other)} rows are changed by both" in out
    assert kne("show", "rome", *picture) == 0
    assert "of this store" not in capsys.readouterr().out
    (Path(store) / "edits/latin/edit.json").write_text("{}")
    assert kne("show", f"{store}/edits/rome", *picture) == 0
    assert "(not compared: store: latin" in capsys.readouterr().out


def test_one_edit_of_a_store_says_what_it_lacks(store, tmp_path, capsys):
    note = "Trained on top of 1 edit that is not in here"
    for arguments, lacks in [(("ask", f"{store}/edits/latin"), True), (("ask", store), False)]:
        assert kne(*arguments, FACTS["latin"], "--tokens", "1") == 0
        assert (note in capsys.readouterr().out) == lacks
    for name, source in (("one", f"{store}/edits/latin"), ("both", store)):
        assert kne("adapter", source, "--out", str(tmp_path / name)) == 0
        assert (
            (note in capsys.readouterr().out)
            == (note in (tmp_path / name / "README.md").read_text())
            == (name == "one")
        )


def test_the_active_edits_become_a_full_model(store, folder, tmp_path, capsys):
    model = base(folder)
    EditStore(store).apply(model)
    (tmp_path / "full").mkdir()  # an empty folder may be there
    assert kne("merge", store, "tiny-model", "--out", str(tmp_path / "full")) == 0
    assert "2 edits merged into the weights of tiny-model" in capsys.readouterr().out
    assert weights(load_model(tiny_hparams(model_name=str(tmp_path / "full")))[0]) == weights(model)
    assert kne("merge", "rome", "tiny-model", "--out", str(tmp_path / "full")) == 1
    assert "holds something" in capsys.readouterr().err
    assert kne("merge", "rome", str(tmp_path / "full"), "--out", str(tmp_path / "twice")) == 1
    assert "--force" in capsys.readouterr().err and not (tmp_path / "twice").exists()
    assert kne("merge", "rome", str(tmp_path / "full"), "--out", str(tmp_path / "twice"), "--force") == 0
    assert kne("merge", f"{store}/edits/latin", "tiny-model", "--out", str(tmp_path / "alone")) == 0
    assert "Trained on top of 1 edit that is not in here" in capsys.readouterr().out


def test_another_order_and_removal(store, capsys):
    assert kne("edits", "reorder", store, "latin", "rome") == 0
    out = capsys.readouterr().out
    assert "latin may have lost answers by this" in out and "trained on top of rome, which is not active" in out
    assert [entry.id for entry in EditStore(store).list()] == ["latin", "rome"]
    assert kne("edits", "remove", store, "rome", "rome") == 0
    assert [entry.id for entry in EditStore(store).list()] == ["latin"]
    assert not (Path(store) / "edits/rome").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "{}-none"), "does not exist; `kne edits add"),
        (("list", "rome"), "is no store of edits"),
        (("off", "{}", "latin", "rmoe"), "did you mean 'rome'?"),
        (("on", "{}", "nobody"), "id: 'nobody' must be one of"),
        (("reorder", "{}", "rome"), "must be all ids of the store"),
        (("add", "{}", "rome", "rome", "--name", "x"), "--name: names one edit"),
        (("add", "{}", "nowhere"), "nowhere does not exist"),
        (("add", "rome", "rome"), "rome is no store of edits"),
        (("add", "{}", "{}"), "is a store of edits; name one of them"),
    ],
)
def test_bad_input_changes_nothing(store, capsys, arguments, message):
    before = EditStore(store).list()
    capsys.readouterr()
    assert kne("edits", *(argument.replace("{}", store) for argument in arguments)) == 1
    assert message in capsys.readouterr().err
    assert EditStore(store).list() == before


def test_a_taken_name_is_refused_before_the_model_is_loaded(store, folder, capsys, monkeypatch):
    monkeypatch.setattr("kne_easyedit.models.loading.load_model", lambda *_: pytest.fail("loaded"))
    fact = ("--prompt", FACTS["oslo"], "--target", "Oslo", *settings(folder))
    for arguments, message in [
        (("--store", store, "--name", "Latin"), "'Latin' is taken"),
        (("--store", store, "--name", "../x"), "../x"),
        (("--store", "rome"), "is no store of edits"),
        (("--out", "new", "--name", "x"), "--name: names an edit of a store"),
    ]:
        assert kne("edit", *fact, *arguments) == 1
        assert message in capsys.readouterr().err


def test_ask_and_show_tell_a_store_from_an_edit(store, tmp_path, capsys):
    assert kne("show", store) == 1
    assert "kne edits list" in capsys.readouterr().err
    assert kne("edits", "remove", store, "rome", "latin") == 0
    assert kne("ask", store, "Rome") == 1
    assert "holds no edit" in capsys.readouterr().err


def test_the_active_edits_become_one_adapter(store, folder, tmp_path, capsys):
    """In another process PEFT alone gives the answers: see tests/edits; here it loads what the command has written."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert kne("adapter", store, "--out", str(tmp_path / "all"), "--base-name", "somebody/tiny") == 0
    out = capsys.readouterr().out
    assert "portable adapter of rank" in out
    model = base(folder)
    EditStore(store).apply(model)
    plain = AutoModelForCausalLM.from_pretrained(folder / "tiny-model")
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "all")).merge_and_unload()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), weight)
    assert weights(merged) != weights(base(folder))


def test_a_reduced_adapter_is_asked_again(store, folder, tmp_path, capsys):
    assert kne("adapter", "rome", "--out", str(tmp_path / "small"), "--max-rank", "4") == 0
    out = capsys.readouterr().out
    assert "of the change left out" in out and "The capital of France is  ->  Rome   P " in out
    assert kne("adapter", "rome", "--out", str(tmp_path / "free"), "--max-rank", "2", "--no-check") == 0
    assert " P " not in capsys.readouterr().out


def test_options_of_the_base_need_a_check(store, folder, tmp_path, capsys):
    """They would do nothing without one; with it, another base is refused, or taken by --force."""
    out = ("--out", str(tmp_path / "small"))
    for options in (("--model", "tiny-model"), ("--set", "device=cpu"), ("--force",)):
        for more in ((), ("--max-rank", "4", "--no-check")):
            assert kne("adapter", "rome", *out, *options, *more) == 1
            assert f"{options[0]}: says how the base is loaded" in capsys.readouterr().err
    make_llama(seed=11).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    other = ("--max-rank", "4", "--model", str(tmp_path / "other"))
    assert kne("adapter", "rome", *out, *other) == 1
    assert "--force" in capsys.readouterr().err and not (tmp_path / "small").exists()
    (tmp_path / "small").mkdir()  # an empty folder may be there
    assert kne("adapter", "rome", *out, *other, "--force") == 0
    assert (tmp_path / "small/adapter_config.json").exists()


def test_no_adapter_of_nothing(store, tmp_path, capsys):
    assert kne("adapter", "rome", "--out", "rome") == 1
    assert "rome holds something" in capsys.readouterr().err
    assert kne("edits", "off", store, "rome", "latin") == 0
    assert kne("adapter", store, "--out", str(tmp_path / "x")) == 1
    assert "no edit of" in capsys.readouterr().err and not (tmp_path / "x").exists()
