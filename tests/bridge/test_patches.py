"""The patches of EasyEdit: each fault shows without its patch and is gone with it, on whichever version is tested.

Run as a script, this file writes what the probes find in a process in which patches are switched off.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import HANGS, LLAMA_DOWN, failing, fingerprint, make_llama, make_tokenizer, tiny_hparams
from methods import LEAVES_SWITCHES, NAME, edit_inputs, records, settings, tokenizer_for

from kne_easyedit import bridge
from kne_easyedit.bridge import MethodEditor, TextSource, importing, patches, use_text_source
from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.patches import APPLIED, NOT_NEEDED, SWITCHED_OFF, Patch, RuntimePatch

ORIGINALS_WANTED = {"keep_original_weight": True}  # needed before May 2024, ignored since


SMALL_TEXT = TextSource(samples=20, length=8)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # EasyEdit writes ./logs and ./stats
    with use_text_source(SMALL_TEXT):
        yield


def by_name() -> dict[str, Patch]:
    bridge.register()
    return {patch.name: patch for patch in patches.report()}


# The registry


@pytest.fixture
def registry(monkeypatch) -> dict:
    """An empty one."""
    monkeypatch.setattr(patches, "_PATCHES", {})
    return patches._PATCHES


def test_a_name_is_given_once(registry):
    patches.add(Patch("one", "a fault"))
    with pytest.raises(ValueError, match="'one' is there already"):
        patches.add(Patch("one", "another"))
    assert registry["one"].fault == "a fault"


def test_switching_off_takes_names_or_all(monkeypatch):
    names = {patch.name for patch in patches.report()}
    for text, off in (("", set()), ("all", names), (" tied-head , device-names,", {"tied-head", "device-names"})):
        monkeypatch.setenv(patches.OFF, text)
        assert patches.switched_off() == off
    monkeypatch.delenv(patches.OFF)
    assert patches.switched_off() == set()


@pytest.mark.parametrize(
    ("text", "says"),
    [("modl-switches", "did you mean 'model-switches'"), ("device-names,0", "'0' is no patch; there are ")],
)
def test_an_unknown_name_is_refused_with_the_nearest(monkeypatch, text, says):
    monkeypatch.setenv(patches.OFF, text)
    with pytest.raises(ValueError, match=says):
        patches.switched_off()
    with pytest.raises(ValueError, match=says):  # before anything of EasyEdit is compiled
        patches.rewrite(ast.parse("x = 1"), "easyeditor.x")


def test_patches_are_applied_once_and_tell_what_was_done(registry, monkeypatch):
    calls = []

    def patch(name: str, there: bool) -> None:
        patches.runtime_patch(name, "a fault")(lambda easyeditor: calls.append(name) or there)

    patch("needed", True), patch("superfluous", False), patch("unwanted", True)
    patches.add(patches.SourcePatch("of a source", "a fault", transformer=Doubling))
    assert [p.state for p in patches.report()] == [None] * 4
    monkeypatch.setenv(patches.OFF, "unwanted")
    for _ in range(2):
        patches.apply_all(ModuleType("easyeditor"))
    assert calls == ["needed", "superfluous"]
    assert [(p.name, p.state) for p in patches.report()] == [
        ("needed", APPLIED),
        ("superfluous", NOT_NEEDED),
        ("unwanted", SWITCHED_OFF),
        ("of a source", NOT_NEEDED),
    ]
    assert patches.applied() == ["needed"]


class Doubling(ast.NodeTransformer):
    """1 -> 2."""

    def __init__(self):
        self.changes = 0

    def visit_Constant(self, node):
        self.changes += node.value == 1
        return ast.Constant(2) if node.value == 1 else node


@pytest.mark.parametrize(
    ("source", "name", "off", "result", "state"),
    [
        ("x = 1", "easyeditor.a.b", "", "x = 2", APPLIED),
        ("x = 3", "easyeditor.a.b", "", "x = 3", None),
        ("x = 1", "easyeditor.c", "", "x = 1", None),  # another module
        ("x = 1", "easyeditor.a.b", "doubling", "x = 1", None),
    ],
)
def test_a_source_patch_changes_its_modules_where_it_is_wanted(registry, monkeypatch, source, name, off, result, state):
    patches.add(patches.SourcePatch("doubling", "a fault", transformer=Doubling, modules=("a.b",)))
    monkeypatch.setenv(patches.OFF, off)
    assert ast.unparse(patches.rewrite(ast.parse(source), name)) == result
    assert registry["doubling"].state == state


def test_loading_again_wraps_nothing_again():
    easyeditor = bridge.register()
    touched = {
        "editor": easyeditor.BaseEditor.__init__,
        "settings": easyeditor.FTHyperParams.__init__,
        "parameter": module("util.nethook").get_parameter,
        **module("util.alg_dict").ALG_DICT,
    }
    patches.apply_all(importing.load())
    bridge.register()
    assert touched == {
        "editor": easyeditor.BaseEditor.__init__,
        "settings": easyeditor.FTHyperParams.__init__,
        "parameter": module("util.nethook").get_parameter,
        **module("util.alg_dict").ALG_DICT,
    }


def test_every_patch_has_said_what_it_did():
    for patch in by_name().values():
        assert patch.state in (APPLIED, NOT_NEEDED)
        assert patch.fault


# Source patches, on small texts


def replace_settings(name: str, source: str, where: str) -> str:
    """What a copy of the patch makes of a source; the patch's own state stays."""
    tree = dataclasses.replace(by_name()[name]).rewrite(ast.parse(source), where)
    return ast.unparse(ast.fix_missing_locations(tree))


def run(source: str, **names) -> dict:
    exec(compile(source, "small text", "exec"), names)  # noqa: S102
    return names


@pytest.mark.parametrize(("device", "name"), [(0, "cuda:0"), ("1", "cuda:1"), ("cpu", "cpu"), ("cuda:2", "cuda:2")])
def test_device_names_are_numbers_or_names(device, name):
    source = 'where = move(f"cuda:{hparams.device}")'
    for text in (source, f"def f():\n    if x:\n        return {source[8:]}\nx = 1\nwhere = f()"):
        found = run(
            replace_settings("device-names", text, "easyeditor.any"),
            hparams=SimpleNamespace(device=device),
            move=lambda name: name,
        )
        assert found["where"] == name
    assert (
        run(source, hparams=SimpleNamespace(device="cpu"), move=lambda name: name)["where"] == "cuda:cpu"
    )  # the fault
    with pytest.raises(RuntimeError, match="device"):
        torch.device("cuda:cpu")


@pytest.mark.parametrize(
    "text", ["'cuda:0'", "f'cuda:{a}:{b}'", "f'on cuda:{a}'", "f'cuda:{a:02d}'", "f'{a}'", "f'cpu:{a}'", "'cuda:' + a"]
)
def test_other_texts_about_devices_stay(text):
    assert ast.dump(ast.parse(replace_settings("device-names", text, "easyeditor.any"))) == ast.dump(ast.parse(text))


ADAPTERS = [
    ("adapter-removal", "del editor.model.peft_config", "easyeditor.editors.editor"),
    ("adapter-printing", "model.print_trainable_parameters()", "easyeditor.models.lora.lora_main"),
]


@pytest.mark.parametrize(("name", "statement", "where"), ADAPTERS)
def test_what_an_adapter_has_is_used_only_if_it_is_there(name, statement, where):
    for text in (statement, f"if True:\n    {statement}\nelse:\n    pass", f"for i in range(1):\n    {statement}"):
        for has in (True, False):
            calls = []
            parts = {"peft_config": 1, "print_trainable_parameters": partial(calls.append, 1)} if has else {}
            model = SimpleNamespace(**parts)
            run(replace_settings(name, text, where), model=model, editor=SimpleNamespace(model=model))
            assert not (name == "adapter-removal" and hasattr(model, "peft_config"))
            assert calls == [1] * (has and name == "adapter-printing")
    with pytest.raises(AttributeError):  # the fault
        run(statement, model=SimpleNamespace(), editor=SimpleNamespace(model=SimpleNamespace()))


@pytest.mark.parametrize(("name", "statement", "where"), ADAPTERS)
def test_other_statements_about_adapters_stay(name, statement, where):
    attribute = statement.rpartition(".")[2].removesuffix("()")
    guarded = f"if hasattr(model, '{attribute}'):\n    {statement}"
    for text in (guarded, "del model.other", "del peft_config", "model.print()", f"print('{attribute}')"):
        assert replace_settings(name, text, where) == text
    assert replace_settings(name, statement, "easyeditor.other") == statement


BATCH_EDIT = """
def batch_edit(chunks):
    {before}
    for chunk in chunks:
        {within}
        for fact in chunk:
            all_metrics.append(fact)
    return all_metrics, len(all_metrics)
"""


def test_batch_edit_returns_the_metrics_of_all_chunks():
    source = BATCH_EDIT.format(before="pass", within="all_metrics = []")
    assert run(source)["batch_edit"]([[1, 2], [3]]) == ([3], 1)  # the fault
    assert run(replace_settings("batch-metrics", source, "easyeditor.editors.editor"))["batch_edit"]([[1, 2], [3]]) == (
        [1, 2, 3],
        3,
    )


def test_a_batch_edit_that_is_right_stays():
    right = ast.unparse(ast.parse(BATCH_EDIT.format(before="all_metrics = []", within="pass")))
    wrong_elsewhere = ast.unparse(
        ast.parse(BATCH_EDIT.format(before="pass", within="all_metrics = []").replace("batch_edit", "edit"))
    )
    for text in (right, wrong_elsewhere):
        assert replace_settings("batch-metrics", text, "easyeditor.editors.editor") == text


def test_compiled_sources_leave_no_bytecode(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    path = tmp_path / "some_module.py"
    path.write_text('where = f"cuda:{device}"\n')
    code = importing._Loader("easyeditor.some_module", str(path)).get_code("easyeditor.some_module")
    found = {"device": "cpu"}
    exec(code, found)  # noqa: S102
    assert found["where"] == "cpu"
    assert [p.name for p in tmp_path.iterdir()] == ["some_module.py"]
    SourceFileLoader("some_module", str(path)).get_code("some_module")  # Python's own does leave some
    assert (tmp_path / "__pycache__").is_dir()


# Every fault without and with its patch


class Probe(NamedTuple):
    """A piece of work, what it gives with its patch, and what without: a value, or the name of an exception."""

    work: Callable[[], object]
    right: object
    wrong: object


def outcome(work: Callable[[], object]) -> object:
    try:
        return work()
    except Exception as error:  # noqa: BLE001
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


def loads_any_model():
    make_llama().save_pretrained("some-model")
    make_tokenizer().save_pretrained("some-model")
    editor = bridge.register().BaseEditor(tiny_hparams(model_name="some-model"))
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


def needs_no_download():
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Wikipedia")

    module("models.rome.layer_stats").load_dataset = load_dataset
    hparams = settings("MEMIT", layers=[1])
    get_cov = module("models.memit.memit_main").get_cov
    return list(
        get_cov(make_llama(), make_tokenizer(), LLAMA_DOWN.format(1), "wikipedia", 7, "float32", hparams=hparams).shape
    )


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

    In float64: Adam's first step goes by a gradient's sign alone, which float32's rounding may turn where it is nearly zero.
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
    make_llama(num_hidden_layers=1).save_pretrained("any-llama")
    make_tokenizer().save_pretrained("any-llama")
    editor = bridge.register().BaseEditor(tiny_hparams(model_name="any-llama", bf16=True))
    return editor.model.dtype == torch.bfloat16


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
    "second-moments": Probe(needs_no_download, [40, 40], "ConnectionError"),
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
    """What `main` writes in a process in which all patches but device-names are switched off; whether files of EasyEdit changed."""
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
    found, known = {}, by_name()
    states = {name: patch.state for name, patch in known.items()}
    for name, probe in PROBES.items():
        with use_text_source(SMALL_TEXT):
            found[name] = outcome(probe.work)
        if isinstance(known[name], RuntimePatch):
            known[name].apply(bridge.load())
    Path(file).write_text(json.dumps({"found": found, "states": states}))


def test_every_patch_has_a_probe():
    assert set(by_name()) == set(PROBES) | ELSEWHERE


@pytest.mark.parametrize("name", PROBES)
def test_a_fault_shows_without_its_patch_and_is_gone_with_it(name, without):
    """Where this version has no such fault, the patch says that it was not needed."""
    patch, probe = by_name()[name], PROBES[name]
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


# Faults that have no patch


if __name__ == "__main__":
    main(*sys.argv[1:])
