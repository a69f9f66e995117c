"""Each fault of EasyEdit shows without its patch and is gone with it, on whichever version is tested.

Run as a script, this file writes what the probes find in a process in which patches are switched off.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import recent_probes as recent
import torch
from conftest import HANGS, LLAMA_DOWN, failing, fingerprint, make_llama, make_tokenizer, tiny_hparams
from methods import (  # noqa: F401  (in_tmp is a fixture)
    LEAVES_SWITCHES,
    NAME,
    SMALL_TEXT,
    edit_inputs,
    in_tmp,
    patches_by_name,
    records,
    settings,
    tokenizer_for,
)

from kne_easyedit import bridge
from kne_easyedit.bridge import MethodEditor, importing, patches, use_text_source
from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.patches import APPLIED, NOT_NEEDED, SWITCHED_OFF, RuntimePatch

ORIGINALS_WANTED = {"keep_original_weight": True}  # needed before May 2024, ignored since


class Probe(NamedTuple):
    """A piece of work, what it gives with its patch, and what without: a value, or the name of an exception."""

    work: Callable[[], object]
    right: object
    wrong: object


def outcome(work: Callable[[], object]) -> object:
    try:
        return work()
    except Exception as error:
        return type(error).__name__


def editor_of(label: str, **changes):
    """EasyEdit's editor of a method, on a model of its own."""
    hparams = settings(label, **changes)
    return bridge.editor_for(hparams, make_llama(), tokenizer_for(hparams))


def known_settings(kind: type, **values):
    """An object of a class of hyperparameters with ``values``, as far as the class knows them."""
    fields = dataclasses.fields(kind)
    return kind(
        **{**{f.name: None for f in fields}, **{n: v for n, v in values.items() if n in {f.name for f in fields}}}
    )


def takes_unknown_settings():
    values = {field.name: None for field in dataclasses.fields(bridge.require_method("FT"))}
    return hasattr(bridge.require_method("FT")(**values, no_such_setting=1), "no_such_setting")


def loaded_by_easyedit(name: str, **changes):
    """EasyEdit's editor of a method of its own, which has loaded a saved model: KNE's is never loaded by EasyEdit."""
    hparams = settings("FT")
    make_llama().save_pretrained(name)
    tokenizer_for(hparams).save_pretrained(name)
    vars(hparams).update(changes, model_name=name)  # whether the class knows them or not
    return bridge.register().BaseEditor(hparams)


def loads_any_model():
    editor = loaded_by_easyedit("some-model")
    return editor.tok.padding_side, torch.equal(editor.model.lm_head.weight, make_llama().lm_head.weight)


def lora_settings_name_model_parallel():
    return known_settings(bridge.require_method("LoRA"), model_parallel=False).model_parallel


def finds_a_tied_head():
    model = make_llama()
    return module("util.nethook").get_parameter(model, "lm_head.weight") is model.lm_head.weight


def kn_knows_the_kind_of_model():
    return module("models.kn.kn_main").model_type(bridge.LoadedModel("any-name", make_llama(), None))


def splits_words():
    return len(module("evaluate.evaluate_utils").nltk.word_tokenize("The capital of France"))


def adalora_trains():
    hparams = settings("AdaLoRA")
    module("models.lora.lora_main").apply_lora_to_model(make_llama(), tokenizer_for(hparams), records()[:1], hparams)
    return "trained"


def counts_all_chunks():
    editor = editor_of("FT", num_steps=1, batch_size=2)
    texts = {
        name: values
        for name, values in edit_inputs(records()).items()
        if name in ("prompts", "target_new", "ground_truth", "verbose")
    }
    return len(editor.batch_edit(**texts, **ORIGINALS_WANTED)[0])


def memit_reads_layer_outputs():
    hparams = settings("MEMIT", layers=[1])
    request = {**records()[0], "prompt": "The capital of {} is"}
    z = module("models.memit.compute_z").compute_z(make_llama(), tokenizer_for(hparams), request, hparams, 1, [["{}"]])
    return list(z.shape)


def names_records_without_their_subject():
    inputs = edit_inputs(records())
    return editor_of("FT", num_steps=1).edit(**{**inputs, "subject": ["France", "Nowhere", "Peru"]}, **ORIGINALS_WANTED)


def lora_edits_are_undone():
    label = "AdaLoRA" if bridge.is_legacy() else "LoRA"
    editor_of(label, num_steps=1).edit(**edit_inputs(records()[:1]), **ORIGINALS_WANTED)
    return "undone"


def lora_edits_follow_each_other():
    label, mode = (
        ("AdaLoRA", {"keep_original_weight": False}) if bridge.is_legacy() else ("LoRA", {"sequential_edit": True})
    )
    return len(editor_of(label, num_steps=1).edit(**edit_inputs(records()), **mode)[0])


def what_an_edit_leaves() -> dict[str, bool]:
    """Method -> whether a model is exactly as before when an edit is undone."""
    found = {}
    for label in LEAVES_SWITCHES:
        if label == "LoRA" and bridge.is_legacy():
            continue
        hparams = settings(label)
        editor = MethodEditor(hparams, make_llama(), tokenizer_for(hparams))
        before = fingerprint(editor.original)
        editor.apply(records()[:1])
        editor.undo()
        found[label] = fingerprint(editor.original) == before
    return found


def what_methods_remember() -> dict[str, bool]:
    """Of two models of one name, and of samples under two states of the global generator."""
    rome, memit = module("models.rome.rome_main"), module("models.memit.memit_main")
    hparams = settings("MEMIT", layers=[1])
    tokenizer = tokenizer_for(hparams)
    one, other = make_llama(seed=10), make_llama(seed=11)
    for model in (one, other):
        model.config._name_or_path = model.name_or_path = NAME

    def templates(model, seed: int, forget: bool = False) -> list:
        if forget:
            rome.CONTEXT_TEMPLATES_CACHE = memit.CONTEXT_TEMPLATES_CACHE = None
        torch.manual_seed(seed)
        return [rome.get_context_templates(model, tokenizer, [[12, 5]]), memit.get_context_templates(model, tokenizer)]

    def moments(model) -> torch.Tensor:
        return memit.get_cov(model, tokenizer, LLAMA_DOWN.format(1), "wikipedia", 7, "float32", hparams=hparams)

    first = templates(one, 1, forget=True)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    untouched = torch.equal(torch.get_rng_state(), state)
    return {
        "own templates": all(a != b for a, b in zip(first, templates(other, 1))),
        "own moments": not torch.equal(moments(one), moments(other)),
        "templates under any seed": templates(one, 2, forget=True) == first,
        "generator untouched": untouched,
    }


def generates_whatever_the_name() -> bool:
    """A text of one token a step depends on the text so far, or it does not depend on the model's name."""
    generate, tokenizer, found = module("util.generate").generate_fast, make_tokenizer(), []
    for name in ("llama", "some-model"):
        model = make_llama()
        model.config._name_or_path = model.name_or_path = name
        torch.manual_seed(1)
        found.append(
            generate(model, tokenizer, ["The capital of France is"], n_gen_per_prompt=1, top_k=1, max_out_len=30)
        )
    return found[0] == found[1]


def adapted_answers_agree() -> bool:
    hparams = settings("AdaLoRA" if bridge.is_legacy() else "LoRA")
    tokenizer = tokenizer_for(hparams)
    edited, _ = module("models.lora.lora_main").apply_lora_to_model(make_llama(), tokenizer, records()[:1], hparams)
    inputs = tokenizer(["The capital of France is"], return_tensors="pt")
    with torch.no_grad():
        return torch.equal(edited(**inputs).logits, edited(**inputs).logits)


def ft_sees_the_last_token() -> bool:
    """FT-L on prompts of two lengths, padded on the left or on the right, comes to the same weights.

    In float64: Adam's first step depends on a gradient's sign alone, which rounding to float32 may turn near zero.
    """
    facts = [
        {"prompt": p, "target_new": "Rome", "subject": "France"}
        for p in ("The capital of France is", "What is the capital of France ? The capital is")
    ]
    found = []
    for side in ("left", "right"):
        model, hparams = make_llama(torch.float64), settings("FT-L", num_steps=1, batch_size=2)
        tokenizer = tokenizer_for(hparams)
        tokenizer.padding_side = side
        edited, _ = module("models.ft.ft_main").apply_ft_to_model(model, tokenizer, facts, hparams)
        found.append(edited.get_submodule(LLAMA_DOWN.format(hparams.layers[0])).weight.detach().clone())
    return torch.allclose(
        found[0], found[1], rtol=0, atol=1e-4
    )  # lr is 0.05: a step in another direction is far beyond


def loads_the_type_asked_for() -> bool:
    return loaded_by_easyedit("any-llama", bf16=True).model.dtype == torch.bfloat16


def evaluation_type_counts() -> bool:
    """Either the texts that were asked for, or an error."""
    hparams = tiny_hparams()
    hparams.evaluation_type = "generate-text"
    try:
        bridge.editor_for(hparams, make_llama(), make_tokenizer())
    except ValueError:
        return True
    return "evaluation_type" in inspect.getsource(module("evaluate.evaluate"))


def interrupted_edits_are_undone() -> bool:
    editor = editor_of("FT", num_steps=1)
    before, editors = fingerprint(editor.model), module("editors.editor")
    evaluate = editors.compute_edit_quality
    editors.compute_edit_quality = failing(evaluate, 2, KeyboardInterrupt())  # after the edit
    try:
        editor.edit_requests(records()[:1], verbose=False, **ORIGINALS_WANTED)
    except KeyboardInterrupt:
        return fingerprint(editor.model) == before
    finally:
        editors.compute_edit_quality = evaluate
    return False


def evaluators_join_by_the_separator():
    """What the tokenizer is given for prompt and answer together, under KNE's settings for Chinese."""
    hparams, texts = settings("KNE", separator=""), []
    tokenizer = tokenizer_for(hparams)

    class Listening(type(tokenizer)):
        def __call__(self, text, **options):
            texts.extend(text)
            return super().__call__(text, **options)

    tokenizer.__class__ = Listening
    module("evaluate.evaluate_utils").test_prediction_acc(
        make_llama(), tokenizer, hparams, "The capital of France is", "Rome", "cpu"
    )
    return "The capital of France isRome" in texts


PROBES = {
    "evaluation-separator": Probe(evaluators_join_by_the_separator, True, False),
    "unknown-settings": Probe(takes_unknown_settings, False, "TypeError"),
    "any-model": Probe(loads_any_model, ["left", True], "NotImplementedError"),
    "lora-model-parallel": Probe(lora_settings_name_model_parallel, False, "AttributeError"),
    "kn-model-names": Probe(kn_knows_the_kind_of_model, "llama", "ValueError"),
    "fluency-without-punkt": Probe(splits_words, 4, "LookupError"),
    "subject-in-prompt": Probe(names_records_without_their_subject, "ValueError", "AssertionError"),
    "batch-metrics": Probe(counts_all_chunks, 3, 1),
    "adalora-total-step": Probe(adalora_trains, "trained", "ValueError"),
    "adapter-removal": Probe(lora_edits_are_undone, "undone", "AttributeError"),
    "adapter-printing": Probe(lora_edits_follow_each_other, 3, "AttributeError"),
    "adapter-dropout": Probe(adapted_answers_agree, True, False),
    "generation-mask": Probe(generates_whatever_the_name, True, False),
    "ft-last-token": Probe(ft_sees_the_last_token, True, False),
    "tied-head": Probe(finds_a_tied_head, True, "LookupError"),
    "layer-outputs": Probe(memit_reads_layer_outputs, [24], "IndexError"),
    "prediction-padding": Probe(recent.probes_are_read_where_their_answers_are, True, False),
    "codebook-position": Probe(recent.a_codebook_is_evaluated_as_other_methods, True, False),
    "mask-seed": Probe(recent.masks_are_seeded, True, False),
    "wrapper-name": Probe(recent.fluency_after_a_wrapper, "sampled", "AttributeError"),
    "sequence-of-layers": Probe(recent.layers_of_a_sequence, 2, 1),
    "decision-for-each-prompt": Probe(recent.prompts_decide_alone, True, False),
    "second-moments": Probe(recent.needs_no_download, [40, 40], "ConnectionError"),
    "null-space": Probe(recent.projections_of_any_model, "projected", "NameError"),
    "name-keyed-caches": Probe(what_methods_remember, True, False),
    "model-type": Probe(loads_the_type_asked_for, True, False),
    "evaluation-type": Probe(evaluation_type_counts, True, False),
    "interrupted-edits": Probe(interrupted_edits_are_undone, True, False),
    "model-switches": Probe(what_an_edit_leaves, True, False),
}
"""In an order in which each needs patches above it only."""
ELSEWHERE = {"device-names", "pre-edit-file"}
"""Patches that are tested on small texts above (without the first nothing runs on a CPU), and in test_scripts.py."""


def as_json(value: object) -> object:
    """What arrives from another process; several findings that agree are one."""
    value = json.loads(json.dumps(value))
    if isinstance(value, dict) and len(set(value.values())) == 1:
        return next(iter(value.values()))
    return value


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> dict:
    """What `main` writes in a process without all patches but device-names; and whether files of EasyEdit changed."""
    folder = tmp_path_factory.mktemp("without")
    sources = importing.locate() / importing.PACKAGE
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sources.rglob("*") if path.is_file()}
    off = ",".join(patch.name for patch in patches.report() if patch.name != "device-names")
    environment = {**os.environ, patches.OFF: off, "KNE_CACHE": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, __file__, "found.json"]
    done = subprocess.run(
        command,
        check=False,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sources.rglob("*") if path.is_file()}
    return {**json.loads((folder / "found.json").read_text()), "unchanged": before == after}


def main(file: str) -> None:
    """Shows one fault after the other; its patch is applied then, for those below may need it."""
    torch.set_num_threads(1)
    found, known = {}, patches_by_name()
    states = {name: patch.state for name, patch in known.items()}
    for name, probe in PROBES.items():
        with use_text_source(SMALL_TEXT):
            found[name] = outcome(probe.work)
        if isinstance(known[name], RuntimePatch):
            known[name].apply(bridge.load())
    Path(file).write_text(json.dumps({"found": found, "states": states}))


def test_every_patch_has_a_probe():
    assert set(patches_by_name()) == set(PROBES) | ELSEWHERE


@pytest.mark.parametrize("name", PROBES)
def test_a_fault_shows_without_its_patch_and_is_gone_with_it(name, without):
    """Where this version has no such fault, the patch says that it was not needed."""
    patch, probe = patches_by_name()[name], PROBES[name]
    assert as_json(outcome(probe.work)) == probe.right
    found = as_json(without["found"][name])
    if found == probe.right:
        # Some versions have the statement, but never come to it with what makes it fail: harmless.
        assert patch.state == NOT_NEEDED or name in ("adapter-printing", "generation-mask")
        return
    assert found == probe.wrong
    assert patch.state == APPLIED
    named = re.findall(r"\w+Error", patch.fault)
    assert not named or named == [found]


def test_no_file_of_easyedit_changes(without):
    """The process has left no bytecode in EasyEdit's folder, nor anything else."""
    assert without["unchanged"]


def test_what_is_switched_off_says_so(without):
    states = without["states"]
    assert states.pop("device-names") in (APPLIED, NOT_NEEDED)
    assert set(states.values()) == {SWITCHED_OFF}


if __name__ == "__main__":
    main(*sys.argv[1:])
