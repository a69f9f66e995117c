"""A wrong template's hint goes by what a module does in its layer, and in which of a model's stacks of layers it is."""

import pytest
import torch
import transformers
from conftest import LLAMA_DOWN, ONE_TOKEN, make_gpt2, make_gptj, make_llama, sharpened, tiny_hparams, weights
from torch import nn

from kne_easyedit.doctor import modules as doctor_modules
from kne_easyedit.editing.edit import apply_kne_to_model
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.targets import check_template, nearest_templates, resolve_target

SMALL = dict(vocab_size=91, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)


def make_opt():
    config = transformers.OPTConfig(
        **SMALL, ffn_dim=40, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    return transformers.OPTForCausalLM(config)


def make_neox():
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, intermediate_size=40, pad_token_id=0))


def make_phi3():
    config = transformers.Phi3Config(
        **SMALL, intermediate_size=40, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    return transformers.Phi3ForCausalLM(config)


def make_vlm():
    """A model that sees: its vision tower has layers, too, and more of them."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=8,
    )
    text = transformers.LlamaConfig(**SMALL, intermediate_size=40, num_key_value_heads=1)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=90)
    return transformers.LlavaForConditionalGeneration(config)


MADE = {
    "opt": make_opt,
    "neox": make_neox,
    "phi3": make_phi3,
    "vlm": make_vlm,
    "llama": make_llama,
    "gpt2": make_gpt2,
    "gptj": make_gptj,
}


@pytest.mark.parametrize(
    ("kind", "template", "wanted"),
    [
        ("opt", "model.decoder.layers.{}.mlp.down_proj", "model.decoder.layers.{}.fc2"),
        ("opt", "model.layers.{}.mlp.down_proj", "model.decoder.layers.{}.fc2"),
        ("opt", "model.layers.{}.mlp.up_proj", "model.decoder.layers.{}.fc1"),
        ("opt", "transformer.h.{}.mlp.c_proj", "model.decoder.layers.{}.fc2"),
        ("opt", "transformer.h.{}.attn.c_proj", "model.decoder.layers.{}.self_attn.out_proj"),
        ("opt", "model.layers.{}.self_attn.o_proj", "model.decoder.layers.{}.self_attn.out_proj"),
        ("neox", "model.layers.{}.mlp.down_proj", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
        ("neox", "model.layers.{}.mlp.up_proj", "gpt_neox.layers.{}.mlp.dense_h_to_4h"),
        ("neox", "model.layers.{}.self_attn.o_proj", "gpt_neox.layers.{}.attention.dense"),
        ("neox", "model.layers.{}.self_attn.v_proj", "gpt_neox.layers.{}.attention.query_key_value"),
        ("phi3", "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.gate_up_proj"),
        ("llama", "model.layers.{}.fc2", "model.layers.{}.mlp.down_proj"),
        ("llama", "layers.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj"),
        ("llama", "layers.{}.attention.wo", "model.layers.{}.self_attn.o_proj"),
        ("gpt2", "model.layers.{}.mlp.down_proj", "transformer.h.{}.mlp.c_proj"),
        ("gpt2", "model.layers.{}.self_attn.q_proj", "transformer.h.{}.attn.c_attn"),
        ("gptj", "model.layers.{}.mlp.down_proj", "transformer.h.{}.mlp.fc_out"),
        ("vlm", "model.layers.{}.mlp.down_proj", "model.language_model.layers.{}.mlp.down_proj"),
        ("vlm", "language_model.model.layers.{}.mlp.down_proj", "model.language_model.layers.{}.mlp.down_proj"),
        ("vlm", "model.language_model.layers.{}.mlp.fc2", "model.language_model.layers.{}.mlp.down_proj"),
    ],
)
def test_hint(kind, template, wanted):
    model = MADE[kind]()
    with pytest.raises(ValueError, match="matches no module of") as caught:
        resolve_target(model, template)
    assert str(caught.value).endswith(f"; nearest: {wanted}")
    assert resolve_target(model, wanted).names


def test_a_vision_tower_is_meant_if_it_is_named():
    model = make_vlm()
    tower = next(name for name, m in model.named_modules() if "vision" in name and isinstance(m, nn.ModuleList))
    assert nearest_templates(model, f"{tower}.{{}}.mlp.down_proj") == [f"{tower}.{{}}.mlp.fc2"]


@pytest.mark.parametrize("template", ["model.layers.{}.mlp.down_proj.weight", "transformer.h.{}.mlp.c_proj"])
def test_the_doctor_hints_the_same_for_other_methods(template):
    modules = dict(make_opt().named_modules())
    assert doctor_modules._nearest(modules, template) == "; nearest: model.decoder.layers.{}.fc2"


def test_names_that_say_nothing_are_compared_as_before(llama):
    assert LLAMA_DOWN in nearest_templates(llama, "model.layers.{}.mlp.down_porj")
    assert nearest_templates(llama, "model.layers.{}.mlp.down_porj", alike=False) == []


def test_widths_tell_what_names_do_not(llama):
    for layer in llama.model.layers:
        layer.mlp.contract = layer.mlp.down_proj
        del layer.mlp.down_proj
    assert nearest_templates(llama, LLAMA_DOWN) == ["model.layers.{}.mlp.contract"]


ODD = [
    "{}.mlp",
    "{}",
    "model.layers.{}",
    "",
    "a.{}.b}",
    "a..{}.b",
    "a.{!r}.b",
    "x" * 10**6,
    "m.{}." + "x" * 10**6,
    10**5000,
    None,
    3.5,
]


@pytest.mark.parametrize("template", ODD, ids=map(str, range(len(ODD))))
def test_odd_templates_are_refused_briefly(template, llama):
    """The message can be read; none is a traceback of another kind."""
    with pytest.raises(ValueError, match="target_modules: ") as caught:
        check_template(template)
        resolve_target(llama, template)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("template", ["a.{}.b}", "{}.mlp", "m.{}." + "x" * 10**6], ids=["stray", "no parent", "giant"])
def test_they_are_refused_where_settings_are_made(template):
    with pytest.raises(ValueError, match="is not a template") as caught:
        KNEHyperParams(model_name="tiny", target_modules=[template])
    assert len(str(caught.value)) < 600


def test_a_packed_weight_does_not_change_the_width(llama):
    """Output units are counted by what the layer says of itself: 4-bit weights are stored in another shape."""
    module = llama.get_submodule(LLAMA_DOWN.format(1))
    module.weight = nn.Parameter(torch.zeros(480, 1))
    assert resolve_target(llama, LLAMA_DOWN).n_neurons == 24
    assert NeuronEnsemble({LLAMA_DOWN: {1: (0,)}}, {LLAMA_DOWN: 24}).targets(llama)


def test_a_model_that_sees_is_edited_in_its_language_model(tokenizer):
    model = sharpened(make_vlm(), torch.float32, 3)
    before = weights(model)
    request = {"prompt": ONE_TOKEN[0], "target_new": ONE_TOKEN[1]}
    apply_kne_to_model(model, tokenizer, [request], tiny_hparams("model.language_model.layers.{}.mlp.down_proj"))
    changed = {name for name, bits in weights(model).items() if bits != before[name]}
    assert changed and changed <= {f"model.language_model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
