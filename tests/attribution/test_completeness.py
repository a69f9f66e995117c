"""The completeness gap (Eq. 5): what a layer's scores sum to, against the change of the answer's probability."""

from __future__ import annotations

import pytest
import torch
from conftest import LLAMA_DOWN, SIZE, SPELLED, THREE_TOKENS, fingerprint, make_llama
from reference import answer_probability, neuron_value

from kne_easyedit.attribution import attribute, attribute_facts, gauss_legendre, riemann
from kne_easyedit.facts.encoding import encode
from kne_easyedit.models.targets import resolve_target

ENGINES = ["sweep", "whole"]
ROLES = ["down", "up", "attn_out", "query"]


def literal_change(model, tokenizer, fact, template):
    """``sum_j P(w_j) - P(0)`` for every layer, by full passes: ``(layers,)``."""
    encoded = encode(tokenizer, *fact)
    changes = []
    for layer in range(SIZE["layers"]):
        module, change = model.get_submodule(template.format(layer)), 0.0
        for position, answer in zip(encoded.positions, encoded.answer):
            ids = torch.tensor([encoded.ids[: position + 1]])
            clean = neuron_value(model, module, ids)
            with torch.no_grad():
                change += answer_probability(model, module, ids, answer, clean)
                change -= answer_probability(model, module, ids, answer, 0 * clean)
        changes.append(change)
    return torch.stack(changes)


def gap(family, tokenizer, steps, role="down", **settings):
    return attribute(
        family.model, tokenizer, *THREE_TOKENS, getattr(family, role), steps, return_completeness=True, **settings
    )[1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("role", ROLES)
def test_the_gap_is_the_sum_minus_the_literal_change(family, tokenizer, role, engine):
    """For several answer tokens; with one step the gap is as large as the change."""
    template = getattr(family, role)
    change = literal_change(family.model, tokenizer, THREE_TOKENS, template)
    assert change.abs().max() > 0.02
    for steps in (1, 5):
        scores, found = attribute(
            family.model, tokenizer, *THREE_TOKENS, template, steps, engine=engine, return_completeness=True
        )
        assert found.shape == (SIZE["layers"],)
        assert (found - (scores.sum(-1) - change)).abs().max() < 1e-9
        assert found.abs().max() > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_of_the_riemann_sum_it_falls_as_one_over_m(llama64, tokenizer, engine):
    def error(steps):
        _, found = attribute(
            llama64, tokenizer, *SPELLED, LLAMA_DOWN, steps, layers=[1, 3], engine=engine, return_completeness=True
        )
        return found.abs().sum().item()

    assert error(400) / error(200) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("role", ROLES)
def test_of_many_gauss_legendre_nodes_it_is_nearly_zero(family, tokenizer, role):
    many, few = (gap(family, tokenizer, m, role, quadrature=gauss_legendre).abs().max() for m in (200, 3))
    assert many < 1e-4 < few


@pytest.mark.parametrize("engine", ENGINES)
def test_spoilt_scores_show(family, tokenizer, engine):
    """Converse: weights that are a tenth too large leave a tenth of the change."""
    change = literal_change(family.model, tokenizer, THREE_TOKENS, family.down)

    def spoilt(m):
        nodes, weights = gauss_legendre(m)
        return nodes, 1.1 * weights

    found = gap(family, tokenizer, 60, quadrature=spoilt, engine=engine)
    assert (found - 0.1 * change).abs().max() < 1e-4 < 0.1 * change.abs().max()


def test_both_engines_and_every_chunk_size_agree(family, tokenizer):
    expected = gap(family, tokenizer, 4, "up", engine="whole")
    for chunk_rows in (1, 9, 10_000):
        assert (gap(family, tokenizer, 4, "up", chunk_rows=chunk_rows) - expected).abs().max() < 1e-12


def test_several_facts_and_modules(family, facts):
    """A gap for every target, fact and layer; padding of shorter answers does not count. Scores stay the same."""
    model = family.model
    targets = [resolve_target(model, family.down, [1, 3]), resolve_target(model, family.query)]
    plain = attribute_facts(model, targets, facts, 3)
    before = fingerprint(model)
    scores, gaps = attribute_facts(model, targets, facts, 3, return_completeness=True)
    assert fingerprint(model) == before
    assert all(torch.equal(one, other) for one, other in zip(plain, scores, strict=True))
    assert [tuple(found.shape) for found in gaps] == [(3, 2), (3, 4)]
    for i, fact in enumerate(facts):
        _, alone = attribute_facts(model, targets, [fact], 3, return_completeness=True)
        for together, one in zip(gaps, alone, strict=True):
            assert (together[i] - one[0]).abs().max() < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_in_bfloat16_it_is_in_float32(tokenizer, engine):
    model = make_llama(torch.bfloat16)
    scores, found = attribute(
        model, tokenizer, *THREE_TOKENS, LLAMA_DOWN, 50, engine=engine, return_completeness=True, quadrature=riemann
    )
    assert scores.dtype == found.dtype == torch.float32
    assert found.isfinite().all() and found.abs().max() < 0.1
