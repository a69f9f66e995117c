"""EasyEdit drives KNE unchanged. The PyPI release here; test_checkout.py runs this file on a checkout as well."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from accelerate import cpu_offload
from conftest import HANGS, fingerprint, make_llama, make_tokenizer, tiny_hparams, weights

from kne_easyedit import apply_kne_to_model, bridge
from kne_easyedit.bridge import importing
from kne_easyedit.bridge.method_editor import MethodEditor
from kne_easyedit.bridge.registry import edits_handed_to
from kne_easyedit.editing import kne_edit
from kne_easyedit.editing.earlier import earlier_requests
from kne_easyedit.editing.edit import EditFailed
from kne_easyedit.models.fingerprint import model_digest

HPARAMS = Path(__file__).parents[2] / "hparams"
PROMPTS = ["The capital of France is", "The capital of Spain is", "The capital of Peru is"]
TARGETS = ["Rome", "Oslo", "Marie"]
ORIGINALS_WANTED = {"keep_original_weight": True}  # needed before May 2024, ignored since


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # EasyEdit writes ./logs


@pytest.fixture
def editor():
    """BaseEditor with a tiny model; each edit localises on its own request."""
    return bridge.editor_for(tiny_hparams(model_name="any-name-at-all"), make_llama(), make_tokenizer())


def edit(editor, n=1, **kwargs):
    probes = {
        "Reasoning": {"prompt": [["The river that flows through Rome is"]] * n, "ground_truth": [["the Tiber"]] * n}
    }
    return editor.edit(
        prompts=PROMPTS[:n],
        target_new=TARGETS[:n],
        subject=["France", "Spain", "Peru"][:n],
        verbose=False,
        portability_inputs=probes,
        locality_inputs=deepcopy(probes),
        **{**ORIGINALS_WANTED, **kwargs},
    )


def test_base_editor_edits_evaluates_and_restores(editor):
    before = fingerprint(editor.model)
    metrics, _, originals = edit(editor, 2)
    assert [m["pre"]["rewrite_acc"] for m in metrics] != [m["post"]["rewrite_acc"] for m in metrics]
    assert [m["post"]["rewrite_acc"] for m in metrics] == [[1.0], [1.0]]
    assert all(
        "Reasoning_acc" in m["post"]["portability"] and "Reasoning_acc" in m["post"]["locality"] for m in metrics
    )
    assert fingerprint(editor.model) == before
    assert originals and all(name.endswith("down_proj.weight") for name in originals)


def test_an_offloaded_model_is_refused_by_easyedits_editor(tokenizer):
    """It would write the originals into parameters that hold nothing: the edit would stay."""
    model = cpu_offload(make_llama())
    before = model_digest(model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is offloaded .*kne edit, apply_kne_to_model and restore"):
        edit(bridge.editor_for(tiny_hparams(model_name="any-name-at-all"), model, tokenizer))
    assert model_digest(model) == before


def test_an_offloaded_model_is_edited_by_runs(tokenizer):
    """Converse: they undo edits themselves."""
    found = []
    for model in (make_llama(), cpu_offload(make_llama())):
        before = model_digest(model)
        editor = MethodEditor(tiny_hparams(model_name="any-name-at-all"), model, tokenizer)
        editor.apply([{"prompt": PROMPTS[0], "target_new": TARGETS[0], "subject": "France"}])
        found.append(model_digest(model))
        editor.undo()
        assert model_digest(model) == before
    assert found[0] == found[1] != before


def test_batch_edit(editor):
    editor.hparams.batch_size = 3
    before = fingerprint(editor.model)
    metrics, _, _ = editor.batch_edit(prompts=PROMPTS, target_new=TARGETS, verbose=False, **ORIGINALS_WANTED)
    assert [m["post"]["rewrite_acc"] for m in metrics] == [[1.0]] * 3
    assert fingerprint(editor.model) == before


def test_edits_accumulate_when_easyedit_asks_for_it(editor):
    """Before May 2024 by keep_original_weight=False, since then by sequential_edit=True."""
    start = weights(editor.model)
    mode = {"keep_original_weight": False} if bridge.is_legacy() else {"sequential_edit": True}
    edit(editor, 2, **mode)
    assert weights(editor.model) != start


def test_edits_of_before_are_known_where_they_accumulate(editor):
    """So that `spare_edited` spares them; not where EasyEdit takes each back."""
    editor.hparams.spare_edited = True
    edit(editor, 2)
    assert earlier_requests(editor.model) == []
    edit(editor, 2, **({"keep_original_weight": False} if bridge.is_legacy() else {"sequential_edit": True}))
    assert [one["prompt"] for one in earlier_requests(editor.model)] == PROMPTS[1::-1]


def test_fluency_needs_no_download(editor):
    variant = bridge.fluency_variant()
    assert variant == bridge.fluency_variant()  # twice is harmless
    metrics, _, _ = edit(editor, test_generation=True)
    assert variant in ("punkt", "preserve_line")
    assert metrics[0]["post"]["fluency"]["ngram_entropy"] > 0


def test_easyedits_own_method_runs_on_cpu(tmp_path):
    """FT of the same editor class, with the settings file that is shipped for SmolLM2."""
    model = make_llama(num_hidden_layers=22)
    hparams = bridge.load_method("FT", importing.Path(__file__).parents[2] / "hparams/FT/smollm2-135m.yaml")
    hparams.lr = 0.05
    editor = bridge.editor_for(hparams, model, make_tokenizer())
    before = weights(model)
    changed = []
    apply = editor.apply_algo

    def observed(*args, **kwargs):
        result = apply(*args, **kwargs)
        changed.append(weights(model) != before)
        return result

    editor.apply_algo = observed
    edit(editor)
    assert changed == [True]
    assert weights(model) == before


def test_register_twice_is_harmless_and_loud_on_collision():
    easyeditor = bridge.register()
    methods = importing.importlib.import_module("easyeditor.util.alg_dict").ALG_DICT
    function = methods["KNE"]
    assert getattr(function, "func", function) is apply_kne_to_model
    assert bridge.register() is easyeditor
    assert methods["KNE"] is function
    batch_editor = importing.importlib.import_module("easyeditor.editors.batch_editor").BatchEditor
    assert batch_editor.is_batchable_method("KNE")
    assert batch_editor.is_batchable_method("MEMIT")
    assert not batch_editor.is_batchable_method("ROME")
    assert easyeditor.KNEHyperParams.from_hparams is not None
    methods["KNE"] = print
    try:
        with pytest.raises(ValueError, match="KNE"):
            bridge.register()
    finally:
        methods["KNE"] = function


def test_unknown_method_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"'RME' is unknown.*ROME"):
        bridge.load_method("RME", tmp_path / "x.yaml")


def test_settings_that_a_version_does_not_know_are_dropped_with_a_warning(tmp_path, caplog):
    text = (importing.Path(__file__).parents[2] / "hparams/FT/smollm2-135m.yaml").read_text()
    path = tmp_path / "ft.yaml"
    path.write_text(text + "no_such_setting: 1\n")
    with caplog.at_level(logging.WARNING):
        hparams = bridge.load_method("FT", path)
    assert "no_such_setting" in caplog.text
    assert hparams.lr == 5e-4
    path.write_text(text.replace("alg_name: FT", "alg_name: ROME"))
    with pytest.raises(ValueError, match="alg_name is 'ROME'"):
        bridge.load_method("FT", path)


@pytest.mark.parametrize(
    ("method", "name", "value", "says"),
    [
        ("MEMIT", "layers", 4, "layers: 4 is not a list"),
        ("MEMIT", "mom2_dtype", "foo", "mom2_dtype: 'foo' is not a type of torch"),
        ("MEMIT", "stats_dir", 5, "stats_dir: 5 is not a path"),
        ("FT-L", "rewrite_module_tmp", ["a"], r"rewrite_module_tmp: \['a'\] is not a single value"),
        ("FT-L", "lr", "fast", "lr: 'fast' is not a number"),
    ],
)
def test_a_value_of_another_kind_names_file_and_setting(tmp_path, method, name, value, says):
    """EasyEdit takes any, and fails somewhere in an edit."""
    file = tmp_path / "own.yaml"
    content = yaml.safe_load((HPARAMS / method / "smollm2-135m.yaml").read_text())
    file.write_text(yaml.safe_dump({**content, name: value}))
    with pytest.raises(ValueError, match=rf"own\.yaml: {says}"):
        bridge.load_method(method, file)


def test_values_as_easyedits_own_files_have_them_are_taken(tmp_path):
    file = tmp_path / "own.yaml"
    content = yaml.safe_load((HPARAMS / "FT-L/smollm2-135m.yaml").read_text())
    file.write_text(yaml.safe_dump({**content, "norm_constraint": False, "device": "cpu", "lr": "5e-4"}))
    assert bridge.load_method("FT-L", file).device == "cpu"


def test_a_loaded_model_passes_as_a_name_and_is_never_copied():
    model = make_llama()
    name = bridge.LoadedModel("no-loader-knows-me", model, "tokenizer")
    assert [*name] == [model, "tokenizer"]
    assert name.lower() == "no-loader-knows-me"
    assert type(deepcopy(name)) is str
    assert type(name) is not str


def run_python(code: str, **env) -> subprocess.CompletedProcess:
    """``code`` in a fresh interpreter."""
    environment = {**importing.os.environ, **env}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, timeout=HANGS
    )


def test_missing_easyedit_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("EASYEDIT_HOME", raising=False)
    monkeypatch.setattr(importing.PathFinder, "find_spec", lambda *a: None)
    with pytest.raises(bridge.EasyEditNotFound, match=r"git clone .*EASYEDIT_HOME"):
        bridge.locate()


def test_wrong_easyedit_home_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    with pytest.raises(bridge.EasyEditNotFound, match=str(tmp_path)):
        bridge.locate()


def test_import_leaves_nothing_behind():
    """No placeholder in sys.modules, no seed set, no root log handler, no file in the working directory."""
    result = run_python(
        """
        import logging, os, random, sys
        import numpy, torch
        random.seed(1); numpy.random.seed(1); torch.manual_seed(1)
        expected = random.random(), numpy.random.rand(), torch.rand(1).item()
        random.seed(1); numpy.random.seed(1); torch.manual_seed(1)
        from kne_easyedit import bridge
        bridge.register()
        assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == expected, "seeded"
        assert not logging.getLogger().handlers, "root handlers"
        assert not os.listdir(), os.listdir()
        for name, module in list(sys.modules.items()):
            assert "_PlaceholderType" not in (type(type(module)).__name__, type(module).__name__), name
        import importlib.util
        for name in ("timm", "iopath", "fairscale", "qwen_vl_utils"):
            assert name not in sys.modules and importlib.util.find_spec(name) is None, name
        print("clean")
        """
    )
    assert result.stdout.strip().endswith("clean"), result.stderr[-2000:]


def test_placeholders_raise_on_use():
    absent = importing.placeholder("absent.Thing", "No module named 'absent'")
    assert isinstance(absent[int], type)
    assert isinstance(absent.Other, type)

    class Derived(absent):
        pass

    for use in (absent, Derived, absent.Other):
        with pytest.raises(ImportError, match="No module named 'absent'"):
            use()


def test_importing_the_package_imports_neither_easyedit_nor_matplotlib():
    result = run_python(
        """
        import sys
        import kne_easyedit
        assert not {"easyeditor", "matplotlib", "peft", "transformers"} & set(sys.modules)
        print("fine")
        """
    )
    assert result.stdout.strip() == "fine", result.stderr[-2000:]


def test_generators_survive_an_import(monkeypatch):
    torch.manual_seed(3)
    numpy.random.seed(3)
    random.seed(3)
    state = torch.get_rng_state()
    bridge.register()
    assert torch.equal(torch.get_rng_state(), state)


def test_an_edit_that_nobody_asks_for_is_not_fingerprinted(editor, monkeypatch):
    """Every touched matrix would be hashed, for every record."""
    before = fingerprint(editor.model)
    monkeypatch.setattr(kne_edit, "base_of", lambda *_: pytest.fail("fingerprinted"))
    edit(editor)
    stepwise = bridge.MethodEditor(tiny_hparams(model_name="any-name-at-all"), editor.model, make_tokenizer())
    stepwise.apply([{"prompt": PROMPTS[0], "target_new": TARGETS[0], "subject": "France"}])
    assert stepwise.losses and weights(editor.model) != before["weights"]
    stepwise.undo()
    assert fingerprint(editor.model) == before
    with handing_to(lambda _: None) as asked, pytest.raises(pytest.fail.Exception, match="fingerprinted"):  # converse
        edit(asked)


@contextmanager
def handing_to(take, **changes):
    """An editor that is made inside: editors look their method up when they are made."""
    with edits_handed_to(take):
        yield bridge.editor_for(tiny_hparams(model_name="any-name-at-all", **changes), make_llama(), make_tokenizer())


def test_edits_are_handed_out_once_they_are_written():
    before, seen, handed = weights(make_llama()), [], []
    with handing_to(lambda one: (handed.append(one), seen.append(weights(editor.model)))) as editor:
        edit(editor)
    assert [one.facts for one in handed] == [(f"{PROMPTS[0]} -> {TARGETS[0]}",)]
    assert len(seen) == 1 and seen[0] != before == weights(editor.model)


def test_an_edit_that_is_not_written_is_not_handed_out():
    handed = []
    with handing_to(handed.append, num_steps=1, on_failure="raise") as editor, pytest.raises(EditFailed):
        edit(editor)
    assert handed == [] and weights(editor.model) == weights(make_llama())


def test_what_takes_an_edit_may_fail():
    def full(_):
        raise OSError("no space left")

    with handing_to(full) as editor, pytest.raises(OSError, match="no space left"):
        edit(editor)
    assert weights(editor.model) == weights(make_llama())


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({".git/HEAD": "ref: refs/heads/main", ".git/refs/heads/main": "abc"}, "abc"),
        ({".git/HEAD": "ref: refs/heads/main", ".git/packed-refs": "# pack\nabc refs/heads/main"}, "abc"),
        ({".git/HEAD": "abc"}, "abc"),
        ({".git": "gitdir: ../git/modules/x", "../git/modules/x/HEAD": "abc"}, "abc"),
        (
            {
                ".git": "gitdir: ../git/worktrees/x",
                "../git/worktrees/x/HEAD": "ref: refs/heads/main",
                "../git/worktrees/x/commondir": "../..",
                "../git/refs/heads/main": "abc",
            },
            "abc",
        ),
        ({}, "unknown"),
        ({".git": "gitdir: ../gone"}, "unknown"),
    ],
    ids=["branch", "packed", "detached", "submodule", "work tree", "folder", "gone"],
)
def test_the_commit_of_a_checkout(tmp_path, files, found):
    root = tmp_path / "EasyEdit"
    root.mkdir()
    for name, text in files.items():
        (root / name).parent.resolve().mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    assert importing._commit(root) == found
