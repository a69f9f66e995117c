"""Rows by the size of their weights in place of localised ones: a control that sees no fact."""

from __future__ import annotations

import pytest
import torch
from conftest import GPT2_DOWN, LLAMA_DOWN, make_gpt2, make_llama, make_tokenizer, tiny_hparams
from edits import ensemble_of

from kne_easyedit._util.settings import replace_settings, resolve_paths
from kne_easyedit.attribution.score_cache import scores_folder
from kne_easyedit.doctor.modules import modules
from kne_easyedit.editing.edit import apply_kne_to_model
from kne_easyedit.localization.localizer import find_ensemble, forget
from kne_easyedit.localization.named import MAGNITUDE, named_ensemble, named_targets


def by_hand(model, template: str, p: float, scaled: bool) -> set[tuple[str, int, int]]:
    """The rows of largest norm over all layers, each by itself."""
    norms = {}
    for layer in range(4):
        weight = model.get_submodule(template.format(layer)).weight
        weight = weight.t() if "c_proj" in template else weight
        own = [sum(value.item() ** 2 for value in row) ** 0.5 for row in weight]
        norms |= {(template, layer, i): norm / (max(own) if scaled else 1) for i, norm in enumerate(own)}
    return set(sorted(norms, key=norms.__getitem__, reverse=True)[: int(p * len(norms))])


@pytest.mark.parametrize("scale", ["none", "layer"])
@pytest.mark.parametrize(("make", "template"), [(make_llama, LLAMA_DOWN), (make_gpt2, GPT2_DOWN)])
def test_the_rows_are_those_of_largest_norm(make, template, scale):
    model = make()
    with torch.no_grad():
        for module in (model.get_submodule(template.format(i)) for i in range(4)):
            module.weight *= torch.rand_like(module.weight) + 0.5  # no two rows alike
    hparams = tiny_hparams(ensemble=MAGNITUDE, target_modules=[template], p=0.25, score_scale=scale)
    found = find_ensemble(model, make_tokenizer(), [], hparams)
    assert found.members() == by_hand(model, template, 0.25, scale == "layer")
    assert (found.facts, found.p, found.scale) == (None, 0.25, scale)
    ((target, rows),) = named_targets(model, hparams)
    assert rows == found.size and target.template == template


def test_it_stays_through_edits_and_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = make_llama(), make_tokenizer()
    hparams = tiny_hparams(ensemble=MAGNITUDE, p=0.25, num_steps=3)
    resolve_paths(hparams)
    assert hparams.ensemble == MAGNITUDE
    before = find_ensemble(model, tokenizer, [], hparams)
    request = {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France"}
    apply_kne_to_model(model, tokenizer, [request], hparams)
    with torch.no_grad():
        model.get_submodule(LLAMA_DOWN.format(0)).weight[:3] *= 50
    assert find_ensemble(model, tokenizer, [], hparams) is before
    forget(model)
    assert find_ensemble(model, tokenizer, [], hparams) != before


def test_weights_that_have_no_norms_are_refused_and_structures_are_planned_on():
    model, hparams = make_llama(), tiny_hparams(ensemble=MAGNITUDE, p=0.25)
    module = model.get_submodule(LLAMA_DOWN.format(1))
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"magnitude needs the rows' norms; model\.layers\.1\.\S+ has weights of type"):
        named_ensemble(model, hparams)
    with torch.device("meta"):
        structure = make_llama()
    assert [rows for _, rows in named_targets(structure, hparams)] == [24]
    assert [finding.status for finding in modules({"KNE": hparams}, structure)] == ["ok"]
    wrong = replace_settings(hparams, target_modules=["model.layers.{}.mlp.x"])
    assert [finding.status for finding in modules({"KNE": wrong}, structure)] != ["ok"]


def test_paths_are_expanded_and_a_missing_file_is_named(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    ensemble_of(LLAMA_DOWN).save(tmp_path / "e.json")
    assert named_ensemble(llama, tiny_hparams(ensemble="~/e.json")).neurons == ensemble_of(LLAMA_DOWN).neurons
    with pytest.raises(FileNotFoundError, match=r"ensemble: .*/scratch/e\.json does not exist"):
        named_ensemble(llama, tiny_hparams(ensemble="$SCRATCH/e.json"))
    assert scores_folder("$SCRATCH/kne") == tmp_path / "scratch" / "kne" / "scores"
