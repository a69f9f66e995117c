"""The cells of `compatibility.py` for the EasyEdit of this process: one method in one of EasyEdit's own modes.

A cell works if nothing fails and the model is bit for bit what it was afterwards (in sequential mode: if the edits have
stayed). As a script, it prints the cells of the given methods; `compatibility.py` starts it for each version.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

METHODS = (
    "KNE",
    "FT",
    "FT-L",
    "LoRA",
    "AdaLoRA",
    "ROME",
    "MEMIT",
    "AlphaEdit",
    "EMMET",
    "WISE",
    "GRACE",
    "KN",
)
MODES = ("edit", "sequential_edit", "batch_edit 1", "batch_edit 10", "batch_edit 100", "normal_edit", "edit_requests")
HPARAMS = Path(__file__).resolve().parents[1] / "hparams"
WORDS = "The capital language river name mother city of in is was to that through flows spoken a are He She".split()  # noqa: SIM905  (read as a sentence)
SUBJECTS = [f"Land{i}" for i in range(101)]
TARGETS = [f"Town{i}" for i in range(10)]
UNRELATED = "The river of Land100 is Town9"
"""For a method that wants an unrelated text in every request."""
SENTINEL = "CELLS "
"""Begins the line of output that has the cells."""
FORGETS = "this version begins a new adapter with every edit and loses those before"
"""The only limit that shows by no error."""


def tiny_model() -> tuple[Any, Any]:
    """A random Llama of four layers and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *WORDS, *SUBJECTS, *TARGETS, ".", ","])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106  (no password)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def settings(label: str, stats: Path, tiny: bool) -> Any:
    """The shipped settings for SmolLM2, cut down for a tiny model."""
    from kne_easyedit import bridge

    hparams = bridge.load_method(label, HPARAMS / label / "smollm2-135m.yaml")
    if hasattr(hparams, "stats_dir"):
        hparams.stats_dir = str(stats)
    if not tiny:
        return hparams
    hparams.model_name = "tiny-model"
    smaller = {
        "num_steps": 3,
        "v_num_grad_steps": 3,
        "v_loss_layer": 3,
        "mom2_n_samples": 7,
        "attribution_steps": 2,
        "localization_data": None,
        "n_iter": 3,
        "inner_params": ["model.layers[2].mlp.down_proj.weight"],
        "nullspace_threshold": 1e9,
    }
    for name, value in smaller.items():
        if hasattr(hparams, name):
            setattr(hparams, name, value)
    if getattr(hparams, "layers", None):
        hparams.layers = [1, 2] if len(hparams.layers) > 1 else [2]
    return hparams


def limit(label: str, mode: str) -> str | None:
    """Why this EasyEdit does not support a cell, with any patches; None if it does."""
    from kne_easyedit import bridge
    from kne_easyedit.bridge.method_editor import is_batchable
    from kne_easyedit.bridge.methods import traits_of

    editor = bridge.register().BaseEditor
    traits = traits_of(label)
    alg_name = traits.alg_name
    name = mode.split()[0]
    try:
        bridge.load_method(label, HPARAMS / label / "smollm2-135m.yaml")
    except ValueError as error:
        return str(error)
    if name != "sequential_edit" and not hasattr(editor, name):
        return f"this version has no {name}"
    if name in ("batch_edit", "normal_edit") and not is_batchable(alg_name):
        if traits.one_fact:
            return f"{alg_name} edits the first of several facts"
        return f"EasyEdit counts {alg_name} among the singleton methods"
    if name == "normal_edit" and traits.needs_subject:
        return f"normal_edit passes no subject, {alg_name} needs one"
    if name == "normal_edit" and traits.edits == "adapter":
        return "normal_edit writes back whole weights only: the adapter stays"
    if name == "batch_edit" and traits.edits == "adapter" and "unload" not in _source(editor.batch_edit):
        return "this version's batch_edit writes back whole weights only: the adapter stays"
    if name == "sequential_edit" and traits.restarts_in_2023 and bridge.is_legacy():
        return FORGETS
    if name == "sequential_edit" and alg_name == "KN" and bridge.is_legacy():
        return "this version undoes every KN edit at once"
    return None


def _source(function: Callable) -> str:
    import inspect

    text = inspect.getsource(function)
    module: Any = inspect.getmodule(function)
    return text + inspect.getsource(module.restore_after_edit) if "restore_after_edit" in text else text


def requests(count: int) -> dict[str, Any]:
    """Facts in the form that `edit` takes."""
    subjects, targets = SUBJECTS[:count], [TARGETS[i % len(TARGETS)] for i in range(count)]
    probes = {
        "reasoning": {
            "prompt": [["The river of Land1 is"] for _ in subjects],
            "ground_truth": [["Town1"] for _ in subjects],
        }
    }
    return {
        "prompts": [f"The capital of {subject} is" for subject in subjects],
        "target_new": targets,
        "ground_truth": list(targets[::-1]),
        "subject": subjects,
        "portability_inputs": probes,
        "locality_inputs": json.loads(json.dumps(probes)),
    }


def attempt(label: str, mode: str, stats: Path) -> None:
    """Runs one cell. Raises whatever fails, or AssertionError if the model is not as the mode should leave it."""
    from kne_easyedit import bridge
    from kne_easyedit.models.fingerprint import model_digest

    model, tokenizer = tiny_model()
    name, _, number = mode.partition(" ")
    size = int(number or 1)
    facts = requests(max(3, size + 1) if name == "batch_edit" else 3)
    count, legacy = len(facts["prompts"]), bridge.is_legacy()
    editor = bridge.editor_for(settings(label, stats, tiny=True), model, tokenizer)
    field = bridge.traits_of(label).request_field
    before = model_digest(model)
    if name in ("edit", "sequential_edit"):
        stay = name == "sequential_edit"
        how = {"keep_original_weight": not stay} if legacy else {"sequential_edit": stay}
        texts = {f"{field}s": [UNRELATED] * count} if field else {}
        metrics, edited, _ = editor.edit(**facts, **texts, verbose=False, **how)
    elif name == "batch_edit":
        editor.hparams.batch_size = size
        plain = {key: facts[key] for key in ("prompts", "target_new", "ground_truth", "subject")}
        metrics, edited, _ = editor.batch_edit(
            **plain, verbose=False, **({"keep_original_weight": True} if legacy else {})
        )
    elif name == "normal_edit":
        _, edited, _ = editor.normal_edit(prompts=facts["prompts"], target_new=facts["target_new"])
        metrics = [None] * count
    else:
        keys = ("prompt", "target_new", "ground_truth", "subject")
        columns = zip(facts["prompts"], facts["target_new"], facts["ground_truth"], facts["subject"])
        rows = [{**dict(zip(keys, row)), "portability": {}, "locality": {}} for row in columns]
        rows = [{**row, field: UNRELATED} if field else row for row in rows]
        metrics, edited, _ = editor.edit_requests(
            rows, verbose=False, **({"keep_original_weight": True} if legacy else {})
        )
    if len(metrics) != count:
        raise AssertionError(f"{len(metrics)} metrics for {count} facts")
    stay = name == "sequential_edit"
    changed = (
        model_digest(model) != before or hasattr(model, "peft_config") or (stay and hasattr(edited, "peft_config"))
    )
    if changed != stay:
        raise AssertionError("the model is not what it was" if changed else "the edits have not stayed")


def cells(methods: list[str]) -> Iterator[dict]:
    """Every cell of this process's EasyEdit on the tiny model."""
    import torch

    from kne_easyedit.bridge import TextSource, use_text_source

    torch.set_num_threads(1)
    small = TextSource(samples=8, length=6)
    with tempfile.TemporaryDirectory() as stats, use_text_source(small):
        for label in methods:
            for mode in MODES:
                cannot = limit(label, mode)
                yield {
                    "method": label,
                    "mode": mode,
                    "cannot": cannot,
                    "error": None if cannot else _error(label, mode, Path(stats)),
                }


def smollm2_cells(data: str, methods: list[str], size: int = 3) -> Iterator[dict]:
    """Figures of three records on the real model: every method edit by edit; KNE and FT in the other modes, too."""
    import dataclasses

    from kne_easyedit.benchmark import Run, run
    from kne_easyedit.facts.records import load_requests
    from kne_easyedit.models.loading import load_model

    hparams = {
        label: settings(label, Path("stats").resolve(), tiny=False) for label in methods if limit(label, "edit") is None
    }
    model, tokenizer = load_model(next(iter(hparams.values())))
    found = load_requests(data, size)
    for mode, batch in (("single", 1), ("sequential", 1), ("batch", size)):
        able = {
            label: dataclasses.replace(h) for label, h in hparams.items() if mode == "single" or label in ("KNE", "FT")
        }
        if not able:
            continue
        summary = run(
            Run(
                model,
                tokenizer,
                found,
                able,
                data,
                Path(mode),
                mode=mode,
                batch_size=batch,
                before_folder=Path("before"),
            )
        )
        for method, figures in summary["methods"].items():
            names = ("edit_success", "portability", "locality", "fluency", "seconds_per_edit")
            yield {
                "method": method,
                "mode": mode,
                **{name: figures[name] for name in names},
                "retention": figures.get("retention"),
            }


def _error(label: str, mode: str, stats: Path) -> str | None:
    hidden = io.StringIO()
    try:
        with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
            attempt(label, mode, stats)
    except Exception as error:  # noqa: BLE001  (every failure of a cell is a result)
        said = str(error).strip()
        return f"{type(error).__name__}: {said.splitlines()[0][:120] if said else 'no message'}"
    return None


def main() -> None:
    """Prints the cells of some methods, and the patches of this EasyEdit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="+", choices=METHODS)
    parser.add_argument("--smollm2", metavar="DATA", help="edit records of this file of SmolLM2 instead")
    arguments = parser.parse_args()
    from kne_easyedit import bridge
    from kne_easyedit.bridge import patches

    bridge.register()
    found = smollm2_cells(arguments.smollm2, arguments.methods) if arguments.smollm2 else cells(arguments.methods)
    result = {
        "cells": list(found),
        "easyedit": bridge.describe(),
        "patches": {patch.name: patch.state for patch in patches.report()},
        "faults": {patch.name: patch.fault for patch in patches.report()},
    }
    print(SENTINEL + json.dumps(result))


if __name__ == "__main__":
    main()
