"""`Selection`: the rules of Eq. 6-7 in one value, and nowhere else."""

import dataclasses
import json

import pytest
import torch
from conftest import LLAMA_DOWN, ONE_TOKEN, tiny_hparams
from localizing import REQUESTS

from kne_easyedit.attribution.engine import attribute
from kne_easyedit.localization import localizer
from kne_easyedit.localization.ensemble import NeuronEnsemble, select_ensemble
from kne_easyedit.localization.explain import explain
from kne_easyedit.localization.localizer import find_ensemble, localize
from kne_easyedit.localization.selection import AGGREGATIONS, SCALES, SHUFFLED, Aggregation, Selection, aggregate

SCORES = torch.tensor([[9.0, 1.0, 2.0, 3.0], [0.4, 0.5, 0.1, 0.2]])


class TestValue:
    def test_is_frozen_and_a_key(self):
        assert {Selection(layers=[1, 2]): 1}[Selection(layers=(1, 2))] == 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            Selection().p = 0.5

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            *(("p", p, rf"^p: {p!r} must be in \(0, 1\]") for p in (0, -0.1, 1.5, float("nan"), "0.1", True, None)),
            (
                "aggregation",
                "maximum",
                r"^aggregation: 'maximum' must be one of \('max', 'mean'\); did you mean 'max'\?",
            ),
            ("aggregation", "zzz", r"^aggregation: 'zzz' must be one of \('max', 'mean'\)$"),
            ("aggregation", ["max"], "^aggregation: .* must be one of"),
            ("scale", "layers", r"^score_scale: 'layers' must be one of \('none', 'layer', .*did you mean 'layer'\?"),
            ("layers", (0, -1), r"^layers: \[0, -1\] must be numbers of layers, from 0"),
            ("layers", (1.0,), r"^layers: \[1.0\] must be numbers of layers, from 0"),
        ],
    )
    def test_validates_itself(self, field, value, message):
        with pytest.raises(ValueError, match=message):
            Selection(**{field: value})

    def test_hyperparameters_are_validated_by_it(self):
        """Its message, with the nearest valid name."""
        with pytest.raises(ValueError, match=r"score_scale: 'laier' must be one of .*did you mean 'layer'"):
            tiny_hparams(score_scale="laier")

    def test_is_a_property_of_the_hyperparameters(self):
        hparams = tiny_hparams(p=0.3, aggregation="mean", score_scale="layer", layers=[2, 1])
        assert hparams.selection == Selection(0.3, "mean", "layer", (1, 2)), "as `attribute` orders them"
        assert "selection" not in hparams.to_dict()


class TestSelecting:
    @pytest.mark.parametrize("chosen", [Selection(0.25, scale="layer"), Selection(0.5, layers=(3, 7))], ids=str)
    def test_one_value_or_its_fields(self, chosen):
        rules = {name: getattr(chosen, name) for name in ("p", "aggregation", "scale", "layers")}
        by_value = select_ensemble(SCORES, chosen, target_module=LLAMA_DOWN)
        assert by_value == select_ensemble(SCORES, target_module=LLAMA_DOWN, **rules)
        assert by_value != select_ensemble(SCORES, Selection(1.0), target_module=LLAMA_DOWN), "converse"

    def test_an_unknown_rule(self):
        with pytest.raises(TypeError, match="scales"):
            select_ensemble(SCORES, 0.5, target_module=LLAMA_DOWN, scales="layer")

    def test_a_layer_twice(self):
        with pytest.raises(ValueError, match=r"layers: \[1, 1\] are not in ascending order.*give \[1\]"):
            select_ensemble(SCORES, 0.5, target_module=LLAMA_DOWN, layers=[1, 1])

    @pytest.mark.parametrize("layers", [[1, 3], [3, 1], [3, 1, 3]])
    def test_rows_of_scores_and_layers_are_in_one_order(self, llama, tokenizer, layers):
        """However the settings list them: `attribute` gives rows in ascending order."""
        scores = attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, 2, layers=layers)
        found = select_ensemble(scores, tiny_hparams(layers=layers, p=0.3).selection, target_module=LLAMA_DOWN)
        whole = attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, 2)
        for layer, rows in found.neurons[LLAMA_DOWN].items():
            least = min(whole[layer][list(rows)])
            assert least >= found.thresholds[LLAMA_DOWN] * (1 - 1e-5), layer
        if layers != [1, 3]:
            with pytest.raises(ValueError, match=r"not in ascending order.*give \[1, 3\]"):
                select_ensemble(scores, 0.3, target_module=LLAMA_DOWN, layers=layers)

    @pytest.mark.parametrize(("p", "neurons", "kept"), [(0.29, 100, 29), (0.04, 10, 1), (1.0, 7, 7), (0.5, 7, 3)])
    def test_budget(self, p, neurons, kept):
        """The floor, in spite of rounding (0.29 * 100 is below 29 in floating point), and at least one."""
        assert Selection(p).budget(neurons) == kept

    def test_scale_decides_between_layers(self):
        """Unscaled the first layer takes all; in relation to their layer's largest both have one."""
        chosen = {scale: Selection(0.25, scale=scale).choose(SCORES)[0].tolist() for scale in SCALES}
        assert chosen["none"] == [[True, False, False, True], [False] * 4]
        assert chosen["layer"] == [[True, False, False, False], [False, True, False, False]]

    def test_shuffled_keeps_as_many_neurons_of_each_layer_but_others(self):
        scores = torch.rand(4, 50, generator=torch.Generator().manual_seed(1))
        chosen = {scale: Selection(0.1, scale=scale).choose(scores)[0] for scale in ("layer", "shuffled")}
        assert chosen["shuffled"].sum(1).tolist() == chosen["layer"].sum(1).tolist()
        assert not torch.equal(*chosen.values())
        assert torch.equal(chosen["shuffled"], Selection(0.1, scale="shuffled").choose(scores.clone())[0])

    @pytest.mark.parametrize("scale", ["layer", "none"])
    @pytest.mark.parametrize("p", [0.01, 0.1, 1.0])
    def test_random_ensembles_have_exactly_the_sizes_of_the_localised_one(self, scale, p):
        """Of each layer and overall, also where scores are equal or not positive; and no two draws are alike."""
        scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)).mul(8).round()
        scores[2] *= 20  # unscaled, this layer takes most
        localised = select_ensemble(scores, p, target_module=LLAMA_DOWN, scale=scale)
        draws = [select_ensemble(scores, p, target_module=LLAMA_DOWN, scale=name) for name in SHUFFLED[scale]]
        assert all(draw.counts() == localised.counts() and draw.size == localised.size for draw in draws)
        assert len({frozenset(each.members()) for each in (localised, *draws)}) == len(draws) + 1
        other = SHUFFLED["none" if scale == "layer" else "layer"][0]
        if p < 1:
            assert select_ensemble(scores, p, target_module=LLAMA_DOWN, scale=other).counts() != localised.counts()


class TestRecord:
    def test_the_ensemble_says_how_it_was_selected(self, llama, tokenizer):
        hparams = tiny_hparams(p=0.3, aggregation="mean", score_scale="layer", layers=[2, 1])
        found = localize(llama, tokenizer, REQUESTS, hparams)
        assert found.selection == Selection(0.3, "mean", "layer", (1, 2))
        assert explain(llama, tokenizer, REQUESTS, hparams).selection == found.selection

    def test_survives_the_file(self, tmp_path):
        made = select_ensemble(SCORES, Selection(0.25, "mean", "layer", (3, 7)), target_module="m.{}.a")
        made.save(tmp_path / "e.json")
        assert NeuronEnsemble.load(tmp_path / "e.json").selection == Selection(0.25, "mean", "layer", (3, 7))

    def test_what_an_older_file_does_not_say_stays_unknown(self, tmp_path):
        made = select_ensemble(SCORES, 0.25, target_module="m.{}.a")
        made.save(tmp_path / "e.json")
        content = json.loads((tmp_path / "e.json").read_text())
        del content["scale"]
        (tmp_path / "e.json").write_text(json.dumps(content))
        old = NeuronEnsemble.load(tmp_path / "e.json")
        assert old.selection is None and (old.p, old.aggregation, old.neurons) == (0.25, "max", made.neurons)

    def test_file_format(self, tmp_path):
        """Byte by byte: files of earlier versions are those of this one."""
        made = select_ensemble(SCORES, 0.25, target_module="m.{}.a", facts=3, seconds=1.5)
        made.save(tmp_path / "e.json")
        assert (tmp_path / "e.json").read_bytes() == (
            b'{"format": "kne-ensemble-1", "neurons": {"m.{}.a": {"0": [0, 3]}}, "widths": {"m.{}.a": 4}, '
            b'"layers": [0, 1], "thresholds": {"m.{}.a": 3.0}, "p": 0.25, "aggregation": "max", "facts": 3, '
            b'"seconds": 1.5, "scale": "none"}\n'
        )


class TestKept:
    """The ensembles of a loaded model are kept by their selection."""

    @pytest.mark.parametrize("change", [{"p": 0.5}, {"aggregation": "mean"}, {"score_scale": "layer"}, {"layers": [1]}])
    def test_each_field_is_part_of_the_key(self, llama, tokenizer, change):
        settings = {"localization_data": "embedded", "localization_size": 2}
        one, other = (find_ensemble(llama, tokenizer, [], tiny_hparams(**settings, **more)) for more in ({}, change))
        assert one.selection != other.selection
        assert find_ensemble(llama, tokenizer, [], tiny_hparams(**settings)) is one, "converse"
        assert len(localizer._ENSEMBLES[llama]) == 2


class TestNewRules:
    """A rule is one entry of a table: settings, selection and files know it at once."""

    def test_of_aggregation(self, llama, tokenizer, monkeypatch, tmp_path):
        monkeypatch.setitem(AGGREGATIONS, "sum", Aggregation(lambda total, scores: total.add_(scores)))
        assert torch.equal(aggregate([SCORES, SCORES], "sum")[0], 2 * SCORES)
        self.is_known(llama, tokenizer, tmp_path, aggregation="sum")

    def test_of_scaling(self, llama, tokenizer, monkeypatch, tmp_path):
        monkeypatch.setitem(SCALES, "rows", lambda scores: scores / scores.abs().sum(1, keepdim=True))
        self.is_known(llama, tokenizer, tmp_path, score_scale="rows")

    def is_known(self, llama, tokenizer, tmp_path, **setting):
        hparams = tiny_hparams(**setting)
        localize(llama, tokenizer, REQUESTS, hparams).save(tmp_path / "e.json")
        assert NeuronEnsemble.load(tmp_path / "e.json").selection == dataclasses.replace(
            hparams.selection, layers=(0, 1, 2, 3)
        )


def test_public_keyword_call():
    """The call in README."""
    ensemble = select_ensemble(SCORES, p=0.25, target_module=LLAMA_DOWN)
    assert ensemble.neurons == {LLAMA_DOWN: {0: (0, 3)}}
    assert ensemble.selection == Selection(0.25, layers=(0, 1))
