"""Eq. 6-7: which neurons are kept, and the ensemble as a frozen value that survives a file."""

import dataclasses
import json

import pytest
import torch
from conftest import LLAMA_DOWN, SIZE, fingerprint, make_gptj, make_llama

from kne_easyedit.localization.ensemble import NeuronEnsemble, select_ensemble
from kne_easyedit.localization.selection import aggregate

UP = "model.layers.{}.mlp.up_proj"


def unique_facts(*shape):
    """Positive scores without ties, in a fixed random order."""
    n = torch.Size(shape).numel()
    return (torch.randperm(n, generator=torch.Generator().manual_seed(1)) + 1.0).view(shape)


def select(scores, p, **settings):
    return select_ensemble(scores, p, target_module=LLAMA_DOWN, **settings)


def rows(ensemble, template=LLAMA_DOWN):
    return {layer: list(found) for layer, found in ensemble.neurons[template].items()}


class TestThreshold:
    @pytest.mark.parametrize("p", [0.001, 0.01, 0.04, 0.07, 0.29, 0.5, 0.57, 0.999, 1.0])
    def test_floor_of_the_fraction_is_kept(self, p):
        """0.29 * 100 is 28.999... in floating point, and yet 29 neurons; at least the largest is kept."""
        ensemble = select(unique_facts(5, 20), p)
        assert ensemble.size == max(1, {0.29: 29, 0.57: 57, 0.07: 7}.get(p, int(p * 100)))

    def test_the_largest_are_kept(self):
        scores = unique_facts(4, 25)
        ensemble = select(scores, 0.13)
        kept = sorted(scores[layer, row].item() for layer, found in rows(ensemble).items() for row in found)
        assert kept == list(range(88, 101))
        assert ensemble.thresholds[LLAMA_DOWN] == 88

    def test_one_threshold_over_all_layers(self):
        """Not one for each layer: a layer of large scores takes them all."""
        scores = unique_facts(2, 10)
        scores[1] += 100
        assert rows(select(scores, 0.5)) == {1: list(range(10))}
        assert select(scores, 0.5).counts() == {LLAMA_DOWN: {0: 0, 1: 10}}

    def test_every_template_has_its_own(self):
        """Not one over all: scores of a larger scale do not displace others."""
        scores = {LLAMA_DOWN: unique_facts(2, 10), UP: 1000 * unique_facts(2, 30)}
        ensemble = select_ensemble(scores, 0.2)
        assert {t: sum(c.values()) for t, c in ensemble.counts().items()} == {LLAMA_DOWN: 4, UP: 12}
        assert ensemble.thresholds == {LLAMA_DOWN: 17, UP: 49_000}
        assert ensemble.widths == {LLAMA_DOWN: 10, UP: 30}

    def test_equal_scores_are_kept_together(self):
        scores = torch.tensor([[5.0, 3.0, 3.0], [3.0, 1.0, 1.0]])
        assert rows(select(scores, 2 / 6)) == {0: [0, 1, 2], 1: [0]}

    def test_only_positive_scores(self):
        scores = torch.tensor([[-1.0, 0.0, 2.0], [0.0, -0.0, 1e-30]])
        assert rows(select(scores, 1.0)) == {0: [2], 1: [2]}

    @pytest.mark.parametrize("value", [0.0, -0.3])
    def test_nothing_positive_is_an_error(self, value):
        with pytest.raises(ValueError, match=r"ensemble: empty, .*raise p or localise on other facts"):
            select(torch.full((3, 4), value), 0.5)

    def test_rows_stand_for_the_layers_given(self):
        ensemble = select(torch.tensor([[1.0, 9.0], [8.0, 2.0]]), 0.5, layers=[3, 7])
        assert rows(ensemble) == {3: [1], 7: [0]}
        assert ensemble.layers == (3, 7)

    def test_scores_are_left_alone(self):
        scores = unique_facts(3, 4, 5)
        before = scores.clone()
        select(scores, 0.1)
        assert torch.equal(scores, before)


class TestRefused:
    @pytest.mark.parametrize("p", [0, 0.0, -0.1, 1.0001, 4, float("nan")])
    def test_p_out_of_range(self, p):
        with pytest.raises(ValueError, match=rf"p: {p!r} must be in \(0, 1\]"):
            select(unique_facts(2, 2), p)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_scores_that_are_not_finite(self, value):
        scores = unique_facts(2, 5)
        scores[1, 3] = value
        with pytest.raises(FloatingPointError, match=r"scores: .*down_proj are not finite"):
            select(scores, 0.5)

    def test_scores_of_another_number_of_layers(self):
        with pytest.raises(
            ValueError, match=r"scores: .* has shape \(2, 5\), expected shape \(layers, d2\) for layers \[0, 1, 2\]"
        ):
            select(unique_facts(2, 5), 0.5, layers=[0, 1, 2])

    def test_scores_without_layers(self):
        with pytest.raises(ValueError, match=r"scores: .* shape \(5,\)"):
            select(unique_facts(5), 0.5)

    def test_a_tensor_without_its_template(self):
        with pytest.raises(ValueError, match="target_module: name the template"):
            select_ensemble(unique_facts(2, 2), 0.5)

    @pytest.mark.parametrize(
        "found", [(3, 1), (1, 1), (-1, 2), (0, 24), ()], ids=["descending", "twice", "negative", "too wide", "none"]
    )
    def test_rows_that_cannot_be(self, found):
        with pytest.raises(ValueError, match=r"ensemble: rows of model.layers.2.mlp.down_proj must be .* in \[0, 24\)"):
            NeuronEnsemble({LLAMA_DOWN: {1: (0,), 2: found}}, {LLAMA_DOWN: 24})

    def test_rows_of_an_unknown_width(self):
        with pytest.raises(ValueError, match="ensemble: rows of"):
            NeuronEnsemble({LLAMA_DOWN: {0: (1,)}}, {UP: 24})

    @pytest.mark.parametrize("neurons", [{}, {LLAMA_DOWN: {}}], ids=str)
    def test_no_neurons(self, neurons):
        with pytest.raises(ValueError, match="ensemble: empty"):
            NeuronEnsemble(neurons, {LLAMA_DOWN: 24})


class TestAggregation:
    def test_max_and_mean(self):
        scores = torch.tensor([[[1.0, -5.0]], [[3.0, -1.0]], [[2.0, -9.0]]])
        assert aggregate(scores, "max")[0].tolist() == [[3, -1]]
        assert aggregate(scores, "mean")[0].tolist() == [[2, -5]]
        assert aggregate(scores, "max")[1] == aggregate(iter(scores), "mean")[1] == 3

    def test_before_the_threshold(self):
        """The fact's largest neurons under max, the steady one under mean."""
        scores = torch.tensor([[[9.0, 5.0, 0.0]], [[0.0, 5.0, 8.0]]])
        assert rows(select(scores, 2 / 3, aggregation="max")) == {0: [0, 2]}
        assert rows(select(scores, 1 / 3, aggregation="mean")) == {0: [1]}
        assert select(scores, 0.5, aggregation="mean").facts == 2

    def test_one_by_one_is_as_all_at_once(self):
        scores = unique_facts(5, 3, 4)
        for aggregation, expected in (("max", scores.amax(0)), ("mean", scores.mean(0))):
            assert torch.allclose(aggregate((s for s in scores), aggregation)[0], expected)
            assert rows(select(scores, 0.3, aggregation=aggregation)) == rows(select(expected, 0.3))

    def test_the_first_tensor_is_left_alone(self):
        scores = unique_facts(2, 2, 2)
        before = scores.clone()
        aggregate(list(scores), "mean")
        assert torch.equal(scores, before)

    def test_unknown(self):
        with pytest.raises(ValueError, match="aggregation: 'median' must be one of"):
            aggregate(unique_facts(2, 2, 2), "median")

    def test_of_no_facts(self):
        with pytest.raises(ValueError, match="scores: there are none to aggregate"):
            aggregate([], "max")


@pytest.fixture
def ensemble():
    return select_ensemble(
        {LLAMA_DOWN: unique_facts(4, 24) / 7, UP: unique_facts(4, 40) / 3}, 0.1, aggregation="mean", facts=12
    )


class TestFile:
    def test_round_trip_is_exact(self, ensemble, tmp_path):
        ensemble.save(tmp_path / "new" / "ensemble.json")
        assert NeuronEnsemble.load(tmp_path / "new" / "ensemble.json") == ensemble

    def test_a_hand_made_one(self, tmp_path):
        made = NeuronEnsemble({LLAMA_DOWN: {2: (0, 257)}}, {LLAMA_DOWN: 300})
        made.save(tmp_path / "e.json")
        loaded = NeuronEnsemble.load(str(tmp_path / "e.json"))
        assert loaded == made and loaded.p is None and rows(loaded) == {2: [0, 257]}

    def test_other_neurons_are_another_ensemble(self, ensemble, tmp_path):
        """Converse of the round trip."""
        ensemble.save(tmp_path / "e.json")
        content = json.loads((tmp_path / "e.json").read_text())
        content["neurons"][LLAMA_DOWN]["0"] = [0]
        (tmp_path / "e.json").write_text(json.dumps(content))
        assert NeuronEnsemble.load(tmp_path / "e.json") != ensemble

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\xff\xfe\x00",
            b"neurons",
            b"[]",
            b"3",
            b"null",
            b"{}",
            b'{"format": "kne-ensemble-1"}',
            b'{"format": "other", "neurons": {}, "widths": {}, "layers": []}',
            b'{"format": "kne-ensemble-1", "neurons": [1], "widths": {}, "layers": []}',
            b'{"format": "kne-ensemble-1", "neurons": {"m.{}.a": {"0": [1]}}, "widths": {"m.{}.a": 9}, "more": 1}',
            b'{"format": "kne-ensemble-1", "neurons": {"m.{}.a": {"x": [1]}}, "widths": {"m.{}.a": 9}, "layers": []}',
            b'{"format": "kne-ensemble-1", "neurons": {"m.{}.a": {"0": ["x"]}}, "widths": {"m.{}.a": 9}, "layers": []}',
            b'{"format": "kne-ensemble-1", "neurons": {"m.{}.a": {"0": [9]}}, "widths": {"m.{}.a": 9}, "layers": []}',
        ],
    )
    def test_a_foreign_file(self, tmp_path, content):
        path = tmp_path / "e.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"e.json is no ensemble file"):
            NeuronEnsemble.load(path)

    def test_a_truncated_file(self, ensemble, tmp_path):
        path = tmp_path / "e.json"
        ensemble.save(path)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=r"e.json is no ensemble file"):
            NeuronEnsemble.load(path)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"e.json"):
            NeuronEnsemble.load(tmp_path / "e.json")


class TestValue:
    def test_frozen(self, ensemble):
        with pytest.raises(dataclasses.FrozenInstanceError):
            ensemble.p = 0.5

    def test_counts_and_size(self, ensemble):
        assert ensemble.size == 9 + 16
        counts = ensemble.counts()
        assert {t: list(c) for t, c in counts.items()} == {LLAMA_DOWN: [0, 1, 2, 3], UP: [0, 1, 2, 3]}
        assert counts[UP] == {layer: len(rows(ensemble, UP).get(layer, ())) for layer in range(4)}

    @pytest.mark.parametrize("tied", [True, False])
    def test_parameter_share(self, tied):
        model = make_llama(tie_word_embeddings=tied)
        made = NeuronEnsemble(
            {LLAMA_DOWN: {0: (1, 5), 3: (7,)}, UP: {2: (0,)}}, {LLAMA_DOWN: SIZE["hidden"], UP: SIZE["inner"]}
        )
        hidden, inner, vocabulary = SIZE["hidden"], SIZE["inner"], model.config.vocab_size
        attention = 2 * hidden * hidden + 2 * hidden * hidden // 2  # two key-value heads of four
        layer = attention + 3 * hidden * inner + 2 * hidden
        total = SIZE["layers"] * layer + hidden + vocabulary * hidden * (1 if tied else 2)
        assert made.parameter_share(model) == (3 * inner + 1 * hidden) / total

    def test_biases_are_not_counted(self):
        model = make_gptj()
        template = "transformer.h.{}.mlp.fc_out"
        made = NeuronEnsemble({template: {0: (1,)}}, {template: SIZE["hidden"]})
        total = sum(p.numel() for p in model.parameters())
        assert made.parameter_share(model) == SIZE["inner"] / total

    def test_another_model_is_refused(self, llama):
        before = fingerprint(llama)
        wider = NeuronEnsemble({LLAMA_DOWN: {0: (1,)}}, {LLAMA_DOWN: 4096})
        with pytest.raises(
            ValueError, match="has 4096 neurons a layer, but 24 in this model; it was made for another model"
        ):
            wider.targets(llama)
        deeper = NeuronEnsemble({LLAMA_DOWN: {31: (1,)}}, {LLAMA_DOWN: SIZE["hidden"]})
        with pytest.raises(ValueError, match=r"layers: \[31\] out of range"):
            deeper.parameter_share(llama)
        foreign = NeuronEnsemble({"transformer.h.{}.mlp.fc_out": {0: (1,)}}, {"transformer.h.{}.mlp.fc_out": 24})
        with pytest.raises(ValueError, match="matches no module of LlamaForCausalLM"):
            foreign.targets(llama)
        assert fingerprint(llama) == before

    def test_targets(self, llama, ensemble):
        target, found = ensemble.targets(llama)[UP]
        assert [llama.get_submodule(name) for name in target.names] == list(target.modules)
        assert dict(zip(target.layers, map(list, found), strict=True)) == rows(ensemble, UP)
