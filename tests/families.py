"""One tiny model of every family of decoders, with all linear modules of its layers."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import transformers
from conftest import SIZE, make_tokenizer, sharpened
from torch import nn

LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
FUSED = "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"
NEOX = "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"
BLOOM = "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"
GEMMA = dict(head_dim=6, query_pre_attn_scalar=6, sliding_window=4, tie_word_embeddings=True)
SOFTCAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=5.0)
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
LOCAL_GLOBAL = dict(layer_types=LAYERS)


class Kind(NamedTuple):
    """How to make a tiny model of a family, and all linear modules of its layers."""

    model: str
    path: str
    linear: str
    seed: int
    settings: dict
    refused: str | None = None
    """What the sweep says of it; None: it replays."""
    weight_only: str = ""
    """Linear modules that some version of the library never calls: it takes their weight."""


FAMILIES = {
    "llama": Kind(
        "LlamaForCausalLM", "model.layers", LLAMA, 7, dict(attn_implementation="sdpa", tie_word_embeddings=True)
    ),
    "llama-eager": Kind(
        "LlamaForCausalLM", "model.layers", LLAMA, 17, dict(attn_implementation="eager", attention_bias=True)
    ),
    # Clamps projections in place: the neurons are what they were before that.
    "olmo-clip": Kind("OlmoForCausalLM", "model.layers", LLAMA, 2, dict(attn_implementation="sdpa", clip_qkv=3.0)),
    "mistral": Kind(
        "MistralForCausalLM", "model.layers", LLAMA, 3, dict(attn_implementation="sdpa", sliding_window=None)
    ),
    "mistral-window": Kind(
        "MistralForCausalLM", "model.layers", LLAMA, 14, dict(attn_implementation="sdpa", sliding_window=4)
    ),
    "qwen2": Kind("Qwen2ForCausalLM", "model.layers", LLAMA, 3, dict(attn_implementation="sdpa")),
    "qwen3": Kind("Qwen3ForCausalLM", "model.layers", LLAMA, 1, dict(attn_implementation="sdpa", head_dim=6)),
    "gemma": Kind(
        "GemmaForCausalLM",
        "model.layers",
        LLAMA,
        7,
        dict(attn_implementation="sdpa", head_dim=6, tie_word_embeddings=True),
    ),
    "gemma2": Kind(
        "Gemma2ForCausalLM", "model.layers", LLAMA, 37, dict(attn_implementation="eager", **GEMMA, **SOFTCAPS)
    ),
    "gemma3": Kind(
        "Gemma3ForCausalLM", "model.layers", LLAMA, 7, dict(attn_implementation="sdpa", **GEMMA, **LOCAL_GLOBAL)
    ),
    "gemma3-eager": Kind(
        "Gemma3ForCausalLM", "model.layers", LLAMA, 7, dict(attn_implementation="eager", **GEMMA, **LOCAL_GLOBAL)
    ),
    "phi3": Kind("Phi3ForCausalLM", "model.layers", FUSED, 2, dict(attn_implementation="sdpa")),
    "gpt2": Kind(
        "GPT2LMHeadModel",
        "transformer.h",
        "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
        1,
        dict(attn_implementation="sdpa"),
    ),
    "gptj": Kind(
        "GPTJForCausalLM",
        "transformer.h",
        "attn.q_proj attn.k_proj attn.v_proj attn.out_proj mlp.fc_in mlp.fc_out",
        16,
        dict(rotary_dim=4),
    ),
    "codegen": Kind(
        "CodeGenForCausalLM", "transformer.h", "attn.qkv_proj attn.out_proj mlp.fc_in mlp.fc_out", 2, dict(rotary_dim=4)
    ),
    "neox": Kind(
        "GPTNeoXForCausalLM", "gpt_neox.layers", NEOX, 6, dict(attn_implementation="sdpa", use_parallel_residual=True)
    ),
    "neox-serial": Kind(
        "GPTNeoXForCausalLM", "gpt_neox.layers", NEOX, 2, dict(attn_implementation="sdpa", use_parallel_residual=False)
    ),
    "gpt-oss": Kind(
        "GptOssForCausalLM",
        "model.layers",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
        37,
        dict(
            attn_implementation="eager",
            head_dim=6,
            sliding_window=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=LAYERS,
            experts_implementation="eager",
        ),
    ),
    "opt": Kind(
        "OPTForCausalLM",
        "model.decoder.layers",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
        31,
        dict(attn_implementation="sdpa", ffn_dim=SIZE["inner"], word_embed_proj_dim=SIZE["hidden"]),
    ),
    "mamba": Kind(
        "MambaForCausalLM",
        "backbone.layers",
        "mixer.in_proj mixer.x_proj mixer.out_proj",
        10,
        dict(state_size=4),
        "MambaForCausalLM keeps no keys and values of earlier positions",
        "mixer.dt_proj",
    ),
    "bloom": Kind("BloomForCausalLM", "transformer.h", BLOOM, 4, {}, "BloomForCausalLM: unknown argument 'alibi'"),
    "falcon": Kind(
        "FalconForCausalLM", "transformer.h", BLOOM, 2, dict(ffn_hidden_size=SIZE["inner"]), "FalconForCausalLM: "
    ),
}
OTHERS = {
    "deepseek3": Kind(
        "DeepseekV3ForCausalLM",
        "model.layers",
        "self_attn.kv_b_proj self_attn.o_proj mlp.down_proj",
        8,
        dict(
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=6,
            num_key_value_heads=4,
            first_k_dense_replace=3,
        ),
    ),
    "lfm2": Kind(
        "Lfm2ForCausalLM",
        "model.layers",
        "feed_forward.w1 feed_forward.w2",
        3,
        dict(layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
    ),
}
"""Whether the sweep can replay these is left open: values narrower than keys, convolutions between the attentions."""
REPLAYED = [name for name, kind in FAMILIES.items() if not kind.refused]
REFUSED = [name for name, kind in FAMILIES.items() if kind.refused]


def make(name: str, dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    kind = {**FAMILIES, **OTHERS}[name]
    settings = dict(
        vocab_size=len(make_tokenizer()),
        hidden_size=SIZE["hidden"],
        intermediate_size=SIZE["inner"],
        n_inner=SIZE["inner"],
        num_hidden_layers=3,
        num_attention_heads=SIZE["heads"],
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = getattr(transformers, kind.model)
    with torch._C.DisableTorchFunction():  # the same buffers inside `NoDetours` and outside
        return sharpened(model(model.config_class(**{**settings, **kind.settings, **changes})), dtype, kind.seed)


made = lru_cache(make)
"""Models are shared by the tests: that they stay as they are is tested, too."""


def templates(name: str) -> list[str]:
    return [f"{FAMILIES[name].path}.{{}}.{module}" for module in FAMILIES[name].linear.split()]


def two_kinds(name: str) -> list[str]:
    """A module of the attention (or mixer) and one of the MLP (or its end)."""
    return [templates(name)[0], templates(name)[-1]]
