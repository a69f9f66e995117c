"""Editors of a model that is loaded already: what one does depends on no other, and its requests may lack the same."""

from __future__ import annotations

import pytest
from conftest import make_llama, weights
from methods import edit_inputs, in_tmp, records, settings, tokenizer_for  # noqa: F401  (in_tmp is a fixture)

from kne_easyedit import bridge
from kne_easyedit.bridge import MethodEditor
from kne_easyedit.bridge.importing import module

# One tokenizer for all


@pytest.mark.parametrize("make", [MethodEditor, bridge.editor_for])
def test_each_editor_pads_as_its_method_does(make):
    """MEMIT pads on the right, FT on the left: the last editor of a tokenizer decided for all."""
    model, tokenizer = make_llama(), tokenizer_for(settings("FT"))
    editors = [make(settings(label), model, tokenizer) for label in ("FT", "MEMIT", "FT")]
    tokenizers = [getattr(editor, "editor", editor).tok for editor in editors]
    assert [its.padding_side for its in tokenizers] == ["left", "right", "left"]
    assert tokenizer.padding_side == "left" and tokenizer not in tokenizers


def test_an_edit_does_not_depend_on_other_editors():
    def edited(beside: str | None = None, side: str | None = None) -> dict:
        hparams = settings("ROME")
        model, tokenizer = make_llama(), tokenizer_for(hparams)
        editor = MethodEditor(hparams, model, tokenizer)
        if beside:
            MethodEditor(settings(beside), model, tokenizer)
        editor.tokenizer.padding_side = side or editor.tokenizer.padding_side
        editor.apply(records()[:1])
        return weights(editor.model)

    alone = edited()
    assert edited(beside="KNE") == alone != edited(side="left")


# What a request lacks


def test_wise_gets_an_unrelated_text_from_either_editor(monkeypatch):
    """Where a request has none; one of its own stays."""
    if bridge.is_legacy():
        pytest.skip("the EasyEdit of 2023 has no WISE")
    hparams, tokenizer, trained = settings("WISE", n_iter=1), tokenizer_for(settings("WISE")), []
    main = module("models.wise.wise_main")
    tokenize = main.tokenize
    monkeypatch.setattr(main, "tokenize", lambda batch, **own: trained.extend(batch) or tokenize(batch, **own))
    theirs = bridge.editor_for(hparams, make_llama(), tokenizer)
    theirs.edit(**edit_inputs(records()[:1]))
    theirs.edit(**edit_inputs(records()[:1]), loc_prompts=["The river"])
    MethodEditor(hparams, make_llama(), tokenizer).apply(records()[:1])
    texts = [request["loc_prompt"] for request in trained]
    assert texts[0] == texts[2] != texts[1] == "The river"
    assert "France" not in texts[0]
