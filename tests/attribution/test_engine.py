"""Eq. 3-5 against a literal reference, the axioms of integrated gradients, and what batches share."""

from typing import ClassVar

import pytest
import torch
from conftest import (
    GPT2_DOWN,
    LLAMA_DOWN,
    ONE_TOKEN,
    SIZE,
    SPELLED,
    THREE_TOKENS,
    all_layers,
    make_gpt2,
    sharpened,
)
from reference import answer_probability, literal_attribution, neuron_value
from rounding import A_MODEL, difference, largest, roundings
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kne_easyedit.attribution import attention
from kne_easyedit.attribution.engine import attribute, attribute_facts
from kne_easyedit.attribution.quadrature import riemann
from kne_easyedit.facts.encoding import encode
from kne_easyedit.models.targets import resolve_target

STEPS = 4
ROLES = ("down", "up", "attn_out", "query")
Q_PROJ = "model.layers.{}.self_attn.q_proj"


class TestLiteralReference:
    @pytest.mark.parametrize("role", ROLES)
    def test_equal_in_float64(self, family, tokenizer, role):
        template = getattr(family, role)
        for fact in (ONE_TOKEN, SPELLED):
            ours = attribute(family.model, tokenizer, *fact, template, STEPS)
            theirs = literal_attribution(family.model, tokenizer, *fact, template, STEPS)
            assert ours.dtype == torch.float64
            assert largest(theirs) > 0.02, "too small to show a bug"
            assert max(difference(ours, theirs)) < 1e-9

    @pytest.mark.parametrize("role", ["down", "up"])
    def test_equal_in_float32(self, family32, tokenizer, role):
        template = getattr(family32, role)
        ours = attribute(family32.model, tokenizer, *SPELLED, template, STEPS)
        theirs = literal_attribution(family32.model, tokenizer, *SPELLED, template, STEPS)
        assert ours.dtype == torch.float32
        assert roundings(ours, theirs) < A_MODEL

    @pytest.mark.parametrize("part", ["k_proj", "v_proj"])
    def test_keys_and_values_of_grouped_heads(self, llama64, tokenizer, part):
        """The predicting position attends to itself, so its own key and value move along the path."""
        template = f"model.layers.{{}}.self_attn.{part}"
        ours = attribute(llama64, tokenizer, *SPELLED, template, STEPS)
        theirs = literal_attribution(llama64, tokenizer, *SPELLED, template, STEPS)
        assert ours.shape == (SIZE["layers"], SIZE["hidden"] // 2)
        assert max(difference(ours, theirs)) < 1e-9

    @pytest.mark.parametrize("steps", [1, 2])
    def test_few_steps(self, family, tokenizer, steps):
        """With one step there is nothing but the end point, which all layers share."""
        for template in (family.down, family.up):
            ours = attribute(family.model, tokenizer, *THREE_TOKENS, template, steps)
            theirs = literal_attribution(family.model, tokenizer, *THREE_TOKENS, template, steps=steps)
            assert (ours - theirs).abs().max() < 1e-9

    def test_the_customary_twenty_steps_are_the_default(self, llama64, tokenizer):
        theirs = literal_attribution(llama64, tokenizer, *ONE_TOKEN, LLAMA_DOWN, steps=20)
        assert max(difference(attribute(llama64, tokenizer, *ONE_TOKEN, LLAMA_DOWN), theirs)) < 1e-9

    def test_a_slightly_wrong_reference_is_told_apart(self, family, tokenizer):
        """Converse: one step more, the left Riemann sum, or one answer token less are far beyond the tolerance."""
        right = literal_attribution(family.model, tokenizer, *SPELLED, family.down, STEPS)
        one_more = literal_attribution(family.model, tokenizer, *SPELLED, family.down, STEPS + 1)
        shorter = literal_attribution(family.model, tokenizer, SPELLED[0], SPELLED[1][:-1], family.down, STEPS)
        left = attribute_facts(
            family.model,
            [all_layers(family.model, family.down)],
            [encode(tokenizer, *SPELLED)],
            STEPS,
            quadrature=lambda m: (riemann(m)[0] - 1 / m, riemann(m)[1]),
        )[0][0]
        for wrong in (one_more, shorter, left):
            assert difference(wrong, right)[1] > 1e-3


class TestOtherFamilies:
    """Not promised by name in Eq. 5, but shipped as settings: they must be right or refused."""

    CONFIG: ClassVar = dict(
        vocab_size=100,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )

    @pytest.mark.parametrize("window", [4, None])
    def test_mistral_and_its_sliding_window(self, tokenizer, window):
        config = MistralConfig(**self.CONFIG, sliding_window=window, attn_implementation="sdpa")
        self.check(sharpened(MistralForCausalLM(config), torch.float32, 1), tokenizer, LLAMA_DOWN)

    @pytest.mark.parametrize("template", [LLAMA_DOWN, Q_PROJ])
    def test_qwen2_and_its_biases(self, tokenizer, template):
        config = Qwen2Config(**{k: v for k, v in self.CONFIG.items() if k != "head_dim"}, attn_implementation="sdpa")
        self.check(sharpened(Qwen2ForCausalLM(config), torch.float32, 1), tokenizer, template)

    @pytest.mark.parametrize("template", [GPT2_DOWN, "transformer.h.{}.attn.c_attn"])
    def test_gpt2_and_its_transposed_weights(self, tokenizer, template):
        self.check(make_gpt2(seed=1), tokenizer, template)

    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_softcapped_attention_and_logits(self, tokenizer, softcap):
        self.check(self.gemma(final_logit_softcapping=softcap), tokenizer, LLAMA_DOWN)

    def gemma(self, **changes):
        config = Gemma2Config(**self.CONFIG, sliding_window=4, attn_implementation="eager", **changes)
        return sharpened(Gemma2ForCausalLM(config), torch.float32, 1)

    def check(self, model, tokenizer, template):
        ours = attribute(model, tokenizer, *THREE_TOKENS, template, STEPS)
        theirs = literal_attribution(model, tokenizer, *THREE_TOKENS, template, STEPS)
        assert roundings(ours, theirs) < A_MODEL


class TestBatching:
    """How the work is cut does not change the result."""

    @pytest.mark.parametrize("chunk_rows", [1, 7, 10_000])
    def test_chunks(self, family, tokenizer, chunk_rows):
        for template in (family.down, family.up):
            whole = attribute(family.model, tokenizer, *SPELLED, template, STEPS)
            cut = attribute(family.model, tokenizer, *SPELLED, template, STEPS, chunk_rows=chunk_rows)
            assert max(difference(cut, whole)) < 1e-12

    @pytest.mark.parametrize("layers", [[0], [3], [1, 3]])
    def test_some_layers_are_rows_of_all_layers(self, family, tokenizer, layers):
        for template in (family.down, family.up):
            whole = attribute(family.model, tokenizer, *SPELLED, template, STEPS)
            some = attribute(family.model, tokenizer, *SPELLED, template, STEPS, layers=layers)
            assert max(difference(some, whole[layers])) < 1e-12

    @pytest.mark.parametrize("role", ROLES)
    @pytest.mark.parametrize("chunk_rows", [5, 10_000])
    def test_several_facts_are_as_each_alone(self, family, facts, role, chunk_rows):
        """Prompts and answers of different lengths: neither padding nor the other facts count."""
        target = all_layers(family.model, getattr(family, role))
        assert len({len(fact.ids) for fact in facts}) == len({len(fact.answer) for fact in facts}) == len(facts)
        together = attribute_facts(family.model, [target], facts, STEPS, chunk_rows=chunk_rows)[0]
        for fact, scores in zip(facts, together, strict=True):
            alone = attribute_facts(family.model, [target], [fact], STEPS)[0][0]
            assert max(difference(scores, alone)) < 1e-12

    def test_facts_differ(self, family, facts):
        """Converse: mixing up two facts of a batch would show."""
        scores = attribute_facts(family.model, [all_layers(family.model, family.down)], facts, STEPS)[0]
        for one, other in ((0, 1), (1, 2), (0, 2)):
            assert difference(scores[one], scores[other])[1] > 0.1

    def test_scores_are_shaped_layers_by_neurons(self, llama, tokenizer):
        assert attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, 1).shape == (SIZE["layers"], SIZE["hidden"])
        assert attribute(llama, tokenizer, *ONE_TOKEN, "model.layers.{}.mlp.up_proj", 1).shape == (
            SIZE["layers"],
            SIZE["inner"],
        )


class TestAxioms:
    @pytest.mark.parametrize("role", ["down", "up", "attn_out"])
    def test_completeness(self, family, tokenizer, role):
        """Per layer, the scores add up to ``P(w) - P(0)``, and the error of the right Riemann sum is O(1/m)."""
        model, template = family.model, getattr(family, role)
        change = torch.stack([self.change(model, tokenizer, template.format(i)) for i in range(SIZE["layers"])])
        assert largest(change) > 0.02

        def error(steps):
            return (attribute(model, tokenizer, *ONE_TOKEN, template, steps).sum(1) - change).abs()

        assert largest(error(400)) < 1e-3
        assert error(1600).sum() / error(800).sum() == pytest.approx(0.5, abs=0.05)

    def test_a_neuron_that_is_zero_has_no_attribution(self, llama64, tokenizer):
        with torch.no_grad():
            llama64.model.layers[1].mlp.down_proj.weight[7] = 0
        scores = attribute(llama64, tokenizer, *ONE_TOKEN, LLAMA_DOWN, STEPS)
        assert scores[1, 7] == 0
        assert (scores != 0).sum() == scores.numel() - 1

    def change(self, model, tokenizer, name):
        """P(w) - P(0) for the module ``name`` and the one-token answer."""
        module = model.get_submodule(name)
        ids = tokenizer(ONE_TOKEN[0], return_tensors="pt")["input_ids"]
        (answer,) = encode(tokenizer, *ONE_TOKEN).answer
        clean = neuron_value(model, module, ids)
        with torch.no_grad():
            return answer_probability(model, module, ids, answer, clean) - answer_probability(
                model, module, ids, answer, 0 * clean
            )


class TestQuadrature:
    @pytest.mark.parametrize("steps", [1, 3, 20])
    def test_right_riemann_sum(self, steps):
        nodes, weights = riemann(steps)
        assert nodes.tolist() == [pytest.approx(i / steps) for i in range(1, steps + 1)]
        assert weights.tolist() == [pytest.approx(1 / steps)] * steps

    @pytest.mark.parametrize("steps", [0, -1, 2.0, "20"])
    def test_other_numbers_of_steps_are_refused(self, llama, tokenizer, steps):
        with pytest.raises(ValueError, match=r"attribution_steps: .* at least 1"):
            attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, steps)


class TestTemplates:
    """What is named wrongly is refused with the nearest name that would do."""

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("model.layers.{}.mlp.down_porj", "matches no module of LlamaForCausalLM; nearest: .*mlp.down_proj"),
            ("transformer.h.{}.mlp.fc_out", "matches no module of LlamaForCausalLM"),
            ("model.layers.{}.mlp", "is a LlamaMLP, not a linear layer; nearest: model.layers"),
            ("model.layers.{}.input_layernorm", "not a linear layer"),
            ("model.layers.3.mlp.down_proj", "is not a template"),
            ("model.layers.{}.mlp.{}", "is not a template"),
            ("model.layers.x{}.mlp.down_proj", "is not a template"),
        ],
    )
    def test_wrong_template(self, llama, tokenizer, template, message):
        with pytest.raises(ValueError, match=f"target_modules: .*{message}"):
            attribute(llama, tokenizer, *ONE_TOKEN, template)

    @pytest.mark.parametrize("layers", [[4], [-1], [0, 99]])
    def test_layers_out_of_range(self, llama, tokenizer, layers):
        with pytest.raises(ValueError, match=r"layers: \[(4|-1|99)\] out of range; LlamaForCausalLM has layers 0 to 3"):
            attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, layers=layers)

    def test_layers_are_sorted_and_counted_once(self, llama):
        assert resolve_target(llama, LLAMA_DOWN, [3, 1, 3]).layers == (1, 3)

    def test_the_attention_interface_is_left_to_others(self, llama, tokenizer):
        """Only the layer in flight uses our attention, and only meanwhile."""
        attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, 1)
        assert llama.config._attn_implementation == "sdpa"
        with pytest.raises(LookupError):
            attention.PREFIX.get()


@pytest.mark.parametrize("engine", ["auto", "sweep", "whole"])
def test_a_fact_that_is_longer_than_the_model_takes_is_named(engine, tokenizer):
    model = make_gpt2()
    with pytest.raises(ValueError, match="the model takes"):
        attribute(model, tokenizer, "the " * 80, "Rome", GPT2_DOWN, 2, engine=engine)
