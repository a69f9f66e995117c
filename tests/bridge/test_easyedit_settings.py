"""What EasyEdit's scripts set on a hyperparameter object, and what its loader reads of one, has its effect."""

from __future__ import annotations

import inspect
import json
from copy import deepcopy

import pytest
import torch
import yaml
from conftest import LLAMA_DOWN, fingerprint, make_llama, make_tokenizer, tiny_hparams
from methods import HPARAMS, records, settings, tokenizer_for
from transformers import LlamaForCausalLM

from kne_easyedit import KNEHyperParams, bridge
from kne_easyedit._util.settings import public_settings, replace_settings
from kne_easyedit.benchmark import Run, run
from kne_easyedit.bridge import MethodEditor, compare
from kne_easyedit.bridge.importing import module
from kne_easyedit.models.offload import is_offloaded

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # EasyEdit writes ./logs


@pytest.fixture
def short_texts(monkeypatch):
    """EasyEdit asks for 512 tokens, without a cache."""
    generate = LlamaForCausalLM.generate
    monkeypatch.setattr(
        LlamaForCausalLM, "generate", lambda self, **settings: generate(self, **{**settings, "max_new_tokens": 3})
    )


def chat_tokenizer():
    """EasyEdit generates its texts after the tokenizer's chat template."""
    tokenizer = tokenizer_for(settings("FT"))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def reads_evaluation_type() -> bool:
    bridge.register()
    return "evaluation_type" in inspect.getsource(module("evaluate.evaluate"))


# Attributes survive


@pytest.mark.parametrize("label", ["KNE", "FT"])
def test_a_changed_object_keeps_what_was_set_on_it(label):
    """``dataclasses.replace`` would drop both, without a word."""
    hparams = settings(label)
    hparams.evaluation_type, hparams.api_key = "generate-text", KEY
    new = replace_settings(hparams, model_name="another")
    assert (new.model_name, new.evaluation_type, new.api_key) == ("another", "generate-text", KEY)
    assert hparams.model_name != "another"
    without = replace_settings(new, evaluation_type=None, api_key=None)
    assert not hasattr(without, "evaluation_type") and not hasattr(
        without, "api_key"
    )  # EasyEdit of 2025 asks for no more
    with pytest.raises(ValueError, match="has no setting 'modl_name'"):
        replace_settings(hparams, modl_name="x")


def test_a_changed_object_of_kne_is_validated():
    with pytest.raises(ValueError, match="lr: -1"):
        replace_settings(tiny_hparams(), lr=-1)


def test_an_editor_has_what_was_set():
    if not reads_evaluation_type():
        pytest.skip("this EasyEdit refuses an evaluation_type, see below")
    hparams = tiny_hparams(use_chat_template=True)
    hparams.evaluation_type, hparams.api_key = "generate-text", KEY
    editor = MethodEditor(hparams, make_llama(), make_tokenizer())
    for found in (editor.editor.hparams, editor._evaluation_hparams()):
        assert (found.evaluation_type, found.api_key) == ("generate-text", KEY)


@pytest.mark.parametrize("label", ["KNE", "FT"])
def test_a_yaml_file_may_hold_them(label, tmp_path, caplog):
    config = yaml.safe_load((HPARAMS / label / "smollm2-135m.yaml").read_text())
    plain, given = tmp_path / "plain.yaml", tmp_path / "given.yaml"
    plain.write_text(yaml.safe_dump(config))
    given.write_text(yaml.safe_dump({**config, "evaluation_type": "generate-text", "api_key": KEY}))
    hparams = bridge.load_method(label, plain)
    assert not hasattr(hparams, "evaluation_type") and not hasattr(hparams, "api_key")
    hparams = bridge.load_method(label, given)
    assert (hparams.evaluation_type, hparams.api_key) == ("generate-text", KEY)
    given.write_text(yaml.safe_dump({**config, "evaluation_type": None, "api_key": None}))
    hparams = bridge.load_method(label, given)
    assert not hasattr(hparams, "evaluation_type") and not hasattr(hparams, "api_key")
    assert "evaluation_type" not in caplog.text


def test_settings_of_kne_come_back_from_a_mapping():
    config = {"model_name": "m", "target_modules": [LLAMA_DOWN], "evaluation_type": "LLM-judge", "api_key": KEY}
    hparams = KNEHyperParams.from_dict(config)
    again = KNEHyperParams.from_dict(hparams.to_dict())
    assert vars(again) == vars(hparams)
    assert again.api_key == KEY


def test_a_secret_is_never_shown():
    hparams = KNEHyperParams.from_dict({"model_name": "m", "target_modules": [LLAMA_DOWN], "api_key": KEY})
    assert KEY not in repr(hparams) + str(public_settings(hparams))
    assert public_settings(hparams)["api_key"] == "given"
    with pytest.raises(ValueError, match="api_key: a int is not a string") as error:
        KNEHyperParams.from_dict({"model_name": "m", "target_modules": [LLAMA_DOWN], "api_key": 20251125})
    assert "20251125" not in str(error.value)


# Figures


@pytest.mark.parametrize("label", ["KNE", "FT"])
def test_figures_are_those_that_were_asked_for(label, short_texts):
    """By EasyEdit's own edit, with the attribute set as its scripts do; a version that does not know it refuses."""
    hparams = settings(label)
    hparams.evaluation_type, hparams.api_key = "generate-text", None
    if not reads_evaluation_type():
        with pytest.raises(ValueError, match="evaluation_type: 'generate-text' is unknown to this EasyEdit"):
            bridge.editor_for(hparams, make_llama(), tokenizer_for(hparams))
        return
    editor = bridge.editor_for(hparams, make_llama(), chat_tokenizer())
    before = fingerprint(editor.model)
    (metrics,), _, _ = editor.edit_requests([deepcopy(records()[0])], verbose=False)
    for figures in (metrics["pre"], metrics["post"]):
        assert "rewrite_gen_content" in figures and "rewrite_acc" not in figures
    assert fingerprint(editor.model) == before


def test_a_run_evaluates_as_asked_and_shows_no_secret(tmp_path, short_texts):
    if not reads_evaluation_type():
        pytest.skip("this EasyEdit refuses an evaluation_type, see above")
    requests = [{**record, "index": i} for i, record in enumerate(records()[:1])]

    def lines(folder: str, **own) -> dict:
        hparams = replace_settings(tiny_hparams(), **own)
        run(
            Run(
                make_llama(),
                chat_tokenizer(),
                requests,
                {"KNE": hparams},
                "RECORDS",
                tmp_path / folder,
                before_folder=tmp_path / "before",
                fluency=False,
            )
        )
        return json.loads((tmp_path / folder / "results.jsonl").read_text())

    forced, texts = lines("forced"), lines("texts", evaluation_type="generate-text", api_key=KEY)
    assert "rewrite_acc" in forced["metrics"]["post"] and "rewrite_acc" in forced["metrics"]["pre"]
    for figures in (
        texts["metrics"]["pre"],
        texts["metrics"]["post"],
    ):  # not those that were kept for teacher-forced figures
        assert "rewrite_gen_content" in figures and "rewrite_acc" not in figures
    assert texts["metrics"]["post"]["locality"]["Relation_acc"] in ([0.0], [1.0])
    assert forced["fingerprint"] != texts["fingerprint"]
    everything = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert "generate-text" in everything
    assert KEY not in everything


def test_the_same_text_is_kept():
    pre, post = ({"locality": {"A_gen_content": texts}} for texts in (["x", "y"], ["x", "z"]))
    assert compare(pre, post)["locality"] == {"A_gen_content": ["x", "z"], "A_acc": [1.0, 0.0]}


# The type of the loaded model


@pytest.mark.parametrize("name", ["a-tiny-llama", "no-known-word"])
@pytest.mark.parametrize("label", ["KNE", "FT", "ROME"])
@pytest.mark.parametrize(
    ("wanted", "dtype"), [({}, torch.float32), ({"fp16": True}, torch.float16), ({"bf16": True}, torch.bfloat16)]
)
def test_easyedits_loader_loads_the_type_that_the_file_says(name, label, wanted, dtype, tmp_path):
    """Whatever type the model was saved in, and whether the method's class knows the setting or not."""
    saved = torch.float32 if wanted else torch.bfloat16
    make_llama(saved, num_hidden_layers=1).save_pretrained(name)
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<eos>"
    tokenizer.save_pretrained(name)
    config = yaml.safe_load((HPARAMS / label / "smollm2-135m.yaml").read_text())
    config = {
        **{k: v for k, v in config.items() if k not in ("fp16", "bf16")},
        "model_name": name,
        "device": "cpu",
        **wanted,
    }
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(config))
    editor = bridge.register().BaseEditor.from_hparams(bridge.load_method(label, tmp_path / "file.yaml"))
    assert {parameter.dtype for parameter in editor.model.parameters()} == {dtype}


# How KNE's model is loaded


@pytest.fixture(params=["a-tiny-llama", "no-known-word"])
def saved(request) -> str:
    """A model in a folder: EasyEdit's editor loads the one by a loader of its own, and would refuse the other."""
    make_llama(num_hidden_layers=1).save_pretrained(request.param)
    make_tokenizer().save_pretrained(request.param)
    return request.param


def loaded(name: str, **settings):
    """EasyEdit's editor of KNE, and its settings."""
    hparams = tiny_hparams(model_name=name, **settings)
    editor = bridge.register().BaseEditor.from_hparams(hparams)
    assert editor.hparams is hparams and type(hparams.model_name) is type(editor.model_name) is str
    return editor, hparams


def test_knes_model_is_loaded_quantised_whatever_its_name(saved):
    pytest.importorskip("bitsandbytes")
    editor, _ = loaded(saved, load_in="8bit")
    assert editor.model.get_submodule(LLAMA_DOWN.format(0)).weight.dtype == torch.int8
    editor, _ = loaded(saved)  # converse
    assert editor.model.get_submodule(LLAMA_DOWN.format(0)).weight.dtype == torch.float32


def test_knes_model_is_spread_as_its_settings_say_whatever_its_name(saved, tmp_path):
    if bridge.is_legacy():
        pytest.skip("the EasyEdit of 2023 spreads models over GPUs only")
    settings = {"max_memory": {"cpu": "20KiB"}, "offload_folder": str(tmp_path / "offloaded")}
    editor, hparams = loaded(saved, model_parallel=True, **settings)
    assert is_offloaded(editor.model)
    assert hparams.max_memory == {"cpu": "20KiB"}  # not what accelerate makes of it
    editor, _ = loaded(saved, model_parallel=True)  # converse
    assert not is_offloaded(editor.model)


def test_a_device_that_this_machine_lacks_is_refused_alike(saved):
    if torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(ValueError, match="device: 'mps' does not exist on this machine; set device: cpu"):
        loaded(saved, device="mps")


def test_two_types_at_once_are_refused():
    hparams = settings("FT")
    hparams.fp16, hparams.bf16 = True, True
    with pytest.raises(ValueError, match="fp16: True and bf16 exclude each other"):
        bridge.register().BaseEditor.from_hparams(hparams)
