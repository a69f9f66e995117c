"""Published architectures with random weights: for time and memory, where the weights themselves cannot be had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from kne_easyedit import KNEHyperParams
from kne_easyedit._util.machine import settle_blocks
from kne_easyedit._util.settings import replace_settings
from kne_easyedit.cli.common import shipped
from kne_easyedit.facts.encoding import Tokenizer

_LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096}


@dataclass(frozen=True)
class Architecture:
    """A model's shape."""

    kind: str
    """transformers' ``model_type``."""
    module: str
    """The template of the modules that KNE edits by default."""
    settings: str
    """The file of ``hparams/KNE`` that is shipped for it, or for one like it."""
    shape: Mapping[str, Any]
    """Settings of its configuration class."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama2-7b": Architecture(
        "llama",
        "model.layers.{}.mlp.down_proj",
        "llama2-7b-chat",
        _LLAMA2 | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "llama2-13b": Architecture(
        "llama",
        "model.layers.{}.mlp.down_proj",
        "llama2-7b-chat",
        _LLAMA2 | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    ),
    "gpt-j-6b": Architecture(
        "gptj",
        "transformer.h.{}.mlp.fc_out",
        "gpt-j-6B",
        {"vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "n_positions": 2048},
    ),
    "smollm2-135m": Architecture(
        "llama",
        "model.layers.{}.mlp.down_proj",
        "smollm2-135m",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": Architecture(
        "llama",
        "model.layers.{}.mlp.down_proj",
        "smollm2-135m",
        {
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
    ),
}


def configuration(name: str) -> Any:
    """Transformers' configuration of an architecture."""
    from transformers import AutoConfig

    return AutoConfig.for_model(ARCHITECTURES[name].kind, **ARCHITECTURES[name].shape)


def random_model(name: str, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> nn.Module:
    """A model with the weights that transformers initialises it with, made on ``device`` in ``dtype``."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration(name), dtype=dtype)
    settle_blocks(model)  # as `load_model` does
    return cast(nn.Module, model.eval().requires_grad_(False))


def settings_of(name: str, model: Any, **changes: Any) -> KNEHyperParams:
    """The shipped settings of an architecture, for a model with random weights that is loaded.

    Args:
        name: One of `ARCHITECTURES`.
        model: What `random_model` gave.
        changes: Settings that differ.
    """
    dtype = next(model.parameters()).dtype
    file = shipped() / "KNE" / f"{ARCHITECTURES[name].settings}.yaml"
    return replace_settings(
        KNEHyperParams.from_hparams(file),
        **{
            "model_name": name,
            "device": str(model.device),
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            "target_modules": [ARCHITECTURES[name].module],
            "localization_data": None,
            "neighbour_data": "embedded",
            "on_failure": "warn",
            **changes,
        },
    )


def fitting_tokenizer(requests: Iterable[Mapping[str, Any]], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer whose ids are below ``vocabulary``, trained on some facts: their words are one token.

    Random weights know no words: the number of tokens is all that counts.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    texts = [f"{request['prompt']} {request['target_new']}" for request in requests]
    found = ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    found.train_from_iterator(3 * texts, vocab_size=vocabulary, show_progress=False, special_tokens=[end])
    return cast(Tokenizer, PreTrainedTokenizerFast(tokenizer_object=found._tokenizer, eos_token=end, pad_token=end))
