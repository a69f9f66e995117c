"""Adapters are read as PEFT scales them, and what is damaged or foreign is refused with its reason."""

import errno
import json

import pytest
import torch
from conftest import make_llama
from edits import edit_of, thing_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from kne_easyedit._util import tensor_files
from kne_easyedit.edits import read_adapter, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    save_adapter(edit_of(make_llama()), tmp_path / "a", model=make_llama())
    return tmp_path / "a"


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("rslora", [False, True])
def test_reads_what_peft_saves(tmp_path, rslora):
    """Ranks and alphas by pattern, either scaling: the change of a weight is PEFT's own."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["down_proj", "q_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 3},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = get_peft_model(make_llama(), config)
    model.save_pretrained(tmp_path / "peft")
    _, modules = read_adapter(tmp_path / "peft")
    assert len(modules) == 8
    for name, module in modules.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(module.delta, layer.get_delta_weight("default"))


def test_refuses_damaged_files(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: truncated"):
        read_adapter(folder)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"missing; only safetensors are read here, no pickles"):
        read_adapter(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json: not read \(no JSON"):
        read_adapter(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"adapter_config.json: not read"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": 16}, r"A \(8, 40\) and B \(24, 8\), and adapter_config.json the rank 16"),
        ({"lora_alpha": "8"}, "lora_alpha must be a positive number, got '8'"),
        ({"rank_pattern": ["x"]}, "rank_pattern must be a mapping"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern: '\(' is no plain name"),
        ({"rank_pattern": {"(a|a)*b": 3}}, "is no plain name"),
        ({"rank_pattern": {r".*\.q": 3}}, "is no plain name"),
        ({"alpha_pattern": {"a{1,9}": 3}}, "is no plain name"),
        ({"alpha_pattern": {r"\1": 3}}, "is no plain name"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters must be None"),
        ({"layer_replication": [[0, 2]]}, "layer_replication must be None"),
        ({"trainable_token_indices": {"embed": [1]}}, "trainable_token_indices must be None"),
        ({"alpha_pattern": {"down_proj": None}}, "alpha_pattern: 'down_proj' must be a positive number, got None"),
        ({"use_dora": True}, "use_dora must be False"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save must be None"),
    ],
)
def test_refuses_a_foreign_configuration(folder, changes, match):
    read_adapter(folder)
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=match):
        read_adapter(folder)


def test_takes_plain_patterns(folder):
    """What is not more than ``A`` and ``B`` may be written out, and names may be escaped."""
    change_config(folder, target_parameters=[], layer_replication=None, rank_pattern={r"^model\.layers\.0.\w-x$": 3})
    read_adapter(folder)


def test_refuses_foreign_tensors(folder):
    tensors = load_file(folder / WEIGHTS)
    name = next(key for key in tensors if "lora_A" in key)

    def refused(match, changed):
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(ValueError, match=match):
            read_adapter(folder)

    refused("has lora_B only", {key: t for key, t in tensors.items() if key != name})
    refused("is no matrix of a LoRA layer", {**tensors, "lm_head.weight": torch.ones(2)})
    refused("not finite", {**tensors, name: tensors[name] * float("inf")})
    refused("the rank 8", {**tensors, name: tensors[name][:7].contiguous()})
    refused("no tensor", {})


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = make_llama()
    edit, thing = edit_of(model), thing_of(model)
    assert thing.digest  # kept, so that only writing meets the full disk
    monkeypatch.setattr(tensor_files, "bytes_of", full)
    for name, write in (
        ("adapter", lambda place: save_adapter(edit, place, model=model)),
        ("edit", thing.save),
    ):
        with pytest.raises(OSError, match=f"No space left on device.*{name}") as caught:
            write(tmp_path / name)
        assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
