"""Every linear layer of every family against the literal reference: replayed, by full passes, or refused."""

from __future__ import annotations

import logging
import re
from functools import lru_cache

import pytest
import torch
from conftest import ONE_TOKEN, SIZE, THREE_TOKENS, NoDetours, fingerprint, make_tokenizer, sharpened
from families import FAMILIES, OTHERS, REFUSED, REPLAYED, made, make, templates, two_kinds
from reference import literal_attribution
from rounding import A_MODEL, roundings
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from kne_easyedit.attribution.engine import attribute, attribute_facts
from kne_easyedit.attribution.quadrature import gauss_legendre
from kne_easyedit.attribution.replay import ReplayMismatch, UnsupportedModel
from kne_easyedit.models.targets import resolve_target

STEPS = 3
EXACT = 1e-9
ENGINES = ("auto", "sweep", "whole")


@lru_cache
def reference(name: str, template: str) -> torch.Tensor:
    with NoDetours():
        return literal_attribution(made(name), make_tokenizer(), *THREE_TOKENS, template, STEPS)


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest score."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def per_module(names) -> list:
    """Every module of every family; of families whose layers are built alike, all but two modules are marked slow."""
    return [
        pytest.param(
            name,
            template,
            id=f"{name}-{template.split('{}.')[1]}",
            marks=[] if of_each_kind(name, template) else [pytest.mark.slow],
        )
        for name in names
        for template in templates(name)
    ]


def of_each_kind(name: str, template: str) -> bool:
    return name in ("llama", "gptj", "gpt2", "phi3") or template in two_kinds(name)


@pytest.fixture
def exact():
    """The families' own detours through float32 lifted: their code is then as exact as ours."""
    with NoDetours():
        yield


def mlp_end(name: str) -> nn.Module:
    """The last linear module of layer 1."""
    return made(name).get_submodule(templates(name)[-1].format(1))


class TestLiteralReference:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_the_table_names_every_linear_module(self, name):
        kind = FAMILIES[name]
        for layer in made(name).get_submodule(kind.path):
            found = {path for path, module in layer.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
            assert found and found == {*kind.linear.split(), *kind.weight_only.split()}

    @pytest.mark.parametrize(("name", "template"), per_module(REPLAYED))
    def test_sweep(self, exact, tokenizer, name, template):
        ours = attribute(made(name), tokenizer, *THREE_TOKENS, template, STEPS, engine="sweep")
        assert ours.dtype == torch.float64
        assert ours.abs().max() > 0.01, "too small to show a bug"
        assert off(ours, reference(name, template)) < EXACT

    @pytest.mark.parametrize(
        ("name", "template"),
        [
            case
            for case in per_module(FAMILIES)
            if case.values[0] in REFUSED or case.values[1] in two_kinds(case.values[0])
        ],
    )
    def test_whole_model(self, exact, tokenizer, name, template):
        ours = attribute(made(name), tokenizer, *THREE_TOKENS, template, STEPS, engine="whole")
        assert ours.dtype == torch.float64
        assert ours.abs().max() > 0.01, "too small to show a bug"
        assert off(ours, reference(name, template)) < EXACT

    @pytest.mark.parametrize("name", REPLAYED)
    def test_float32_as_the_library_has_it(self, tokenizer, name):
        """No detour lifted."""
        model, template = made(name, torch.float32), two_kinds(name)[1]
        ours = attribute(model, tokenizer, *ONE_TOKEN, template, STEPS, engine="sweep")
        assert ours.dtype == torch.float32
        assert roundings(ours, literal_attribution(model, tokenizer, *ONE_TOKEN, template, STEPS)) < A_MODEL

    def test_gemma2_as_the_library_loads_it(self, exact, tokenizer):
        """With no attention named, some versions drop the softcap: scores are those of the model as it runs."""
        model = make("gemma2", attn_implementation=None)
        theirs = literal_attribution(model, tokenizer, *ONE_TOKEN, templates("gemma2")[0], STEPS)
        assert off(attribute(model, tokenizer, *ONE_TOKEN, templates("gemma2")[0], STEPS), theirs) < EXACT

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("mistral-window", dict(sliding_window=5)),
            ("gemma2", dict(sliding_window=5)),
            ("gemma2", dict(attn_logit_softcapping=None)),
            ("gemma2", dict(final_logit_softcapping=None)),
            ("gemma2", dict(layer_types=["full_attention"] * 3)),
            ("gemma3", dict(sliding_window=5)),
            ("gemma3", dict(layer_types=["sliding_attention"] * 3)),
            ("neox", dict(use_parallel_residual=False)),
            (
                "llama",
                dict(
                    attn_implementation="eager",
                    rope_theta=50.0,
                    rope_parameters=dict(rope_type="default", rope_theta=50.0),
                ),
            ),
        ],
    )
    def test_what_a_family_does_differently_shows(self, exact, tokenizer, name, change):
        """Converse: the same weights without it give other scores, so that leaving it out would fail."""
        template = two_kinds(name)[1]
        other = attribute(make(name, **change), tokenizer, *THREE_TOKENS, template, STEPS, engine="sweep")
        assert off(other, reference(name, template)) > 1e-3


class TestBatches:
    @pytest.mark.parametrize("name", REPLAYED)
    @pytest.mark.parametrize("chunk_rows", [None, 40])
    def test_several_facts_and_modules_are_as_each_alone(self, exact, facts, name, chunk_rows):
        model = made(name)
        targets = [resolve_target(model, template) for template in two_kinds(name)]
        together = attribute_facts(model, targets, facts, STEPS, chunk_rows=chunk_rows, engine="sweep")
        for target, of_target in zip(targets, together, strict=True):
            assert of_target.shape == (len(facts), 3, target.n_neurons)
            for fact, scores in zip(facts, of_target, strict=True):
                (alone,) = attribute_facts(model, [target], [fact], STEPS, engine="sweep")
                assert off(scores, alone[0]) < EXACT

    @pytest.mark.parametrize("name", FAMILIES)
    def test_the_slow_way_takes_the_same(self, exact, facts, name):
        """Several facts and modules, another quadrature, batches cut short: each as alone, or as the sweep has it."""
        model, few = made(name), facts[::2]
        targets = [resolve_target(model, template, [0, 2]) for template in two_kinds(name)]
        settings = dict(quadrature=gauss_legendre, chunk_rows=20)
        slow = attribute_facts(model, targets, few, 2, engine="whole", **settings)
        if FAMILIES[name].refused:
            other = [
                attribute_facts(model, [t], [fact], 2, engine="whole", quadrature=gauss_legendre)[0]
                for t in targets
                for fact in few
            ]
            other = [torch.cat(other[:2]), torch.cat(other[2:])]
        else:
            other = attribute_facts(model, targets, few, 2, engine="sweep", **settings)
        for ours, theirs in zip(slow, other, strict=True):
            assert off(ours, theirs) < EXACT


class TestRefused:
    """What cannot be replayed takes the slow way, and it is said why."""

    @pytest.mark.parametrize("name", REFUSED)
    def test_the_sweep_says_why(self, tokenizer, name):
        with pytest.raises(UnsupportedModel, match=re.escape(FAMILIES[name].refused)) as error:
            attribute(made(name), tokenizer, *ONE_TOKEN, templates(name)[0], STEPS, engine="sweep")
        assert not isinstance(error.value, ReplayMismatch)

    @pytest.mark.parametrize("name", REFUSED)
    def test_auto_is_exact_and_warns_once_a_model(self, exact, tokenizer, caplog, name):
        """Every module of a model would say the same."""
        for _ in range(2):
            model = make(name)
            for template in two_kinds(name):
                ours = attribute(model, tokenizer, *THREE_TOKENS, template, STEPS)
                assert off(ours, reference(name, template)) < EXACT
        messages = [
            record.getMessage() for record in caplog.records if record.name == "kne_easyedit.attribution.engine"
        ]
        assert len(messages) == 2
        assert all(
            record.levelno == logging.WARNING
            for record in caplog.records
            if record.name == "kne_easyedit.attribution.engine"
        )
        for message in messages:
            assert message.startswith(FAMILIES[name].refused) and "whole model" in message

    @pytest.mark.parametrize("name", REPLAYED)
    def test_auto_does_not_warn_needlessly(self, exact, tokenizer, caplog, name):
        ours = attribute(make(name), tokenizer, *THREE_TOKENS, templates(name)[-1], STEPS)
        assert off(ours, reference(name, templates(name)[-1])) < EXACT
        assert not [record for record in caplog.records if record.name.startswith("kne_easyedit")]

    @pytest.mark.parametrize("name", OTHERS)
    def test_auto_finds_a_way_for_any_decoder(self, exact, tokenizer, name):
        model, kind = make(name), OTHERS[name]
        for template in (f"{kind.path}.{{}}.{module}" for module in kind.linear.split()):
            theirs = literal_attribution(model, tokenizer, *THREE_TOKENS, template, STEPS)
            assert theirs.abs().max() > 0.01
            assert off(attribute(model, tokenizer, *THREE_TOKENS, template, STEPS), theirs) < EXACT

    @pytest.mark.parametrize("engine", ENGINES)
    def test_encoder_decoder(self, tokenizer, engine):
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=24,
            d_kv=6,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
        model = sharpened(T5ForConditionalGeneration(config), torch.float32, 1)
        before = fingerprint(model)
        with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is an encoder-decoder"):
            attribute(model, tokenizer, *ONE_TOKEN, "decoder.block.{}.layer.2.DenseReluDense.wo", STEPS, engine=engine)
        assert fingerprint(model) == before


class TestModulesWithoutARowAPosition:
    """A module that does not run at every position has no output there to attribute: the error names it."""

    @pytest.mark.parametrize("engine", ENGINES)
    def test_never_called(self, tokenizer, engine):
        model = make("llama")
        for layer in model.model.layers:
            layer.spare = nn.Linear(SIZE["hidden"], SIZE["hidden"], dtype=torch.float64)
        with pytest.raises((UnsupportedModel, ValueError), match="spare"):
            attribute(model, tokenizer, *ONE_TOKEN, "model.layers.{}.spare", STEPS, engine=engine)

    def test_mamba_may_only_take_the_weight(self, exact, tokenizer):
        model, template = made("mamba"), "backbone.layers.{}.mixer.dt_proj"
        try:
            theirs = literal_attribution(model, tokenizer, *ONE_TOKEN, template, STEPS)
        except IndexError:  # never called: no output seen
            with pytest.raises((UnsupportedModel, ValueError), match="dt_proj"):
                attribute(model, tokenizer, *ONE_TOKEN, template, STEPS)
        else:
            assert off(attribute(model, tokenizer, *ONE_TOKEN, template, STEPS), theirs) < EXACT

    @pytest.mark.parametrize("engine", ENGINES)
    def test_an_expert_of_some_positions(self, tokenizer, monkeypatch, engine):
        """As in a mixture of experts: only the positions that the router sends there."""
        model = make("llama")
        for layer in model.model.layers:
            monkeypatch.setattr(layer.mlp, "forward", routed(layer.mlp))
        with pytest.raises((UnsupportedModel, ValueError), match="down_proj"):
            attribute(model, tokenizer, *ONE_TOKEN, templates("llama")[-1], STEPS, engine=engine)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_an_expert_of_all_positions_in_another_order(self, tokenizer, monkeypatch, engine):
        """Its outputs are as many as the positions, and belong to others: the number alone does not tell."""
        model = make("llama")
        for layer in model.model.layers:
            layer.mlp.experts = nn.ModuleList([layer.mlp.down_proj])
            del layer.mlp.down_proj
            monkeypatch.setattr(layer.mlp, "forward", in_reverse(layer.mlp))
        with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.experts\.0 does not give one vector"):
            attribute(model, tokenizer, *ONE_TOKEN, "model.layers.{}.mlp.experts.0", STEPS, engine=engine)

    def test_a_numbered_step_that_all_positions_take(self, exact, tokenizer):
        """Converse: a sequence's module."""
        model = make("llama")
        for layer in model.model.layers:
            layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj)
        theirs = literal_attribution(model, tokenizer, *THREE_TOKENS, "model.layers.{}.mlp.down_proj.0", STEPS)
        found = attribute(model, tokenizer, *THREE_TOKENS, "model.layers.{}.mlp.down_proj.0", STEPS)
        assert off(found, theirs) < EXACT

    @pytest.mark.parametrize("engine", ENGINES)
    def test_the_rest_of_a_model_with_experts(self, exact, tokenizer, monkeypatch, engine):
        model, template = make("llama"), templates("llama")[0]
        for layer in model.model.layers:
            monkeypatch.setattr(layer.mlp, "forward", routed(layer.mlp))
        theirs = literal_attribution(model, tokenizer, *THREE_TOKENS, template, STEPS)
        assert off(attribute(model, tokenizer, *THREE_TOKENS, template, STEPS, engine=engine), theirs) < EXACT


def in_reverse(mlp: nn.Module):
    def forward(hidden):
        return mlp.experts[0]((mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)).flip(1)).flip(1)

    return forward


def routed(mlp: nn.Module):
    def forward(hidden):
        here = hidden[..., 0] > 0
        some = hidden[here]
        out = torch.zeros_like(hidden)
        out[here] = mlp.down_proj(mlp.act_fn(mlp.gate_proj(some)) * mlp.up_proj(some))
        return out

    return forward


MIXED = {
    "earlier": lambda x: x + 0.5 * x.roll(1, dims=-2),
    "count": lambda x: x + 0.1 * x.shape[-2],
}


class TestSelfCheck:
    """One layer that looks at other rows: its replay differs, and there must be no scores."""

    @pytest.mark.parametrize("mixed", MIXED)
    @pytest.mark.parametrize("name", REPLAYED)
    def test_a_layer_tampered_with(self, tokenizer, monkeypatch, name, mixed):
        model, end = made(name), mlp_end(name)
        monkeypatch.setattr(end, "forward", lambda x, own=end.forward: own(MIXED[mixed](x)))
        before = fingerprint(model)
        for template, engine in zip(two_kinds(name), ("auto", "sweep")):
            with pytest.raises(ReplayMismatch, match=f"{FAMILIES[name].model}: replaying layer 1 gives another result"):
                attribute(model, tokenizer, *ONE_TOKEN, template, STEPS, engine=engine)
        assert fingerprint(model) == before

    @pytest.mark.parametrize("name", REPLAYED)
    def test_a_head_tampered_with(self, tokenizer, monkeypatch, name):
        model = made(name)
        head = model.get_output_embeddings()
        monkeypatch.setattr(head, "forward", lambda x, own=head.forward: own(MIXED["earlier"](x)))
        with pytest.raises(ReplayMismatch, match="replaying the output head"):
            attribute(model, tokenizer, *ONE_TOKEN, templates(name)[0], STEPS)


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
    @pytest.mark.parametrize("name", [name for name in (*REPLAYED, "mamba", "bloom") if name != "gpt-oss"])
    def test_nearly_the_same_scores_in_float32(self, tokenizer, name, dtype):
        """Not so with routed experts (GPT-OSS): rounding lets a router choose others."""
        for template in two_kinds(name):
            fine = attribute(made(name, torch.float32), tokenizer, *ONE_TOKEN, template, STEPS)
            rough = attribute(made(name, dtype), tokenizer, *ONE_TOKEN, template, STEPS)
            assert rough.dtype == torch.float32 and rough.isfinite().all()
            assert torch.corrcoef(torch.stack([fine.flatten(), rough.flatten()]))[0, 1] > 0.98


class TestAsFound:
    @pytest.mark.parametrize("engine", ["sweep", "whole"])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_every_family_is_left_as_it_was(self, tokenizer, name, engine):
        """After scores, and after a refusal."""
        model = made(name, torch.float32)
        before = fingerprint(model)
        if engine == "whole" or not FAMILIES[name].refused:
            for template in two_kinds(name):
                attribute(model, tokenizer, *ONE_TOKEN, template, 2, engine=engine)
        else:
            with pytest.raises(Exception):  # noqa: B017 - which one is TestRefused's
                attribute(model, tokenizer, *ONE_TOKEN, templates(name)[0], 2, engine=engine)
        assert fingerprint(model) == before
