"""``kne hparams``: a model without a shipped file takes one command."""

from __future__ import annotations

import dataclasses

import families
import pytest
import torch
import transformers
import yaml
from conftest import ONE_TOKEN, SIZE, make_gpt2, make_llama, make_tokenizer, sharpened
from torch import nn

from kne_easyedit import cli
from kne_easyedit._util.settings_text import commented, field_help, with_values
from kne_easyedit.editing.edit import apply_kne_to_model
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.models.loading import load_model
from kne_easyedit.models.targets import default_target, find_linear, is_linear

QUICK = dict(p=0.3, attribution_steps=4, lr=5e-2, stop_loss=0.1, localization_data=None)
"""Settings under which tiny models learn a fact at once."""


def make_vlm() -> nn.Module:
    """A model that sees; its vision tower has more layers than its decoder."""
    sizes = dict(hidden_size=SIZE["hidden"], intermediate_size=SIZE["inner"], num_attention_heads=2)
    vision = transformers.CLIPVisionConfig(**sizes, num_hidden_layers=5, image_size=8, patch_size=4, projection_dim=8)
    words = len(make_tokenizer())
    text = transformers.LlamaConfig(**sizes, vocab_size=words, num_hidden_layers=3, num_key_value_heads=1)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=words - 1)
    return sharpened(transformers.LlavaForConditionalGeneration(config), torch.float32, 3)


MADE = {
    "gpt2": (make_gpt2, "transformer.h.{}.mlp.c_proj"),
    "opt": (lambda: families.make("opt", torch.float32), "model.decoder.layers.{}.fc2"),
    "vlm": (make_vlm, "model.language_model.layers.{}.mlp.down_proj"),
}


@pytest.fixture(name="saved")
def saved_fixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def save(model: nn.Module, folder: str = "model") -> str:
        model.save_pretrained(tmp_path / folder)
        make_tokenizer().save_pretrained(tmp_path / folder)
        return folder

    return save


def kne(*arguments: str) -> int:
    return cli.main([*arguments])


@pytest.mark.parametrize("name", MADE)
def test_the_file_edits_the_model(saved, name, capsys):
    make, template = MADE[name]
    folder = saved(make())
    assert kne("hparams", folder, "--out", "own.yaml") == 0
    assert "own.yaml" in capsys.readouterr().out
    found = KNEHyperParams.from_hparams("own.yaml")
    assert found.target_modules == [template] and found.layers == [] and found.model_name == folder
    hparams = dataclasses.replace(found, device="cpu", **QUICK)
    model, tokenizer = load_model(hparams)
    request = {"prompt": ONE_TOKEN[0], "target_new": ONE_TOKEN[1]}
    edits = []
    apply_kne_to_model(model, tokenizer, [request], hparams, on_trained=edits.append)
    assert edits[0].answers[0].greedy
    assert edits[0].losses[0] > 1 > edits[0].losses[-1]


def test_every_setting_is_there_and_explained(saved, capsys):
    folder = saved(make_llama(dtype=torch.bfloat16))
    assert kne("hparams", folder) == 0
    text = capsys.readouterr().out
    helps = field_help(KNEHyperParams)
    assert set(yaml.safe_load(text)) == set(helps)
    assert commented(text, helps) == text
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert "LlamaForCausalLM: 4 layers" in head and "mlp.up_proj (40)" in head and "Mistral" not in text
    assert yaml.safe_load(text)["bf16"] is torch.cuda.is_available()


@pytest.mark.parametrize("name", ["a # b", "it's", 'say "so"', "null", "1e3", "{}", "東京", "a: b"])
def test_any_name_of_a_folder_stands_in_the_file(saved, name):
    folder = saved(make_llama(), name)
    assert kne("hparams", folder, "--out", "own.yaml") == 0
    assert KNEHyperParams.from_hparams("own.yaml").model_name == name


def test_a_module_that_some_layers_lack_names_the_layers(saved):
    """The first layers of a mixture are dense; experts are not called on every token."""
    model = families.make("deepseek3", torch.float32, first_k_dense_replace=2, n_routed_experts=4, n_group=2)
    assert kne("hparams", saved(model), "--out", "own.yaml") == 0
    found = KNEHyperParams.from_hparams("own.yaml")
    assert found.target_modules == ["model.layers.{}.mlp.down_proj"] and found.layers == [0, 1]


def test_where_all_experts_are_fused_it_is_the_attention(saved, capsys):
    assert kne("hparams", saved(families.make("gpt-oss", torch.float32))) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["target_modules"] == ["model.layers.{}.self_attn.o_proj"]
    assert "no MLP output that is called on every token" in text


@pytest.mark.parametrize("name", [*families.FAMILIES, *families.OTHERS])
def test_the_output_of_the_mlp_is_found_by_structure(name):
    kind = {**families.FAMILIES, **families.OTHERS}[name]
    model = families.made(name, torch.float32)
    found = find_linear(model)
    assert {each.template.removeprefix(f"{kind.path}.{{}}.") for each in found} >= set(kind.linear.split())
    chosen = default_target(found)
    module = model.get_submodule(chosen.template.format(0))
    assert is_linear(module) and chosen.outputs == SIZE["hidden"]
    assert chosen.role == ("attention output" if name in ("gpt-oss", "mamba") else "MLP output")


def test_single_experts_are_left_out():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"down_proj": nn.Linear(9, 4)}) for _ in range(2))
            self.mlp = nn.ModuleDict({"down_proj": nn.Linear(9, 4)})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.layers = nn.ModuleList([Layer(), Layer()])

        def get_input_embeddings(self):
            return self.embed

    assert [each.template for each in find_linear(Model())] == ["layers.{}.mlp.down_proj"]


def test_what_cannot_be_read_is_one_line_and_nothing_is_written(saved, tmp_path, capsys):
    folder = saved(make_llama())
    (tmp_path / "there.yaml").write_text("mine\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"model_type": "unheard-of"}')
    capsys.readouterr()
    for arguments, message in [
        ((folder, "--out", "there.yaml"), "there.yaml exists"),
        (("nowhere", "--out", "there.yaml/new.yaml"), "--out: there.yaml is a file, expected a folder"),
        (("nowhere", "--out", "new.yaml"), "'nowhere' is not on this machine"),
        (("broken", "--out", "new.yaml"), "'broken' cannot be read"),
    ]:
        assert kne("hparams", *arguments) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert (tmp_path / "there.yaml").read_text() == "mine\n" and not (tmp_path / "new.yaml").exists()


def test_a_folder_may_be_named_by_a_variable(saved, tmp_path, monkeypatch, capsys):
    saved(make_llama(), "home/model")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELS", str(tmp_path / "home"))
    for name in ("~/model", "$MODELS/model"):
        assert kne("hparams", name) == 0
        assert yaml.safe_load(capsys.readouterr().out)["model_name"] == name


def test_a_shipped_file_is_named(saved, capsys, monkeypatch):
    """Its settings were tried, those of the command were not."""
    folder = saved(make_llama())
    capsys.readouterr()
    assert kne("hparams", folder) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("kne_easyedit.cli.hparams.shipped_for", lambda model: f"{model}.yaml")
    assert kne("hparams", folder) == 0
    assert "is shipped for this model" in capsys.readouterr().err


def test_a_value_is_replaced_and_all_else_stays():
    text = '# a head\np: 0.2  # share\n\nlayers: []\nname: "x # y"  # z\n'
    new = with_values(text, {"p": 0.5, "layers": [1, 2]})
    assert new == '# a head\np: 0.5\n\nlayers: [1, 2]\nname: "x # y"  # z\n'
    with pytest.raises(ValueError):
        with_values(text, {"q": 1})
