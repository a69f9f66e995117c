"""What holds for any fact, any cut of the work and any scores: hypothesis looks for the exception."""

from __future__ import annotations

import math
import os
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from conftest import GPT2_DOWN, GPTJ_DOWN, LLAMA_DOWN, NoDetours, make_gpt2, make_gptj, make_llama
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from reference import answer_probability, literal_attribution_of_ids, neuron_value
from rounding import ONE_SUM

from kne_easyedit.attribution.engine import attribute_facts
from kne_easyedit.attribution.quadrature import QUADRATURES, gauss_legendre
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.localization.ensemble import select_ensemble
from kne_easyedit.localization.selection import aggregate
from kne_easyedit.models.targets import resolve_target

LAYERS = 3
ROUNDING = 1e-11
"""Relative to a fact's largest score: sums in another order, in float64."""


MANY = os.environ.get("KNE_TEST_EXAMPLES") == "many"
"""`make test-slow` tries the whole set of examples, other runs its first part."""
if MANY:
    pytestmark = [pytest.mark.unit, pytest.mark.slow]


def tried(examples: int) -> settings:
    """One fixed set of examples: a failure is one on every machine and in every run."""
    examples = examples if MANY else max(5, examples // 8)
    phases, checks = [Phase.generate, Phase.shrink], [HealthCheck.too_slow]
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        suppress_health_check=checks,
    )


FAMILIES = {
    "llama": (
        lambda: make_llama(torch.float64, num_hidden_layers=LAYERS),
        "model.layers.{}.",
        "self_attn.k_proj mlp.up_proj",
        LLAMA_DOWN,
    ),
    "gptj": (
        lambda: make_gptj(torch.float64, n_layer=LAYERS),
        "transformer.h.{}.",
        "attn.q_proj attn.out_proj",
        GPTJ_DOWN,
    ),
    "gpt2": (lambda: make_gpt2(torch.float64, n_layer=LAYERS), "transformer.h.{}.", "attn.c_attn mlp.c_fc", GPT2_DOWN),
}


@lru_cache
def model_of(family: str, mild: float = 1.0):
    with torch._C.DisableTorchFunction():  # the same buffers inside `NoDetours` and outside
        model = FAMILIES[family][0]()
    with torch.no_grad():
        for parameter in model.get_submodule(
            LLAMA_DOWN.split(".{}")[0] if family == "llama" else "transformer.h"
        ).parameters():
            parameter.mul_(mild if parameter.ndim == 2 else 1)
    return model


def templates_of(family: str) -> list[str]:
    _, path, modules, down = FAMILIES[family]
    return [down, *(path + module for module in modules.split())]


class Case(NamedTuple):
    facts: list[Fact]
    steps: int
    layers: list[int]
    chunk_rows: int
    templates: list[int]
    quadrature: str


@st.composite
def a_fact(draw, longest_answer=4) -> Fact:
    """Any tokens: text plays no part behind the tokenizer."""
    length = draw(st.integers(1, 8))
    size = length + draw(st.integers(1, longest_answer))
    ids = draw(st.lists(st.integers(0, model_of("llama").config.vocab_size - 1), min_size=size, max_size=size))
    return Fact("a prompt", "a target", tuple(ids), length)


@st.composite
def a_case(draw, most_facts=4, most_steps=6) -> Case:
    return Case(
        draw(st.lists(a_fact(), min_size=1, max_size=most_facts)),
        draw(st.integers(1, most_steps)),
        sorted(draw(st.sets(st.integers(0, LAYERS - 1), min_size=1))),
        draw(st.integers(1, 200)),
        draw(st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True)),
        draw(st.sampled_from(sorted(QUADRATURES))),
    )


def scores_of(family: str, case: Case, **changes) -> list[torch.Tensor]:
    """For each template ``(facts, layers, d2)``, in float64 throughout."""
    case = case._replace(**changes)
    model = model_of(family)
    targets = [resolve_target(model, templates_of(family)[i], case.layers) for i in case.templates]
    settings = dict(chunk_rows=case.chunk_rows, quadrature=QUADRATURES[case.quadrature], engine="sweep")
    with NoDetours():
        return attribute_facts(model, targets, case.facts, case.steps, **settings)


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], layers=slice(None)) -> None:
    """Equal (to these layers of ``theirs``) but for rounding, fact by fact: large scores must not hide small ones.

    What is zero may be rounded, too: the key of a single token, which attends to itself whatever its key is.
    """
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == torch.float64
        assert one.shape == other[:, layers].shape
        assert ((one - other[:, layers]).abs() <= ROUNDING * other.abs().amax((1, 2), keepdim=True) + 1e-16).all()


@pytest.mark.parametrize("family", FAMILIES)
class TestAttribution:
    @given(case=a_case(), other_chunk=st.one_of(st.none(), st.integers(1, 200)), data=st.data())
    @tried(40)
    def test_how_the_work_is_cut_does_not_count(self, family, case, other_chunk, data):
        """Rows in flight, order of the facts and of the modules, and which facts share the batch."""
        scores = scores_of(family, case)
        assert_same(scores_of(family, case, chunk_rows=other_chunk), scores)
        order = data.draw(st.permutations(range(len(case.facts))))
        assert_same(scores_of(family, case, facts=[case.facts[i] for i in order]), [s[list(order)] for s in scores])
        assert_same(scores_of(family, case, templates=case.templates[::-1])[::-1], scores)
        some = data.draw(st.sets(st.integers(0, len(case.facts) - 1), min_size=1))
        assert_same(
            scores_of(family, case, facts=[case.facts[i] for i in sorted(some)]), [s[sorted(some)] for s in scores]
        )

    @given(case=a_case())
    @tried(40)
    def test_layers_and_modules_do_not_know_of_each_other(self, family, case):
        """Some layers of some modules are the rows of all layers of all modules."""
        everything = scores_of(family, case, layers=[], templates=[0, 1, 2])
        assert_same(scores_of(family, case), [everything[i] for i in case.templates], case.layers)

    @given(case=a_case(most_facts=2, most_steps=3))
    @tried(15)
    def test_equals_the_literal_riemann_sum(self, family, case):
        ours = scores_of(family, case, quadrature="riemann")
        with NoDetours():
            theirs = [
                torch.stack(
                    [
                        literal_attribution_of_ids(
                            model_of(family),
                            fact.ids,
                            fact.prompt_length,
                            templates_of(family)[i],
                            case.steps,
                            case.layers,
                        )
                        for fact in case.facts
                    ]
                )
                for i in case.templates
            ]
        assert_same(ours, theirs)

    @given(fact=a_fact(longest_answer=1), layer=st.integers(0, LAYERS - 1), template=st.integers(0, 2))
    @tried(60)
    def test_completeness(self, family, fact, layer, template):
        """The scores of a layer add up to what the answer's probability owes to it.

        Milder weights: 24 nodes are enough for a smooth path, while the sharpest ones of the other tests take 100.
        """
        model, template = model_of(family, mild=0.4), templates_of(family)[template]
        module = model.get_submodule(template.format(layer))
        before, (answer,) = torch.tensor([fact.ids[:-1]]), fact.answer
        with NoDetours(), torch.no_grad():
            neurons = neuron_value(model, module, before)
            change = answer_probability(model, module, before, answer, neurons)
            change = change - answer_probability(model, module, before, answer, 0 * neurons)
            (scores,) = attribute_facts(
                model, [resolve_target(model, template, [layer])], [fact], 24, quadrature=gauss_legendre
            )
        assert scores.sum().item() == pytest.approx(change.item(), abs=1e-9)


def matrices(elements, most_layers=4, most_neurons=12):
    """``(layers, d2)`` of any shape."""
    return st.tuples(st.integers(1, most_layers), st.integers(1, most_neurons)).flatmap(
        lambda shape: st.lists(elements, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
            lambda values: torch.tensor(values, dtype=torch.float32).view(shape)
        )
    )


ties = st.integers(-3, 5).map(lambda value: value / 4)
spread = st.floats(-1, 1, width=32)


class TestSelection:
    @given(scores=st.one_of(matrices(ties), matrices(spread)), percent=st.integers(1, 100), first=st.integers(0, 30))
    @tried(200)
    def test_the_largest_and_positive(self, scores, percent, first):
        assume((scores > 0).any())
        numbers = list(range(first, first + len(scores)))
        ensemble = select_ensemble(scores, percent / 100, target_module=LLAMA_DOWN, layers=numbers)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        for layer, rows in ensemble.neurons[LLAMA_DOWN].items():
            chosen[layer - first, list(rows)] = True
        assert ensemble.size == chosen.sum() > 0
        assert (scores[chosen] > 0).all()
        left = scores[~chosen & (scores > 0)]
        assert not len(left) or scores[chosen].min() > left.max(), "equal scores are kept together"
        budget = max(1, percent * scores.numel() // 100)  # exact: no rounding of p
        counts = Counter(scores.flatten().tolist())
        assert ensemble.size <= budget - 1 + counts[scores[chosen].min().item()]
        positive = int((scores > 0).sum())
        assert ensemble.size >= min(budget, positive)

    @given(scores=matrices(st.integers(-3, 0).map(float)), percent=st.integers(1, 100))
    @tried(50)
    def test_nothing_positive_is_refused(self, scores, percent):
        with pytest.raises(ValueError, match="empty"):
            select_ensemble(scores, percent / 100, target_module=LLAMA_DOWN)

    @given(scores=matrices(spread), percents=st.tuples(st.integers(1, 100), st.integers(1, 100)).map(sorted))
    @tried(100)
    def test_a_larger_share_keeps_what_a_smaller_one_has(self, scores, percents):
        assume((scores > 0).any())
        fewer, more = (select_ensemble(scores, p / 100, target_module=LLAMA_DOWN).neurons[LLAMA_DOWN] for p in percents)
        for layer, rows in fewer.items():
            assert set(rows) <= set(more[layer])


class TestAggregation:
    @given(data=st.data(), aggregation=st.sampled_from(["max", "mean"]), n=st.integers(1, 5), size=st.integers(1, 12))
    @tried(100)
    def test_the_order_of_the_facts_does_not_count(self, data, aggregation, n, size):
        stack = torch.tensor(data.draw(st.lists(spread, min_size=n * size, max_size=n * size))).view(n, size)
        before = stack.clone()
        total, count = aggregate(iter(stack), aggregation)
        shuffled, _ = aggregate(stack[data.draw(st.permutations(range(n)))], aggregation)
        assert count == n
        assert torch.equal(stack, before), "the facts' own scores stay"
        if aggregation == "max":
            assert torch.equal(total, stack.amax(0)) and torch.equal(total, shuffled)
        else:
            # of one unit for all, so that sums which cancel are no exception
            unit = ONE_SUM * torch.finfo(total.dtype).eps * stack.abs().max()
            assert (total - stack.mean(0)).abs().max() <= unit and (total - shuffled).abs().max() <= unit
        assert not math.isnan(total.sum())
