"""Mixtures of experts: of them PEFT exchanges the names of modules, so that it must not see the model."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import SIZE, failing, fingerprint, make_tokenizer, sharpened, tiny_hparams
from edits import REQUEST
from peft import PeftModel

from kne_easyedit import apply_kne_to_model, compute_edit, restore
from kne_easyedit.editing import row_training
from kne_easyedit.editing.adapter import ADAPTER
from kne_easyedit.edits.adapters import FORMS, save_adapter
from kne_easyedit.facts.encoding import encode

EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
KINDS = {
    "mixtral": ("MixtralForCausalLM", dict(num_local_experts=4)),
    "qwen3-moe": ("Qwen3MoeForCausalLM", dict(num_experts=4, mlp_only_layers=[1], head_dim=6)),
    "olmoe": ("OlmoeForCausalLM", dict(num_experts=4)),
    "glm4-moe": (
        "Glm4MoeForCausalLM",
        dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=2, n_group=1, topk_group=1),
    ),
}
ATTENTION, MLP = "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"


def mixture(kind: str):
    name, settings = KINDS[kind]
    model = getattr(transformers, name)
    if model is None:
        pytest.skip(f"THIS VERSION OF TRANSFORMERS HAS NO {name}")
    config = model.config_class(
        vocab_size=len(make_tokenizer()),
        hidden_size=SIZE["hidden"],
        intermediate_size=SIZE["inner"],
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **{**EXPERTS, **settings},
    )
    return sharpened(model(config), torch.float32, 1)


@pytest.mark.parametrize(
    ("kind", "target"),
    [*((kind, ATTENTION) for kind in KINDS), ("qwen3-moe", MLP), ("glm4-moe", MLP)],
    ids=lambda value: value.split(".")[-1],
)
def test_an_edit_of_one_layer_touches_nothing_else(kind, target, tokenizer, monkeypatch):
    model = mixture(kind)
    before, hparams = fingerprint(model), tiny_hparams(target, layers=[1], ensemble="magnitude", num_steps=40)
    name, keys, found = target.format(1), model.state_dict().keys(), []

    def seen(*args, **kwargs):
        found.append([name for name, module in model.named_modules() if hasattr(module, "lora_A")])
        return original(*args, **kwargs)

    original = row_training.cross_entropy
    monkeypatch.setattr(row_training, "cross_entropy", seen)
    edit = compute_edit(model, tokenizer, [REQUEST], hparams)
    assert edit.losses[-1] < edit.losses[0] and found and all(names == [name] for names in found)
    assert fingerprint(model) == before
    edited, originals = apply_kne_to_model(model, tokenizer, [REQUEST], hparams, return_orig_weights=True)
    assert edited.state_dict().keys() == keys
    assert [n for n, own in fingerprint(edited)["weights"].items() if own != before["weights"][n]] == [f"{name}.weight"]
    restore(edited, originals)
    assert fingerprint(edited)["weights"] == before["weights"]


def test_after_an_error_it_is_what_it_was(tokenizer, monkeypatch):
    model = mixture("mixtral")
    before = fingerprint(model)
    monkeypatch.setattr(row_training, "cross_entropy", failing(row_training.cross_entropy, 2, MemoryError("full")))
    with pytest.raises(MemoryError):
        compute_edit(model, tokenizer, [REQUEST], tiny_hparams(ATTENTION, layers=[1], ensemble="magnitude"))
    assert fingerprint(model) == before and not any(ADAPTER in name for name in model.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_changes_the_model_as_the_edit_does_or_is_refused(form, tokenizer, tmp_path):
    """Of an MLP outside the experts PEFT would load nothing."""
    model = mixture("qwen3-moe")
    kept = {}
    for target in (ATTENTION, MLP):
        hparams = tiny_hparams(target, layers=[1], ensemble="magnitude", num_steps=40)
        kept[target] = compute_edit(model, tokenizer, [REQUEST], hparams)
    save_adapter(kept[ATTENTION], tmp_path / "attention", form=form)
    ids = torch.tensor([encode(tokenizer, REQUEST["prompt"], REQUEST["target_new"]).ids])
    with torch.no_grad():
        with kept[ATTENTION].applied(model):
            edited = model(ids).logits
        served = PeftModel.from_pretrained(mixture("qwen3-moe"), tmp_path / "attention")(ids).logits
        assert (edited - model(ids).logits).abs().max() > 0.1 > 1e-3 > (served - edited).abs().max()
    for given in ({}, {"model": model}):
        with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj cannot be served.*kne merge"):
            save_adapter(kept[MLP], tmp_path / "mlp", form=form, **given)
    assert not (tmp_path / "mlp").exists()
