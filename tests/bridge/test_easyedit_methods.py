"""Every method of this EasyEdit edits and is undone on a tiny model, or is refused by name before the first edit."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import yaml
from conftest import fingerprint, make_llama, make_tokenizer
from methods import HPARAMS, in_tmp, records, settings, tokenizer_for  # noqa: F401  (in_tmp is a fixture)

from kne_easyedit import bridge
from kne_easyedit._util.settings import replace_settings
from kne_easyedit.bridge import MethodEditor, importing
from kne_easyedit.bridge import methods as methods_table
from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.methods import METHODS, require_request, require_undoable

SMALL = {
    "layers": [1],
    "v_loss_layer": 3,
    "v_num_grad_steps": 4,
    "num_steps": 2,
    "mom2_n_samples": 7,
    "stats_dir": "stats",
    "device": "cpu",
    "P_loc": "none.pt",
    "n_iter": 3,
    "nullspace_threshold": 1e9,
    "model_parallel": False,
    "batch_size": 1,
    "inner_params": ["model.layers[2].mlp.down_proj.weight"],
}
FILES = {
    "MEMIT-FE": "llama-7b",
    "QLoRA": "llama-7b",
    "DPO": "llama-7b",
    "WISE": "llama-7b",
    "R-ROME": "llama-7b",
    "EMMET": "llama-7b",
    "EAMET": "qwen2.5-7b",
    "AlphaEdit": "llama3-8b",
    "SPHERE": "llama3-8b",
}
"""EasyEdit's own settings of methods that this project ships none for."""


def methods() -> dict:
    bridge.register()
    return module("util.alg_dict").ALG_DICT


def settings_of(method: str, **changes):
    """EasyEdit's own file of a method, fitted to the tiny Llama."""
    path = importing.locate() / "hparams" / method / f"{FILES[method]}.yaml"
    if method not in methods() or not path.is_file():
        pytest.skip(f"this EasyEdit has no {method}, or no settings of it (the PyPI release has no hparams folder)")
    hparams = bridge.load_method(method, path)
    small = {name: value for name, value in SMALL.items() if hasattr(hparams, name)}
    return replace_settings(hparams, model_name="tiny-llama", **{**small, **changes})


def requests() -> list[dict]:
    own = {"target_neg": "Paris", "loc_prompt": "The river that flows through Rome is the Tiber ."}
    return [{**record, **own} for record in records()]


@pytest.mark.parametrize("method", FILES)
def test_a_method_edits_and_is_undone(method):
    hparams = settings_of(method)
    editor = MethodEditor(hparams, make_llama(), tokenizer_for(hparams))
    before = fingerprint(editor.original)
    for facts in (requests()[:1], requests()[:2]):
        for fact in facts:
            editor.apply([fact])
        assert fingerprint(editor.original) != before or editor.model is not editor.original
        editor.evaluate(records()[0], generation=False, seed=1)
        editor.undo()
        assert fingerprint(editor.original) == before


def test_an_edit_does_not_depend_on_those_that_were_undone():
    """AlphaEdit adds every edit to what it keeps of those before, whether they are still there or not."""
    found = []
    for first in ([], requests()[1:]):
        hparams = settings_of("AlphaEdit")
        editor = MethodEditor(hparams, make_llama(), tokenizer_for(hparams))
        for fact in first:
            editor.apply([fact])
            editor.undo()
        editor.apply(requests()[:1])
        found.append(fingerprint(editor.original)["weights"])
    assert found[0] == found[1]


@pytest.mark.parametrize("method", [m.label for m in METHODS.values() if m.irreversible])
def test_a_method_that_cannot_be_undone_is_refused_by_name(method):
    with pytest.raises(ValueError, match=f"methods: {method} .*kne easyedit-run"):
        MethodEditor(SimpleNamespace(alg_name=method), make_llama(), make_tokenizer())


@pytest.mark.parametrize("method", [m.label for m in METHODS.values() if m.model_names])
def test_a_model_whose_name_says_nothing_is_refused_where_the_name_counts(method):
    with pytest.raises(
        ValueError, match=f"{method} knows the shape of the weights by words in model_name only.*'smollm2'"
    ):
        require_undoable(SimpleNamespace(alg_name=method, model_name="smollm2"))
    require_undoable(SimpleNamespace(alg_name=method, model_name="My-Llama"))


def test_a_missing_package_is_found_before_the_first_edit(monkeypatch):
    bridge.register()
    needs = dataclasses.replace(METHODS["FT"], packages=(("evaluate.evaluate_utils", "f1_score"),))
    monkeypatch.setattr(methods_table, "METHODS", {**METHODS, "FT": needs})
    absent = importing.placeholder("sklearn.metrics.f1_score", "No module named 'sklearn'")
    monkeypatch.setattr(module("evaluate.evaluate_utils"), "f1_score", absent, raising=False)
    with pytest.raises(ValueError, match=r"FT needs sklearn.metrics.f1_score.*No module named 'sklearn'; install"):
        MethodEditor(SimpleNamespace(alg_name="FT", model_name="m"), make_llama(), make_tokenizer())
    monkeypatch.setattr(module("evaluate.evaluate_utils"), "f1_score", len)
    require_undoable(SimpleNamespace(alg_name="FT", model_name="m"))


def test_a_missing_archive_is_found_before_the_first_edit(tmp_path):
    with pytest.raises(ValueError, match=r"MEND needs .*archive: 'none.pt' does not exist"):
        require_undoable(SimpleNamespace(alg_name="MEND", archive="none.pt"))
    (tmp_path / "some.pt").touch()
    require_undoable(SimpleNamespace(alg_name="MEND", archive=str(tmp_path / "some.pt")))


@pytest.mark.parametrize(("method", "field"), [("DPO", "target_neg"), ("WISE", "loc_prompt")])
def test_what_a_method_wants_of_a_request_is_named(method, field):
    with pytest.raises(
        ValueError, match=f"{method} wants a {field} in every request, and that of 'The capital of France is'"
    ):
        require_request(method, records()[0])
    require_request(method, requests()[0])


def test_settings_are_built_by_the_classs_own_from_hparams():
    """WISE makes alpha, beta and gamma from act_margin there."""
    hparams = settings_of("WISE")
    assert (hparams.alpha, hparams.beta, hparams.gamma) == (5.0, 20.0, 10.0)


def test_a_file_that_is_not_enough_is_named(tmp_path):
    config = yaml.safe_load((HPARAMS / "FT" / "smollm2-135m.yaml").read_text())
    file = tmp_path / "short.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in config.items() if name != "num_steps"}))
    with pytest.raises(ValueError, match=r"short.yaml: FTHyperParams cannot be made of it: TypeError: .*'num_steps'"):
        bridge.load_method("FT", file)
    file.write_text("a: [")
    with pytest.raises(ValueError, match=r"short.yaml: not a YAML file"):
        bridge.load_method("FT", file)
    with pytest.raises(FileNotFoundError, match=r"none.yaml does not exist"):
        bridge.load_method("FT", tmp_path / "none.yaml")


def test_methods_of_old_are_still_taken():
    require_undoable(settings("FT"))
    require_undoable(settings("ROME"))
