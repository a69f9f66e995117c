"""Every linear layer of every family against the literal reference: replayed where that can be, slowly where not, or refused."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import FACTS, ONE_TOKEN, SIZE, THREE_TOKENS, NoDetours, fingerprint, make_llama, make_tokenizer, sharpened
from reference import literal_attribution
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from kne_easyedit.attribution import attribute, attribute_facts
from kne_easyedit.batching import encode
from kne_easyedit.layout import resolve_target
from kne_easyedit.quadrature import gauss_legendre
from kne_easyedit.replay import ReplayMismatch, UnsupportedModel

STEPS = 3
EXACT = 1e-9
ENGINES = ("auto", "sweep", "whole")

LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
FUSED = "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"
NEOX = "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"
BLOOM = "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"
GEMMA = dict(head_dim=6, query_pre_attn_scalar=6, sliding_window=4, tie_word_embeddings=True)
SOFTCAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=5.0)
LOCAL_GLOBAL = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])


class Kind(NamedTuple):
    """How to make a tiny model of a family, and all linear modules of its layers."""

    model: str
    path: str
    linear: str
    seed: int
    settings: dict
    refused: str | None = None
    """What the sweep says of it; None: it replays."""


FAMILIES = {
    "llama": Kind("LlamaForCausalLM", "model.layers", LLAMA, 1, dict(attn_implementation="sdpa", tie_word_embeddings=True)),
    "llama-eager": Kind("LlamaForCausalLM", "model.layers", LLAMA, 1, dict(attn_implementation="eager", attention_bias=True)),
    "mistral": Kind("MistralForCausalLM", "model.layers", LLAMA, 1, dict(attn_implementation="sdpa", sliding_window=None)),
    "mistral-window": Kind("MistralForCausalLM", "model.layers", LLAMA, 1, dict(attn_implementation="sdpa", sliding_window=4)),
    "qwen2": Kind("Qwen2ForCausalLM", "model.layers", LLAMA, 1, dict(attn_implementation="sdpa")),
    "qwen3": Kind("Qwen3ForCausalLM", "model.layers", LLAMA, 1, dict(attn_implementation="sdpa", head_dim=6)),
    "gemma": Kind("GemmaForCausalLM", "model.layers", LLAMA, 1, dict(attn_implementation="sdpa", head_dim=6, tie_word_embeddings=True)),
    "gemma2": Kind("Gemma2ForCausalLM", "model.layers", LLAMA, 1, dict(attn_implementation="eager", **GEMMA, **SOFTCAPS)),
    "gemma3": Kind("Gemma3ForCausalLM", "model.layers", LLAMA, 1, dict(attn_implementation="sdpa", **GEMMA, **LOCAL_GLOBAL)),
    "gemma3-eager": Kind("Gemma3ForCausalLM", "model.layers", LLAMA, 1, dict(attn_implementation="eager", **GEMMA, **LOCAL_GLOBAL)),
    "phi3": Kind("Phi3ForCausalLM", "model.layers", FUSED, 1, dict(attn_implementation="sdpa")),
    "gpt2": Kind("GPT2LMHeadModel", "transformer.h", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", 1, dict(attn_implementation="sdpa")),
    "gptj": Kind(
        "GPTJForCausalLM", "transformer.h", "attn.q_proj attn.k_proj attn.v_proj attn.out_proj mlp.fc_in mlp.fc_out", 1, dict(rotary_dim=4)
    ),
    "codegen": Kind("CodeGenForCausalLM", "transformer.h", "attn.qkv_proj attn.out_proj mlp.fc_in mlp.fc_out", 1, dict(rotary_dim=4)),
    "neox": Kind("GPTNeoXForCausalLM", "gpt_neox.layers", NEOX, 1, dict(attn_implementation="sdpa", use_parallel_residual=True)),
    "neox-serial": Kind("GPTNeoXForCausalLM", "gpt_neox.layers", NEOX, 1, dict(attn_implementation="sdpa", use_parallel_residual=False)),
    "opt": Kind(
        "OPTForCausalLM", "model.decoder.layers", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2", 1,
        dict(attn_implementation="sdpa", ffn_dim=SIZE["inner"], word_embed_proj_dim=SIZE["hidden"]),
    ),
    "mamba": Kind(
        "MambaForCausalLM", "backbone.layers", "mixer.in_proj mixer.x_proj mixer.dt_proj mixer.out_proj", 1, dict(state_size=4),
        "MambaForCausalLM keeps no keys and values of earlier positions",
    ),
    "bloom": Kind("BloomForCausalLM", "transformer.h", BLOOM, 1, {}, "BloomForCausalLM: unknown argument 'alibi'"),
    "falcon": Kind("FalconForCausalLM", "transformer.h", BLOOM, 1, dict(ffn_hidden_size=SIZE["inner"]), "FalconForCausalLM: "),
}  # fmt: skip
