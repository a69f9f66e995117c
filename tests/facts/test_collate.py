"""Padded batches of facts, and their labels."""

import pytest

from kne_easyedit.facts.encoding import IGNORE, collate


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_answers_where_they_stand(facts, side):
    batch = collate(facts, pad_id=7, padding_side=side)
    width = max(len(fact.ids) for fact in facts)
    for fact, ids, mask, labels in zip(facts, batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        pad = width - len(fact.ids)
        before, after = (pad, 0) if side == "left" else (0, pad)
        assert ids.tolist() == [7] * before + list(fact.ids) + [7] * after
        assert mask.tolist() == [0] * before + [1] * len(fact.ids) + [0] * after
        assert labels.tolist() == [IGNORE] * (before + fact.prompt_length) + list(fact.answer) + [IGNORE] * after
