"""The input-side projection: neighbours keep their logits, the fact is reached, and the literal reference agrees."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import GPT2_DOWN, LLAMA_DOWN, fingerprint, make_gpt2, make_llama, sharpened, tiny_hparams
from edits import MANY, REQUEST, ensemble_of, full_deltas, masks_of
from families import made
from pytest import approx
from reference import literal_continuation, literal_projector, literal_row_training
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from kne_easyedit import compute_edit, restore, write_rows
from kne_easyedit.editing import projection as projection_module
from kne_easyedit.editing.divergence import continuations
from kne_easyedit.editing.projection import InputProjection, input_projections, projections_for, within
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.edits import save_adapter
from kne_easyedit.facts.encoding import encode
from kne_easyedit.models.state import preserve_state

PROMPTS = ["The capital of Spain is", "The capital of Peru", "France and"]
"""They have 8 different beginnings: less than half of the tiny models' 40 inputs of down_proj."""


def encoded(tokenizer, prompts=PROMPTS):
    return [tokenizer(prompt)["input_ids"] for prompt in prompts]


def projections(model, tokenizer, names, ridge=1e-5, tokens=1):
    with preserve_state(model):
        return input_projections(model, tokenizer, PROMPTS, names, ridge, tokens)


def downs(template=LLAMA_DOWN):
    return [template.format(layer) for layer in range(4)]


class TestOneModule:
    def test_what_inputs_have_is_removed_and_the_rest_stays(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        x[0] *= 1e3  # the first token's massive activations
        project = InputProjection(x, 1e-14)
        g = torch.randn(3, 12, generator=generator, dtype=torch.float64)
        orthogonal = torch.linalg.qr(x.T, mode="complete")[0][:, 5:].T
        assert (project(g) @ x.T).abs().max() < 1e-9 < (g @ x.T).abs().max()
        assert torch.allclose(project(orthogonal), orthogonal, atol=1e-12)
        assert torch.allclose(project(project(g)), project(g), atol=1e-12)
        assert project.basis.shape == (5, 12)

    def test_float32_suffices_to_apply_it(self):
        """Under a large range of norms, where a factor in float32 would fail."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(200, 500, generator=generator)
        x[0] *= 1e3
        g = torch.randn(7, 500, generator=generator)
        exact, ours = InputProjection(x.double(), 1e-5)(g.double()), InputProjection(x, 1e-5)(g)
        assert ours.dtype == torch.float32 and (ours - exact).abs().max() < 1e-5
        assert (ours @ x.T).norm(dim=0).div(x.norm(dim=1)).max() < 1e-3

    def test_inputs_of_half_precision(self):
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert InputProjection(x, 1e-5).basis.dtype == torch.float32

    def test_the_ridge_is_in_units_of_the_median(self):
        """One massive input does not move it; scaling all inputs changes nothing."""
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        g = torch.eye(12, dtype=torch.float64)
        plain = InputProjection(x, 0.1)(g)
        assert torch.allclose(InputProjection(7 * x, 0.1)(g), plain, atol=1e-12)
        median = x.square().sum(1).median()
        literal = g - x.T @ torch.linalg.inv(x @ x.T + 0.1 * median * torch.eye(5)) @ x
        assert torch.allclose(plain, literal, atol=1e-12)

    @pytest.mark.parametrize("zeros", [1, 3, 4])
    def test_inputs_of_zero_close_nothing(self, zeros):
        """And do not count for the median, however many they are."""
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x[4 - zeros :] = 0
        g = torch.eye(12, dtype=torch.float64)
        there = InputProjection(x[: 4 - zeros], 0.1)(g) if zeros < 4 else g
        assert torch.allclose(InputProjection(x, 0.1)(g), there, atol=1e-12)

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_inputs_that_are_not_finite_are_not_blamed_on_the_ridge(self, value):
        x = torch.ones(3, 4)
        x[1, 2] = value
        with pytest.raises(ValueError, match=r"input_projection: .*not finite; load the model in float32 or bfloat16"):
            InputProjection(x, 1e-5)

    def test_a_ridge_that_is_too_small_is_named(self):
        with pytest.raises(
            ValueError, match="projection_ridge: 1e-30 is too small for the inputs of 3 tokens; raise it"
        ):
            InputProjection(torch.ones(3, 4), 1e-30)


def logits_of(model, texts):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in texts])


@pytest.mark.parametrize("optimizer", ["adamw", "polyak"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_neighbours_keep_their_logits_and_the_fact_is_reached(llama64, tokenizer, facts, optimizer, tokens):
    """All of them, at every token of prompt and continuation, by induction over the layers. Without it they change."""
    ensemble = ensemble_of(LLAMA_DOWN, rows=MANY)
    texts = [[*ids, *literal_continuation(llama64, ids, tokens, 1)[:-1]] for ids in encoded(tokenizer)]
    before = logits_of(llama64, texts)
    hparams = tiny_hparams(optimizer=optimizer, num_steps=200)
    for found in (projections(llama64, tokenizer, downs(), 1e-13, tokens), None):
        edit = train_rows(llama64, facts[:1], ensemble, hparams, projections=found)
        assert edit.losses[-1] < 0.05 and edit.answers[0].greedy
        originals = write_rows(llama64, edit)
        change = (logits_of(llama64, texts) - before).abs().max()
        restore(llama64, originals)
        assert change < 1e-6 if found else change > 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "polyak"])
def test_training_is_the_literal_one(family, tokenizer, facts, optimizer):
    """For two module types, with a ridge that shows, against explicit projectors on full weights."""
    names = [*downs(family.down), *downs(family.query)]
    ensemble = ensemble_of(family.down, family.query)
    hparams = tiny_hparams(
        target_modules=[family.down, family.query], stop_loss=0, num_steps=4, optimizer=optimizer, alpha=2.0
    )
    texts = encoded(tokenizer)
    chosen = [f"{name}.weight" for name in names]
    projectors = {name: literal_projector(family.model, name.removesuffix(".weight"), texts, 0.01) for name in chosen}
    found = projections(family.model, tokenizer, names, 0.01)
    masks = masks_of(family.model, ensemble)
    edit = train_rows(family.model, facts[:2], ensemble, hparams, projections=found)
    examples = [(fact.ids, fact.prompt_length) for fact in facts[:2]]
    fraction = 0.3 if optimizer == "polyak" else None
    expected, losses = literal_row_training(
        family.model, examples, masks, hparams.lr, 4, alpha=2.0, fraction=fraction, projectors=projectors
    )
    ours = full_deltas(family.model, edit)
    assert edit.losses == approx(losses, abs=1e-8)
    assert max((ours[name] - expected[name]).abs().max().item() for name in ours) < 1e-8
    free = full_deltas(family.model, train_rows(family.model, facts[:2], ensemble, hparams))
    assert max((ours[name] - free[name]).abs().max().item() for name in ours) > 1e-2


class TestCollecting:
    @pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2", "bloom", "opt"])
    def test_every_token_counts_once(self, name, tokenizer, double_precision, monkeypatch):
        """In batches of two, with continuations, for families of several forms of input."""
        model = made(name)
        module = {"gpt2": "transformer.h.1.mlp.c_proj", "bloom": "transformer.h.1.mlp.dense_4h_to_h"}.get(
            name, "model.decoder.layers.1.fc2" if name == "opt" else "model.layers.1.mlp.down_proj"
        )
        monkeypatch.setattr(projection_module, "AT_ONCE", 2)
        for tokens in (1, 3):
            found = projections(model, tokenizer, [module], 0.01, tokens)[module]
            texts = [[*ids, *literal_continuation(model, ids, tokens, 1)[:-1]] for ids in encoded(tokenizer)]
            literal = literal_projector(model, module, texts, 0.01)
            assert (found(torch.eye(len(literal), dtype=literal.dtype)) - literal).abs().max() < 1e-8
            assert len(found.basis) == len({tuple(text[: i + 1]) for text in texts for i in range(len(text))})

    def test_leaves_the_model_as_it_was(self, llama, tokenizer):
        before = fingerprint(llama)
        projections(llama, tokenizer, downs())
        with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
            patch.setattr(llama.model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("injected")))
            projections(llama, tokenizer, downs())
        llama.model.__dict__.pop("forward", None)
        assert fingerprint(llama) == before

    def test_no_more_than_half_of_the_inputs_are_closed(self, llama, tokenizer):
        texts = [[1, 2, 3], [1, 2, 4], [5], [6, 7]]
        assert within(texts, 5, 1) == texts[:3] and within(texts, 4, 1) == texts[:2] and within(texts, 99, 1) == texts
        assert within(texts, 8, 2) == texts[:3] and within(texts, 2, 1) == []
        prompts = ["The capital of Spain is", *(f"{word} spoken in Peru and Italy" for word in ("Ada", "Lima", "Rome"))]
        with preserve_state(llama):
            (found,) = input_projections(llama, tokenizer, prompts, [LLAMA_DOWN.format(1)], 1e-5).values()
        assert 5 < len(found.basis) <= 20

    def test_a_module_that_does_not_read_every_token_is_refused(self, llama, tokenizer):
        llama.model.layers[1].mlp.forward = lambda x: x
        with pytest.raises(ValueError, match=r"input_projection: .*layers.1.mlp.down_proj does not read every token"):
            projections(llama, tokenizer, downs())


def test_by_the_settings_alone(tokenizer, tmp_path):
    """An edit of a transposed model too; it is the same for few texts at once, and off it changes nothing."""
    path = tmp_path / "facts.json"
    subjects = ["Peru", "Italy", "Oslo", "Spain"]
    facts = [{"prompt": f"The capital of {s} is", "target_new": "Latin", "subject": s} for s in subjects]
    path.write_text(json.dumps(facts))
    settings = dict(neighbour_data=str(path), neighbour_relation_size=2, neighbour_subject_size=0, neighbour_tokens=1)
    for model, template in ((make_llama(), LLAMA_DOWN), (make_gpt2(), GPT2_DOWN)):
        ensemble = ensemble_of(template, rows=MANY)
        before, texts = fingerprint(model), encoded(tokenizer, ["The capital of Italy is", "The capital of Peru is"])
        logits, changes = logits_of(model, texts), {}
        for on in (True, False):
            hparams = tiny_hparams(template, input_projection=on, optimizer="polyak", **settings)
            edit = compute_edit(model, tokenizer, REQUEST, hparams, ensemble)
            assert fingerprint(model) == before and edit.losses[-1] < 0.05
            originals = write_rows(model, edit)
            changes[on] = (logits_of(model, texts) - logits).abs().max().item()
            restore(model, originals)
        assert changes[True] < 0.1 * changes[False]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (1000, r"neighbour_tokens: 1000 .*64 tokens .*\(max_position_embeddings\); lower neighbour_tokens"),
        (30, "neighbour_tokens: 30 .*more than 20 tokens, half of the 40 inputs of a module; lower neighbour_tokens"),
        (2, None),
    ],
)
def test_an_edit_that_spares_no_neighbour_says_so(llama, tokenizer, caplog, tokens, said):
    hparams = tiny_hparams(input_projection=True, neighbour_data="embedded", neighbour_tokens=tokens, num_steps=1)
    projections_for(llama, tokenizer, [REQUEST], hparams, downs())
    if said:
        assert re.search(said, caplog.text)
    else:
        assert "spared" not in caplog.text


def learned_positions(tokenizer):
    config = OpenAIGPTConfig(vocab_size=len(tokenizer), n_positions=64, n_embd=24, n_layer=2, n_head=4)
    return sharpened(OpenAIGPTLMHeadModel(config), torch.float64, 1)


@pytest.mark.parametrize("name", ["mamba", "learned positions"])
def test_continuations_of_a_model_that_keeps_nothing_of_earlier_tokens(name, tokenizer):
    """All is read again at each step, with prompts of several lengths in one batch."""
    model = made(name) if name == "mamba" else learned_positions(tokenizer)
    prompts = encoded(tokenizer)
    with preserve_state(model), torch.no_grad():
        said, before = continuations(model, prompts, 4, None)
        for prompt, answer, found in zip(prompts, said, before):
            for at, token in enumerate(answer):
                logits = model(input_ids=torch.tensor([[*prompt, *answer[:at]]])).logits[0, -1]
                assert token == logits.argmax() and torch.allclose(logits.log_softmax(-1), found[at], atol=1e-9)


def test_its_edit_spares_them(tokenizer, tmp_path):
    """PEFT would refuse out_proj of a Mamba that it saw as a whole, for kernels of training that are not used here."""
    model = made("mamba")
    template = "backbone.layers.{}.mixer.out_proj"
    names = [template.format(layer) for layer in (0, 1)]
    with preserve_state(model), torch.no_grad():
        found = input_projections(model, tokenizer, PROMPTS[:2], names, 1e-13, 3)
        _, before = continuations(model, encoded(tokenizer, PROMPTS[:2]), 3, tokenizer.eos_token_id)
    ensemble = ensemble_of(template, rows={0: (1, 3, 5, 9), 1: (0, 2, 7)})
    facts = [encode(tokenizer, REQUEST["prompt"], REQUEST["target_new"])]
    hparams = tiny_hparams(optimizer="polyak", num_steps=10, stop_loss=0, input_projection=True)
    edit = train_rows(model, facts, ensemble, hparams, projections=found)
    assert edit.losses[-1] < edit.losses[0] - 0.05
    with pytest.raises(ValueError, match=r"mixer.out_proj cannot be served as an adapter.*kne merge"):
        save_adapter(edit, tmp_path / "adapter", model=model)
    originals = write_rows(model, edit)
    with preserve_state(model), torch.no_grad():
        _, now = continuations(model, encoded(tokenizer, PROMPTS[:2]), 3, tokenizer.eos_token_id)
    restore(model, originals)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, now))
