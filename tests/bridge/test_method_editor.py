"""MethodEditor on every weight-editing method of this EasyEdit: edit, evaluate, undo, alone, in a row, in batches."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import failing, fingerprint, make_llama, make_tokenizer, weights
from methods import (  # noqa: F401  (in_tmp is a fixture)
    HPARAMS,
    LABELS,
    RECENT,
    edit_inputs,
    in_tmp,
    records,
    settings,
    tokenizer_for,
)
from rounding import A_MODEL, roundings

from kne_easyedit import bridge
from kne_easyedit.benchmark.answers import free_answers
from kne_easyedit.bridge import MethodEditor, compare
from kne_easyedit.bridge.importing import module

ORIGINALS_WANTED = {"keep_original_weight": True}  # needed before May 2024, ignored since
NO_EFFECT = {"FT": "lr", "FT-L": "lr", "LoRA": "lr", "AdaLoRA": "lr", "ROME": "v_lr", "MEMIT": "v_lr"}
"""The setting that, at zero, makes an edit change nothing."""


def knows(label: str, setting: str) -> bool:
    """Whether this EasyEdit's class of the method has the setting; that of 2023 lacks some."""
    return setting in {field.name for field in dataclasses.fields(bridge.require_method(label))}


def editor_of(label: str, model=None, **changes) -> MethodEditor:
    """Skips a method that this EasyEdit does not have: LoRA without AdaLoRA's ranks, in the release of 2023."""
    if label == "LoRA" and not knows("LoRA", "lora_type"):
        with pytest.raises(ValueError, match="knows adalora only, not LoRA"):
            settings(label)
        pytest.skip("the release of 2023 knows AdaLoRA only")
    hparams = settings(label, **changes)
    return MethodEditor(hparams, model or make_llama(), tokenizer_for(hparams))


@pytest.fixture(params=LABELS)
def editor(request) -> MethodEditor:
    return editor_of(request.param)


def require_sequences(editor: MethodEditor) -> None:
    if editor.hparams.alg_name == "LoRA" and bridge.is_legacy():
        with pytest.raises(ValueError, match="loses those before"):
            editor.require_sequence()
        pytest.skip("the release of 2023 loses AdaLoRA's earlier edits, and refuses")


@torch.no_grad()
def logits(editor: MethodEditor) -> torch.Tensor:
    """What evaluations see, without an adapter's dropout."""
    return editor.model.eval()(**editor.tokenizer(records()[0]["prompt"], return_tensors="pt")).logits


def replace_settings(editor: MethodEditor, before: dict) -> bool:
    """Whether the weights are others, or the model is wrapped and answers differently."""
    return weights(editor.original) != before["weights"] or editor.model is not editor.original


# Edit and undo


def test_an_edit_changes_the_model_and_undo_gives_it_back(editor):
    before, answers = fingerprint(editor.original), logits(editor)
    for request in records():
        editor.apply([request])
        assert replace_settings(editor, before)
        assert not torch.equal(logits(editor), answers)
        editor.undo()
        assert editor.model is editor.original
        assert fingerprint(editor.original) == before
        assert torch.equal(logits(editor), answers)


def test_texts_of_the_edited_model_leave_its_generation_settings_alone(editor):
    """PEFT's `generate` gives the model below it the settings of the wrapper."""
    own = editor.original.generation_config
    own.repetition_penalty = 1.3
    editor.apply(records()[:1])
    free_answers(editor.model, editor.tokenizer, records()[0])
    editor.undo()
    assert editor.original.generation_config is own and own.repetition_penalty == 1.3


def test_edits_in_a_row_are_all_undone(editor):
    require_sequences(editor)
    before = fingerprint(editor.original)
    for request in records():
        editor.apply([request])
    assert replace_settings(editor, before)
    editor.undo()
    assert editor.model is editor.original
    assert fingerprint(editor.original) == before


@pytest.mark.parametrize("label", NO_EFFECT)
def test_an_edit_of_no_effect_keeps_the_edits_before(label):
    """An edit goes on top of those before it, whatever the method: what an edit at rate zero must show."""
    editor = editor_of(label)
    answers = logits(editor)
    editor.apply(records()[:1])
    edited = logits(editor)
    assert roundings(edited, answers) > 10 * A_MODEL
    editor.hparams = dataclasses.replace(editor.hparams, **{NO_EFFECT[label]: 0.0})
    if label == "AdaLoRA" and bridge.is_legacy():
        with pytest.raises(ValueError, match="loses those before"):
            editor.apply(records()[1:2])
        return
    editor.apply(records()[1:2])
    assert roundings(logits(editor), edited) < A_MODEL


def test_after_a_failed_edit_the_model_is_what_it_was_before_all_edits(editor):
    require_sequences(editor)
    before = fingerprint(editor.original)
    editor.editor.apply_algo = failing(editor.editor.apply_algo, 2, RuntimeError("no luck"))
    editor.apply(records()[:1])
    assert replace_settings(editor, before)
    with pytest.raises(RuntimeError, match="no luck"):
        editor.apply(records()[1:2])
    assert editor.model is editor.original
    assert fingerprint(editor.original) == before


def test_a_method_that_tells_no_way_back_is_refused_and_the_edits_before_are_undone():
    """Its edit is an error like any other: after an error all edits are undone."""
    editor = editor_of("FT")
    before = fingerprint(editor.original)
    editor.apply(records()[:1])
    editor.editor.apply_algo = lambda model, *args, **kwargs: (model, {})
    with pytest.raises(ValueError, match="FT gives nothing by which its edit could be undone"):
        editor.apply(records()[1:2])
    assert fingerprint(editor.original) == before


def test_in_context_editing_is_refused_by_name():
    with pytest.raises(ValueError, match="IKE edits prompts, not weights"):
        MethodEditor(SimpleNamespace(alg_name="IKE"), make_llama(), make_tokenizer())


# Batches


def one_at_a_time(label: str) -> bool:
    """KN takes the first of several requests, ROME is for one; the LoRA of 2023 is not among the batch methods."""
    return label in ("KN", "ROME") or (label == "AdaLoRA" and bridge.is_legacy())


@pytest.mark.parametrize("label", LABELS)
def test_a_batch_of_three_edits_all_and_is_undone_or_is_refused(label):
    """What a method for one fact would do with three is to drop two of them without a word."""
    alone, editor = editor_of(label), editor_of(label)
    before = fingerprint(editor.original)
    editor.require_batch(1)
    if one_at_a_time(label):
        with pytest.raises(ValueError, match=f"{editor.hparams.alg_name} edits one fact at a time, not 3"):
            editor.require_batch(3)
        return
    torch.manual_seed(0)
    alone.apply(records()[:1])
    editor.require_batch(3)
    assert getattr(editor.hparams, "batch_size", 3) == 3
    torch.manual_seed(0)
    editor.apply(records())
    assert replace_settings(editor, before)
    assert roundings(logits(editor), logits(alone)) > 10 * A_MODEL  # the other two count, too
    editor.undo()
    assert fingerprint(editor.original) == before


# Evaluation


def accuracies(figures: dict) -> dict[str, list[float]]:
    """All that ends in ``_acc``, by section and name."""
    sections = {"": figures, **{name: figures.get(name, {}) for name in ("portability", "locality")}}
    return {
        f"{s}.{n}": [float(v) for v in values]
        for s, found in sections.items()
        for n, values in found.items()
        if n.endswith("_acc")
    }


def seeded(function):
    """LoRA starts from random numbers."""

    def wrapper(*args, **kwargs):
        torch.manual_seed(0)
        return function(*args, **kwargs)

    return wrapper


def without_dropout(label: str) -> dict:
    """EasyEdit evaluates LoRA with its dropout on: figures are random unless there is none."""
    return {"lora_dropout": 0.0} if "LoRA" in label else {}


@pytest.mark.parametrize("label", LABELS)
def test_figures_are_those_of_easyedits_own_edit(label):
    """Of ``edit`` and ``edit_requests``, before and after the edit, for the same records with all kinds of probes."""
    model = make_llama()
    ours = editor_of(label, model, **without_dropout(label))
    ours.editor.apply_algo = seeded(ours.editor.apply_algo)
    found = []
    for request in records():
        pre = ours.evaluate(request, generation=False, seed=1)
        ours.apply([request])
        post = compare(pre, ours.evaluate(request, generation=False, seed=1))
        ours.undo()
        found.append((accuracies(pre), accuracies(post)))
    assert {name for _, post in found for name in post} == {
        ".rewrite_acc",
        ".rephrase_acc",
        "portability.Reasoning_acc",
        "locality.Relation_acc",
        "locality.Neighbor_acc",
    }
    assert any(0 < value < 1 for _, post in found for values in post.values() for value in values)

    theirs = bridge.editor_for(ours.hparams, model, ours.tokenizer)
    theirs.apply_algo = seeded(theirs.apply_algo)
    metrics = theirs.edit(**edit_inputs(records()), **ORIGINALS_WANTED)[0]
    assert [(accuracies(m["pre"]), accuracies(m["post"])) for m in metrics] == found
    metrics = theirs.edit_requests(records(), verbose=False, **ORIGINALS_WANTED)[0]
    assert [(accuracies(m["pre"]), accuracies(m["post"])) for m in metrics] == found


def test_evaluation_changes_nothing_in_the_model(editor):
    before = fingerprint(editor.original)
    editor.evaluate(records()[0], generation=False, seed=1)
    assert fingerprint(editor.original) == before


def test_an_edited_model_answers_the_same_every_time(editor):
    """An edit is evaluated without the dropout of its training: only fluency samples."""
    editor.apply(records()[:1])
    prompt = editor.tokenizer(records()[0]["prompt"], return_tensors="pt")
    with torch.no_grad():
        first, second = (editor.model(**prompt).logits for _ in range(2))
    assert torch.equal(first, second)


def test_fluency_under_a_seed_is_the_same_whatever_ran_before():
    editor = editor_of("FT")
    request = records()[0]
    first = editor.evaluate(request, generation=True, seed=3)["fluency"]
    torch.rand(5), numpy.random.rand(5)
    editor.evaluate(records()[1], generation=True, seed=9)
    assert editor.evaluate(request, generation=True, seed=3)["fluency"] == first
    assert editor.evaluate(request, generation=True, seed=4)["fluency"] != first


def test_compare_counts_equal_tokens_of_every_probe():
    pre = {"locality": {"A_output": [[1, 2, 3, 4], [5]]}}
    post = {"rewrite_acc": [1.0], "locality": {"A_output": [[1, 2, 0, 0], [5]]}}
    assert compare(pre, post) == {"rewrite_acc": [1.0], "locality": {"A_acc": [0.5, 1.0]}}
    assert post["locality"] == {"A_output": [[1, 2, 0, 0], [5]]}  # left as it was
    with pytest.raises(ValueError, match="1 outputs before the edit, 2 after"):
        compare({"locality": {"A_output": [[1]]}}, post)


# Settings by label


@pytest.mark.parametrize(
    ("label", "folder", "setting", "value"),
    [
        ("FT-M", "FT", "objective_optimization", "target_new"),
        ("FT-L", "FT-L", "objective_optimization", "prompt_last"),
        ("LoRA", "LoRA", "lora_type", "lora"),
        ("AdaLoRA", "AdaLoRA", "lora_type", "adalora"),
    ],
)
def test_a_label_gives_its_settings(label, folder, setting, value):
    """The release of 2023 does one of the two only: it loads that one and refuses the other."""
    path = HPARAMS / folder / "smollm2-135m.yaml"
    if not knows(label, setting) and label in ("FT-M", "LoRA"):
        with pytest.raises(ValueError, match=f"not {label}"):
            bridge.load_method(label, path)
        return
    if label in RECENT and bridge.is_legacy():
        with pytest.raises(ValueError, match=f"{label}' is unknown to this EasyEdit"):
            bridge.load_method(label, path)
        return
    hparams = bridge.load_method(label, path)
    assert hparams.alg_name == bridge.METHODS[label].alg_name
    assert getattr(hparams, setting, value) == value


@pytest.mark.parametrize(
    ("label", "folder"), [("FT-M", "FT-L"), ("FT-L", "FT"), ("LoRA", "AdaLoRA"), ("AdaLoRA", "LoRA")]
)
def test_a_file_that_contradicts_its_label_is_refused(label, folder):
    with pytest.raises(ValueError, match=f"but {label} is"):
        bridge.load_method(label, HPARAMS / folder / "smollm2-135m.yaml")


@pytest.mark.parametrize("label", ["FT-M", "AdaLoRA"])
def test_a_label_adds_the_setting_that_a_file_leaves_out(label, tmp_path):
    setting, value = next(iter(bridge.METHODS[label].settings.items()))
    if not knows(label, setting):
        pytest.skip(f"this EasyEdit does not know {setting}")
    source = HPARAMS / bridge.METHODS[label].alg_name / "smollm2-135m.yaml"
    path = tmp_path / "short.yaml"
    path.write_text(
        "".join(line for line in source.read_text().splitlines(keepends=True) if not line.startswith(setting))
    )
    assert getattr(bridge.load_method(label, path), setting) == value


METHOD_FOLDERS = [
    folder
    for folder in sorted(HPARAMS.iterdir())
    if folder.is_dir() and folder.name not in ("benchmark", "hydra", "study")
]
"""The folders of settings but those of Hydra's own files."""


@pytest.mark.parametrize(
    "path",
    [path for folder in METHOD_FOLDERS for path in sorted(folder.glob("*.yaml"))],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_shipped_file_loads_under_its_folders_name(path):
    label = path.parent.name
    if label == "LoRA" and not knows("LoRA", "lora_type"):
        with pytest.raises(ValueError, match="knows adalora only"):
            bridge.load_method(label, path)
        return
    if label in RECENT and bridge.is_legacy():
        with pytest.raises(ValueError, match=f"{label}' is unknown to this EasyEdit"):
            bridge.load_method(label, path)
        return
    hparams = bridge.load_method(label, path)
    assert hparams.alg_name == bridge.traits_of(label).alg_name
    assert hparams.alg_name in module("util.alg_dict").ALG_DICT
    for field in dataclasses.fields(hparams):  # YAML reads 5e-4 as a text
        if field.type in (int, float, "int", "float") and field.name != "device":
            assert not isinstance(getattr(hparams, field.name), str), field.name


def test_every_method_has_the_same_models():
    """A study of all methods on one model needs a file of each."""
    models = {folder.name: {path.stem for path in folder.glob("*.yaml")} for folder in METHOD_FOLDERS}
    assert set(models) == {*LABELS, *RECENT}
    assert all({"smollm2-135m", "llama2-7b-chat", "gpt-j-6B"} <= found for found in models.values())
