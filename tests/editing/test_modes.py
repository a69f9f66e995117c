"""torch's modes around a call change neither scores nor edits. A model that cannot be trained is refused first."""

import contextlib

import pytest
import torch
from conftest import (
    LLAMA_DOWN,
    ONE_TOKEN,
    SPELLED,
    THREE_TOKENS,
    bits,
    fingerprint,
    make_gpt2,
    make_llama,
    tiny_hparams,
)
from edits import predicted, request

from kne_easyedit.attribution.engine import attribute
from kne_easyedit.editing.edit import apply_kne_to_model, compute_edit
from kne_easyedit.editing.row_edit import restore, write_rows
from kne_easyedit.localization import localizer as localization

REQUESTS = [request(ONE_TOKEN), request(SPELLED), request(THREE_TOKENS)]
AROUND = {
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast without a cache": lambda: torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
}
PENALTY = dict(kl_weight=0.5, kl_data="embedded", kl_size=2)


@pytest.fixture(params=AROUND.values(), ids=AROUND.keys())
def around(request):
    return request.param


def state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )


@pytest.mark.parametrize("engine", ["sweep", "whole"])
def test_scores_are_bit_equal(llama, tokenizer, around, engine):
    """Equal bits, not nearly: inside, the very same operations run in the same modes."""
    expected = attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, 3, engine=engine)
    with around():
        before = state()
        scores = attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, 3, engine=engine)
        assert state() == before
    assert bits(scores) == bits(expected) and not scores.is_inference()


@pytest.mark.parametrize("settings", [{}, PENALTY], ids=["plain", "penalty"])
def test_edits_are_bit_equal_with_a_cold_cache(tokenizer, around, settings, monkeypatch, tmp_path):
    hparams = tiny_hparams(num_steps=6, stop_loss=0, **settings)
    expected = compute_edit(make_llama(), tokenizer, REQUESTS[:1], hparams)
    assert expected.losses[-1] < expected.losses[0] - 0.1, "learnt too little to show a bug"
    monkeypatch.setenv("KNE_CACHE", str(tmp_path))
    model = make_llama()
    before = fingerprint(model)
    with around():
        modes = state()
        edit = compute_edit(model, tokenizer, REQUESTS[:1], hparams)
        assert state() == modes
    assert fingerprint(model) == before
    assert edit.losses == expected.losses
    assert {n: (r, bits(d)) for n, (r, d) in edit.deltas.items()} == {
        n: (r, bits(d)) for n, (r, d) in expected.deltas.items()
    }


def test_writing_and_restoring(tokenizer, around):
    """The edited model is the same, its originals are usable outside, and undoing is bit-exact, inside too."""
    plain, model = make_llama(), make_llama()
    before = fingerprint(model)
    apply_kne_to_model(plain, tokenizer, REQUESTS, tiny_hparams())
    with around():
        _, originals = apply_kne_to_model(model, tokenizer, REQUESTS, tiny_hparams(), return_orig_weights=True)
        assert not any(value.is_inference() for value in originals.values())
        assert fingerprint(model)["weights"] == fingerprint(plain)["weights"] != before["weights"]
        restore(model, originals)
    assert fingerprint(model) == before


def test_a_copy_made_inside_can_be_edited_again(llama, tokenizer, around):
    with around():
        copy, _ = apply_kne_to_model(llama, tokenizer, REQUESTS[:1], tiny_hparams(), copy=True)
    assert not any(parameter.is_inference() for parameter in copy.parameters())
    apply_kne_to_model(copy, tokenizer, REQUESTS[1:2], tiny_hparams())


def test_the_callers_autocast_sees_the_edit_and_its_undoing(llama, tokenizer):
    """autocast keeps copies of weights that need gradients: they would answer as before the edit."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids = torch.tensor([tokenizer(ONE_TOKEN[0])["input_ids"]])
        old = llama(input_ids=ids).logits
        _, originals = apply_kne_to_model(llama, tokenizer, REQUESTS[:1], tiny_hparams(), return_orig_weights=True)
        new = llama(input_ids=ids).logits
        assert new[0, -1].argmax() == tokenizer("Rome")["input_ids"][-1] != old[0, -1].argmax()
        restore(llama, originals)
        assert torch.equal(llama(input_ids=ids).logits, old)


class TestRefused:
    @pytest.fixture
    def refused(self, tokenizer, monkeypatch):
        def check(model, message, template=LLAMA_DOWN):
            monkeypatch.setattr(localization, "attribute_facts", lambda *a, **k: pytest.fail("localised first"))
            before = fingerprint(model)
            with pytest.raises(ValueError, match=message):
                apply_kne_to_model(model, tokenizer, REQUESTS[:1], tiny_hparams(template))
            assert fingerprint(model) == before

        return check

    @pytest.mark.parametrize("around", [contextlib.nullcontext, torch.inference_mode], ids=["outside", "inside"])
    def test_a_model_made_in_inference_mode(self, refused, around):
        with torch.inference_mode():
            model = make_llama()
        with around():
            refused(
                model,
                r"LlamaForCausalLM was loaded inside torch.inference_mode \(see model.embed_tokens.weight\).*load it",
            )

    def test_a_compiled_model(self, llama, refused):
        refused(torch.compile(llama), r"OptimizedModule is compiled by torch.compile; pass model._orig_mod")

    def test_its_original_is_taken(self, llama, tokenizer):
        """The way out that the message names; the compiled model has the edit, since it has the same weights."""
        compiled = torch.compile(llama, backend="eager")
        apply_kne_to_model(compiled._orig_mod, tokenizer, REQUESTS[:1], tiny_hparams())
        got, wanted = predicted(compiled, tokenizer, REQUESTS[0])
        assert got == wanted

    def test_a_compiled_layer(self, llama, refused):
        llama.model.layers[1] = torch.compile(llama.model.layers[1])
        refused(
            llama, r"model.layers.1 \(OptimizedModule\) is compiled by torch.compile; put its _orig_mod in its place"
        )

    def test_compiled_in_place(self, llama, refused):
        llama.model.layers[2].compile()
        refused(
            llama,
            r"model.layers.2 \(LlamaDecoderLayer\) was compiled by its compile\(\); set its _compiled_call_impl to",
        )

    def test_a_compiled_forward(self, llama, refused):
        llama.forward = torch.compile(llama.forward)
        refused(llama, r"model: LlamaForCausalLM has a compiled forward; delete it")

    def test_writing_an_edit_is_refused_too(self, llama, tokenizer):
        edit = compute_edit(llama, tokenizer, REQUESTS[:1], tiny_hparams(num_steps=1))
        with torch.inference_mode():
            other = make_llama()
        before = fingerprint(other)
        with pytest.raises(ValueError, match="inference_mode"):
            write_rows(other, edit)
        assert fingerprint(other) == before


def test_transposed_weights_too(tokenizer):
    from conftest import GPT2_DOWN

    one, other = make_gpt2(), make_gpt2()
    apply_kne_to_model(one, tokenizer, REQUESTS[:1], tiny_hparams(GPT2_DOWN))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        apply_kne_to_model(other, tokenizer, REQUESTS[:1], tiny_hparams(GPT2_DOWN))
    assert fingerprint(one)["weights"] == fingerprint(other)["weights"]
