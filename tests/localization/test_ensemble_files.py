"""Ensemble files of other programs: every type is checked, and the message names the file. The scale is recorded."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FACTS, LLAMA_DOWN, failing, tiny_hparams

from kne_easyedit import cli
from kne_easyedit.localization.ensemble import NeuronEnsemble, select_ensemble
from kne_easyedit.localization.explain import explain
from kne_easyedit.localization.localizer import Localization, localize
from kne_easyedit.localization.output import save_explanation

REQUESTS = [{"prompt": prompt, "target_new": target} for prompt, target in FACTS]
DEEP = "[" * 100_000 + "]" * 100_000


def content(**changes):
    neurons = {"m.{}.a": {"0": [0, 1, 2, 3]}}
    found = {"format": "kne-ensemble-1", "neurons": neurons, "widths": {"m.{}.a": 9}, "layers": [0, 1]}
    return json.dumps({**found, **changes})


def neurons(rows, layer="0", template="m.{}.a"):
    return content(neurons={template: {layer: rows}}, widths={template: 9})


BAD = {
    "digits": (neurons("0123"), "neurons of 'm.{}.a', layer 0: '0123' is not a list of rows"),
    "mapping for rows": (neurons({"0": 1}), "is not a list of rows"),
    "text row": (neurons(["1"]), "'1' is not a row's number"),
    "fraction": (neurons([1.7]), "1.7 is not a row's number"),
    "whole fraction": (neurons([1.0]), "1.0 is not a row's number"),
    "true": (neurons([True]), "True is not a row's number"),
    "null": (neurons([None]), "None is not a row's number"),
    "nested": (neurons([[1]]), r"\[1\] is not a row's number"),
    "giant row": (neurons([10**400]), "characters\\) is not a row's number"),
    "number of too many digits": (content().replace("3]", "9" * 5000 + "]"), "digits"),
    "layer -1": (neurons([1], "-1"), "'-1' is not a layer's number"),
    "layer 1.0": (neurons([1], "1.0"), "'1.0' is not a layer's number"),
    "layer 01": (neurons([1], "01"), "'01' is not a layer's number"),
    "layer of other digits": (neurons([1], "٣"), "is not a layer's number"),
    "giant layer": (neurons([1], "9" * 400), "is not a layer's number"),
    "giant template": (neurons([1], "0", "m.{}." + "x" * 10**6), "characters\\) is not a template"),
    "no template": (neurons([1], "0", "lm_head"), "'lm_head' is not a template"),
    "format of templates": (neurons([1], "0", "m.{}.{0.__class__}"), "is not a template"),
    "list of neurons": (content(neurons=[[0, 1]]), "neurons: .* is not a mapping"),
    "list of layers": (content(neurons={"m.{}.a": [0, 1]}), "is not a mapping of layers to rows"),
    "width true": (content(widths={"m.{}.a": True}), "widths: .* is not a template's number of neurons"),
    "width text": (content(widths={"m.{}.a": "9"}), "widths: .* is not a template's number of neurons"),
    "width list": (content(widths=[9]), "widths: .* is not a mapping"),
    "width missing": (content(widths={}), "rows of m.0.a"),
    "layers text": (content(layers="012"), "layers: '012' is not a list of layers' numbers"),
    "layers fraction": (content(layers=[0.5]), "layers: .* is not a list of layers' numbers"),
    "layers true": (content(layers=[True]), "layers: .* is not a list of layers' numbers"),
    "threshold NaN": (content(thresholds={"m.{}.a": float("nan")}), "thresholds of .* nan is not a finite number"),
    "threshold infinite": (content(thresholds={"m.{}.a": float("inf")}), "thresholds of .* inf is not a finite number"),
    "threshold giant": (content(thresholds={"m.{}.a": 10**400}), "thresholds of .* is not a finite number"),
    "threshold text": (content(thresholds={"m.{}.a": "1"}), "thresholds of .* '1' is not a finite number"),
    "threshold of nothing": (content(thresholds={"m.{}.b": 1.0}), "thresholds of 'm.{}.b'"),
    "thresholds list": (content(thresholds=[1.0]), "thresholds: .* is not a mapping"),
    "p text": (content(p="0.1"), "p: '0.1' is not a finite number"),
    "p true": (content(p=True), "p: True is not a finite number"),
    "seconds NaN": (content(seconds=float("nan")), "seconds: nan is not a finite number"),
    "facts fraction": (content(facts=1.5), "facts: 1.5 is not a number of facts"),
    "aggregation": (content(aggregation=["max"]), "aggregation: .* is not one of"),
    "scale": (content(scale="layers"), "scale: 'layers' is not one of"),
    "unknown": (content(more=1), "unknown field 'more'"),
    "twice": (content().replace('"widths"', '"neurons": {}, "widths"'), "'neurons' occurs twice"),
    "layer twice": (content().replace('"0": [0', '"0": [5], "0": [0'), "'0' occurs twice"),
    "deep": (DEEP, "too deep"),
    "deep inside": (content().replace("[0, 1]", DEEP), "too deep"),
    "nothing": ("", ""),
    "text": ('"kne-ensemble-1"', "its field 'format' is missing or another one"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file(kind, tmp_path, capsys):
    """Always a ValueError with the file's name, and short enough to read."""
    text, reason = BAD[kind]
    path = tmp_path / "ours.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"ensemble: .*ours.json is no ensemble file.*{reason}") as caught:
        NeuronEnsemble.load(path)
    assert len(str(caught.value)) < 900 + len(str(tmp_path))


def test_converse_a_good_file(tmp_path):
    (tmp_path / "ours.json").write_text(
        content(thresholds={"m.{}.a": 1}, p=0.5, facts=3, seconds=2, aggregation="mean", scale="layer")
    )
    assert NeuronEnsemble.load(tmp_path / "ours.json").neurons == {"m.{}.a": {0: (0, 1, 2, 3)}}


def test_a_file_too_large_to_be_one(tmp_path):
    path = tmp_path / "ours.json"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse: takes no space, and would take 2 GiB of memory
    with pytest.raises(ValueError, match=r"ours.json is no ensemble file .*bytes are more than any ensemble has"):
        NeuronEnsemble.load(path)


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ({LLAMA_DOWN: {0: "0123"}}, "'0123' is not a list of rows"),
        ({LLAMA_DOWN: {0: (1.0,)}}, "1.0 is not a row's number"),
        ({LLAMA_DOWN: {0: (True,)}}, "True is not a row's number"),
        ({LLAMA_DOWN: {"0": (1,)}}, "'0' is not a layer's number"),
        ({"lm_head": {0: (1,)}}, "neurons: target_modules: 'lm_head' is not a template"),
    ],
)
def test_a_bad_one_made_by_hand(neurons, message):
    with pytest.raises(ValueError, match=f"ensemble: .*{message}"):
        NeuronEnsemble(neurons, dict.fromkeys(neurons, 24))


class TestScale:
    @pytest.fixture
    def hparams(self):
        return tiny_hparams(score_scale="layer", p=0.15)

    @pytest.mark.parametrize("scale", ["layer", "none"])
    def test_is_kept_in_the_file(self, tmp_path, scale):
        made = select_ensemble(torch.rand(3, 8), 0.5, target_module="m.{}.a", scale=scale)
        made.save(tmp_path / "ours.json")
        assert NeuronEnsemble.load(tmp_path / "ours.json") == made
        assert made.scale == scale == json.loads((tmp_path / "ours.json").read_text())["scale"]

    def test_older_files_do_not_say(self, tmp_path):
        (tmp_path / "old.json").write_text(content())
        assert NeuronEnsemble.load(tmp_path / "old.json").scale is None

    def test_is_that_of_the_settings(self, llama, tokenizer, hparams):
        assert localize(llama, tokenizer, REQUESTS, hparams).scale == "layer"
        assert localize(llama, tokenizer, REQUESTS, tiny_hparams()).scale == "none"

    def test_explain_shows_what_an_edit_trains(self, llama, tokenizer, hparams, tmp_path):
        found = explain(llama, tokenizer, REQUESTS, hparams)
        alone = [localize(llama, tokenizer, [request], hparams) for request in REQUESTS]
        unscaled = [localize(llama, tokenizer, [request], tiny_hparams(p=0.15)) for request in REQUESTS]
        assert [e.neurons for e in found.ensembles] == [e.neurons for e in alone] != [e.neurons for e in unscaled]
        assert {e.scale for e in found.ensembles} == {"layer"}
        save_explanation(found, tmp_path, hparams)
        said = json.loads((tmp_path / "explanation.json").read_text())
        assert said["score_scale"] == "layer" and said["quadrature"] == "riemann"

    def test_strongest_neurons_are_those_selected_first(self, llama, tokenizer, hparams):
        found = explain(llama, tokenizer, REQUESTS, hparams)
        scores = Localization(llama, tokenizer, REQUESTS, hparams)
        for one, ensemble, best in zip(scores.scores(), found.ensembles, found.strongest):
            own = one.values[LLAMA_DOWN]
            assert {neuron for neuron, _ in best} <= ensemble.members()
            ranks = [scores.selection.scaled(own)[layer, row].item() for (_, layer, row), _ in best]
            assert ranks == sorted(ranks, reverse=True)
            assert [value for _, value in best] == [own[layer, row].item() for (_, layer, row), _ in best]

    def test_explain_takes_the_facts_that_are_localised(self, monkeypatch, tmp_path):
        """``localization_offset`` was forgotten: other facts were shown."""
        asked = []
        monkeypatch.setattr(
            "kne_easyedit.localization.data.localization_requests", lambda hparams: asked.append(hparams) or REQUESTS
        )
        monkeypatch.setattr("kne_easyedit.models.loading.load_model", failing(None, 1, ValueError("far enough")))
        (tmp_path / "kne.yaml").write_text(
            f"model_name: tiny\ntarget_modules: ['{LLAMA_DOWN}']\ndevice: cpu\nlocalization_data: facts.json\n"
            "localization_offset: 7\n"
        )
        assert cli.main(["explain", "--hparams", str(tmp_path / "kne.yaml"), "--size", "2"]) == 1
        (hparams,) = asked
        assert hparams.localization_data == str(Path("facts.json").absolute())
        assert (hparams.localization_size, hparams.localization_offset) == (2, 7)
