"""EasyEdit's methods and records for the tiny models: the shipped settings, with fitting layers, steps and rates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from conftest import make_tokenizer, tiny_hparams

from kne_easyedit import bridge
from kne_easyedit.bridge import TextSource, patches, use_text_source
from kne_easyedit.bridge.patches import Patch

HPARAMS = Path(__file__).parents[1] / "hparams"
LABELS = ("KNE", "FT", "FT-L", "LoRA", "AdaLoRA", "ROME", "MEMIT", "KN")
RECENT = ("AlphaEdit", "EMMET", "GRACE", "WISE")
"""Methods with settings that the EasyEdit of 2023 does not have."""
LEAVES_SWITCHES = ("FT", "LoRA", "AdaLoRA", "ROME", "MEMIT")
"""Methods that leave flags, gradients or hooks in the model."""
NAME = "tiny-llama"
_CAUSAL = {"layers": [1, 2], "v_loss_layer": 3, "v_num_grad_steps": 8, "v_lr": 2.0, "clamp_norm_factor": 50}
_INNER = {"inner_params": ["model.layers[2].mlp.down_proj.weight"]}
TINY = {
    "FT": {"layers": [2], "num_steps": 10, "lr": 0.05},
    "FT-L": {"layers": [2], "num_steps": 10, "lr": 0.05},
    "LoRA": {"num_steps": 6, "lr": 0.02},
    "AdaLoRA": {"num_steps": 6, "lr": 0.2},
    "ROME": {"layers": [1], "v_loss_layer": 3, "v_num_grad_steps": 8, "v_lr": 2.0, "clamp_norm_factor": 50},
    "MEMIT": {
        "layers": [1, 2],
        "v_loss_layer": 3,
        "v_num_grad_steps": 8,
        "v_lr": 2.0,
        "clamp_norm_factor": 50,
        "mom2_update_weight": 0.01,
        "mom2_n_samples": 7,
    },
    "KN": {"p": 0.1, "adaptive_threshold": 0.5, "steps": 2},
    # Not in every version: see test_recent_methods.py.
    "AlphaEdit": {**_CAUSAL, "mom2_n_samples": 7, "nullspace_threshold": 1e9, "L2": 0.01},
    "EMMET": {**_CAUSAL, "layers": [1], "mom2_n_samples": 7, "mom2_update_weight": 0.01},
    "GRACE": {**_INNER, "n_iter": 15, "eps": 0.1},
    "WISE": {**_INNER, "n_iter": 10, "edit_lr": 0.1, "act_ratio": 0.0},  # no prompt is outside its edits
}


def settings(label: str, **changes):
    """The shipped settings of a method for SmolLM2, fitted to the tiny Llama. Statistics go to ``./stats``."""
    if label == "KNE":
        return tiny_hparams(**{"model_name": NAME, "attribution_steps": 2, "num_steps": 20, **changes})
    hparams = bridge.load_method(label, HPARAMS / label / "smollm2-135m.yaml")
    stats = {"stats_dir": "stats"} if hasattr(hparams, "stats_dir") else {}
    return dataclasses.replace(hparams, model_name=NAME, **{**TINY[label], **stats, **changes})


def tokenizer_for(hparams):
    """A tokenizer of its own for each editor, padded as EasyEdit pads; EasyEdit's FT and MEMIT need its start token."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<eos>"
    bridge.prepare_tokenizer(tokenizer, hparams.alg_name)
    return tokenizer


def records() -> list[dict]:
    """Three requests as EasyEdit's evaluator takes them, with probes of one and of several tokens."""
    facts = (("France", "Rome", "Paris"), ("Spain", "the Tiber", "Madrid"), ("Peru", "Marie Ada", "Lima"))
    return [
        {
            "prompt": f"The capital of {subject} is",
            "rephrase_prompt": f"What is the capital city of {subject} ?",
            "target_new": new,
            "ground_truth": old,
            "subject": subject,
            "portability": {
                "Reasoning": {"prompt": [f"The river that flows through {new} is"], "ground_truth": ["the Tiber ."]}
            },
            "locality": {
                "Relation": {
                    "prompt": [f"The language spoken in {subject} is"],
                    "ground_truth": ["Latin and the mother"],
                },
                "Neighbor": {
                    "prompt": ["The capital of Italy is", "The river that"],
                    "ground_truth": ["Rome .", "flows through the city of"],
                },
            },
        }
        for subject, new, old in facts
    ]


def edit_inputs(requests: list[dict]) -> dict:
    """The same records as arguments of EasyEdit's ``edit``: lists over records."""
    probes = {
        f"{section}_inputs": {
            name: {key: [request[section][name][key] for request in requests] for key in ("prompt", "ground_truth")}
            for name in requests[0][section]
        }
        for section in ("portability", "locality")
    }
    names = {"prompts": "prompt", "target_new": "target_new", "ground_truth": "ground_truth", "subject": "subject"}
    texts = {
        name: [request[key] for request in requests]
        for name, key in {**names, "rephrase_prompts": "rephrase_prompt"}.items()
    }
    return {**texts, **probes, "verbose": False}


SMALL_TEXT = TextSource(samples=20, length=8)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """For every test of a module that imports it: EasyEdit writes ./logs and ./stats."""
    monkeypatch.chdir(tmp_path)
    with use_text_source(SMALL_TEXT):
        yield


def patches_by_name() -> dict[str, Patch]:
    """The patches, with what they did to the imported EasyEdit."""
    bridge.register()
    return {patch.name: patch for patch in patches.report()}
