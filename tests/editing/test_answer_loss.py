"""The answers' cross-entropy: padding, positions and precision."""

import pytest
import torch
from conftest import make_llama

from kne_easyedit.editing.losses import answer_loss
from kne_easyedit.facts.encoding import collate


def test_padding_side_makes_no_difference(family, facts):
    right = answer_loss(family.model, collate(facts, padding_side="right")).item()
    left = answer_loss(family.model, collate(facts, padding_side="left")).item()
    assert abs(left - right) < 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_token_makes_no_difference(family, facts, side):
    """Not even one that is the end token, or a token of the answers: the mask decides."""
    plain = answer_loss(family.model, collate(facts, padding_side=side)).item()
    for pad_id in (1, facts[0].answer[0]):
        assert abs(answer_loss(family.model, collate(facts, pad_id, side)).item() - plain) < 1e-12


def test_mean_over_the_answer_tokens_of_all_facts(family, facts):
    logs = []
    for fact in facts:
        logits = family.model(input_ids=torch.tensor([fact.ids])).logits[0].log_softmax(-1)
        logs += [logits[at, token].item() for at, token in zip(fact.positions, fact.answer, strict=True)]
    assert len(logs) == 1 + 3 + 4
    assert answer_loss(family.model, collate(facts)).item() == pytest.approx(-sum(logs) / len(logs), abs=1e-12)


def test_gradient_comes_from_the_predicting_positions_only(llama64, facts):
    """Prompt tokens, padding and the last answer token predict nothing that counts."""
    seen = []
    handle = llama64.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.retain_grad() or out))
    batch = collate(facts)
    answer_loss(llama64, batch).backward()
    handle.remove()
    predicting = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for i, fact in enumerate(facts):
        predicting[i, list(fact.positions)] = True
    assert torch.equal(seen[0].grad.abs().sum(-1) > 0, predicting)


def test_is_in_float32_at_least(facts):
    assert answer_loss(make_llama(torch.bfloat16), collate(facts)).dtype == torch.float32
    assert answer_loss(make_llama(torch.float64), collate(facts)).dtype == torch.float64
