"""AlphaEdit, EMMET, GRACE and WISE with the shipped settings, fitted to a tiny Llama: edits, sequences, undoing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from conftest import LLAMA_DOWN, failing, fingerprint, make_llama
from methods import HPARAMS, RECENT, SMALL_TEXT, edit_inputs, in_tmp, records, tokenizer_for  # noqa: F401  (a fixture)
from methods import settings as tiny_settings

from kne_easyedit import bridge
from kne_easyedit._util.settings import replace_settings
from kne_easyedit.benchmark.answers import free_answers
from kne_easyedit.benchmark.asking import continuations
from kne_easyedit.bridge import MethodEditor, traits_of
from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.method_editor import is_batchable
from kne_easyedit.bridge.unrelated import LOCALISING, with_unrelated
from kne_easyedit.facts.records import load_requests

MODELS = ("gpt-j-6B", "llama2-7b-chat", "smollm2-135m")


def settings(label: str, **changes):
    """Those of `methods`, under a name that says nothing of the model."""
    try:
        return replace_settings(tiny_settings(label, **changes), model_name="any-name")
    except ValueError as error:
        pytest.skip(str(error))


def editor_of(label: str, model=None, **changes) -> MethodEditor:
    hparams = settings(label, **changes)
    return MethodEditor(hparams, model or make_llama(), tokenizer_for(hparams))


@torch.no_grad()
def logits(editor: MethodEditor, request: dict) -> torch.Tensor:
    """What the model gives at the end of a request's prompt."""
    inputs = editor.tokenizer([request["prompt"]], return_tensors="pt")
    return editor.model(**inputs).logits[0, -1]


@pytest.mark.parametrize("label", RECENT)
@pytest.mark.parametrize("model", MODELS)
def test_there_are_settings_for_every_model(label, model):
    settings(label)
    hparams = bridge.load_method(label, HPARAMS / label / f"{model}.yaml")
    assert hparams.alg_name == label
    entry = yaml.safe_load((HPARAMS / "benchmark" / "method" / f"{label.lower()}.yaml").read_text())
    assert entry == {"label": label, "hparams": label, "settings": {}}


@pytest.mark.parametrize("label", RECENT)
def test_an_edit_works_and_is_undone(label):
    editor = editor_of(label)
    before, fact = fingerprint(editor.original), records()[0]
    unedited = logits(editor, fact)
    editor.apply([fact])
    assert not torch.allclose(logits(editor, fact), unedited, atol=1e-2)
    assert fingerprint(editor.original) != before
    editor.evaluate(fact, generation=True, seed=1)
    editor.undo()
    assert fingerprint(editor.original) == before
    assert torch.equal(logits(editor, fact), unedited)


@pytest.mark.parametrize("label", RECENT)
def test_a_sequence_keeps_its_edits_until_it_is_undone(label):
    editor = editor_of(label)
    before, facts = fingerprint(editor.original), records()
    unedited = [logits(editor, fact) for fact in facts]
    editor.require_sequence()
    editor.apply(facts[2:])
    alone = logits(editor, facts[0])  # with the last edit only
    editor.undo()
    for fact in facts:
        editor.apply([fact])
    kept = [logits(editor, fact) for fact in facts]
    assert not any(torch.allclose(now, was, atol=1e-2) for now, was in zip(kept, unedited))
    assert not torch.allclose(kept[0], alone, atol=1e-2)
    editor.undo()
    assert fingerprint(editor.original) == before


@pytest.mark.parametrize(("label", "kind"), [("GRACE", "models.grace.GRACE"), ("WISE", "models.wise.WISE")])
@pytest.mark.parametrize("earlier", [0, 1])
def test_an_edit_that_is_interrupted_leaves_no_layer_behind(label, kind, earlier, monkeypatch):
    editor = editor_of(label)
    before = fingerprint(editor.original)
    for fact in records()[:earlier]:
        editor.apply([fact])
    monkeypatch.setattr(getattr(module(kind), label), "edit", failing(None, 1, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        editor.apply(records()[1:2])
    assert fingerprint(editor.original) == before
    own = bridge.editor_for(settings(label), make_llama(), editor.tokenizer)
    before = fingerprint(own.model)
    monkeypatch.setattr(getattr(module(kind), label), "edit", failing(None, 1, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        own.edit(**edit_inputs(records()[:1]), loc_prompts=["The river"])
    assert fingerprint(own.model) == before


@pytest.mark.parametrize("label", RECENT)
def test_several_facts_at_once_where_easyedit_can(label):
    editor = editor_of(label)
    if not is_batchable(editor.hparams.alg_name):
        with pytest.raises(ValueError, match=f"batch_size: {label} edits one fact at a time"):
            editor.require_batch(3)
        return
    editor.require_batch(3)
    before = fingerprint(editor.original)
    editor.apply(records())
    assert fingerprint(editor.original) != before
    editor.undo()
    assert fingerprint(editor.original) == before


@pytest.mark.parametrize("label", RECENT)
def test_an_edit_does_not_depend_on_those_that_were_undone(label):
    """Nor on the state of numpy's generator: WISE's mask is drawn from it."""
    found = []
    for first in ([], records()[1:]):
        editor = editor_of(label)
        for fact in first:
            editor.apply([fact])
            editor.undo()
        torch.manual_seed(3)
        editor.apply(records()[:1])
        found.append(logits(editor, records()[0]))
        editor.undo()
        assert not torch.equal(logits(editor, records()[0]), found[-1])
    assert torch.equal(*found)


def test_the_memory_of_each_is_counted():
    model, bytes_ = make_llama(), 4
    matrix, square = 24 * 40, 40 * 40
    needed = {label: traits_of(label).memory(model, settings(label), bytes_) for label in RECENT}
    assert (
        needed["AlphaEdit"]["second moments"] == 3 * 4 * 2 * square and needed["EMMET"]["second moments"] == 4 * square
    )
    assert needed["GRACE"] == {"originals": bytes_ * matrix}
    assert needed["WISE"]["copies"] == 4 * bytes_ * matrix
    with pytest.raises(ValueError, match=r"inner_params: .*no_such"):
        traits_of("WISE").memory(model, settings("WISE", inner_params=["model.no_such[1].mlp.weight"]), bytes_)


# AlphaEdit

SMALL = 1.0
"""Of the tiny model's second moments, some are less and some are more."""


def alphaedit(model, **changes):
    editor = editor_of("AlphaEdit", model, **changes)
    editor.apply(records()[:1])
    return [model.get_submodule(LLAMA_DOWN.format(layer)).weight.detach().clone() for layer in (1, 2)]


def test_projections_are_those_of_easyedit():
    """Its own for a name that has ``llama``, singular vectors of the moments, from the file that it would write."""
    model = make_llama()
    editor = editor_of("AlphaEdit", model, nullspace_threshold=SMALL)
    main = module("models.alphaedit.AlphaEdit_main")
    editor.apply(records()[:1])
    ours = main.P
    with bridge.use_text_source(SMALL_TEXT):
        theirs = torch.stack(
            [main.get_project(make_llama(), editor.tokenizer, layer, editor.hparams) for layer in (1, 2)]
        )
    rank = ours.diagonal(dim1=1, dim2=2).sum(1)
    assert torch.all(rank > 0.5) and torch.all(rank < ours.shape[1] - 0.5), "some directions are kept, others not"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert not Path("null_space_project.pt").exists()


def test_projections_of_another_model_are_not_used():
    first = alphaedit(make_llama(seed=10), nullspace_threshold=SMALL)
    alphaedit(make_llama(seed=11), nullspace_threshold=SMALL)
    again = alphaedit(make_llama(seed=10), nullspace_threshold=SMALL)
    assert all(map(torch.equal, first, again))
    others = alphaedit(make_llama(seed=10), nullspace_threshold=1e9)
    assert not any(map(torch.equal, first, others))


def test_a_file_of_projections_is_never_read():
    """It is a pickle, and says nothing of the model that it was made of."""
    plain = alphaedit(make_llama())
    torch.save(torch.zeros(2, 40, 40), "mine.pt")
    assert all(map(torch.equal, alphaedit(make_llama(), P_loc="mine.pt"), plain))
    Path("mine.pt").write_bytes(b"no pickle at all")
    assert all(map(torch.equal, alphaedit(make_llama(), P_loc="mine.pt"), plain))


def test_keys_of_earlier_edits_count_while_these_stay():
    editor = editor_of("AlphaEdit")
    main = module("models.alphaedit.AlphaEdit_main")
    editor.apply(records()[:1])
    one = main.cache_c.clone()
    editor.apply(records()[1:2])
    two = main.cache_c.clone()
    editor.undo()
    # One that fails between two that stay.
    editor.keeps_earlier_edits = True
    editor.apply(records()[:1])
    with pytest.raises(AssertionError):
        editor.apply([{**records()[2], "subject": "Nowhere"}])
    editor.apply(records()[1:2])
    assert torch.equal(main.cache_c, two)
    editor.undo()
    editor.apply(records()[:1])
    assert torch.equal(main.cache_c, one) and not torch.allclose(two, one)
    # EasyEdit's own editor says nothing of what it has undone.
    own = bridge.editor_for(settings("AlphaEdit"), make_llama(), editor.tokenizer)
    own.edit(**edit_inputs(records()[1:]))
    own.edit(**edit_inputs(records()[:1]))
    assert torch.equal(main.cache_c, one)


# GRACE


def test_a_codebook_answers_at_the_end_of_its_prompt():
    """Whatever prompt was asked before, teacher-forced, alone and beside others, and in free text."""
    editor, (fact, other, _) = editor_of("GRACE"), records()
    long = {**other, "prompt": "What is the name of the river that flows through the mother city of France ?"}
    unedited = editor.evaluate(long, generation=False, seed=1)
    editor.apply([fact])
    for asked in (long, fact, long, fact):
        found = editor.evaluate(asked, generation=False, seed=1)
        if asked is fact:
            assert found["rewrite_acc"] == [1.0]
        else:
            assert found["rewrite_acc"] == unedited["rewrite_acc"]
            assert found["locality"] == unedited["locality"]
    assert free_answers(editor.model, editor.tokenizer, fact).beginning.strip().startswith("Rome")
    both = {"prompt": [long["prompt"], fact["prompt"]], "ground_truth": ["Oslo", fact["target_new"]]}
    found = editor.evaluate({**fact, "portability": {"Both": both}}, generation=False, seed=1)
    assert found["portability"]["Both_acc"][1] == 1


def test_free_text_of_a_codebook_is_of_the_whole_text():
    """Token by token, from a cache, each new token would itself be looked up, and answered as the prompt was."""
    editor, fact = editor_of("GRACE", n_iter=100, eps=1000.0, edit_lr=0.3), records()[0]  # every text is near enough
    prompt = editor.tokenizer([fact["prompt"]], return_tensors="pt")["input_ids"]

    def said(tokens: int) -> list[int]:
        ids, start = prompt, prompt.shape[1]
        with torch.no_grad(), bridge.at_position(editor.model, start - 1):
            for _ in range(tokens):
                ids = torch.cat([ids, editor.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        return ids[0, start:].tolist()

    editor.apply([fact])
    answer = editor.tokenizer.decode(said(2))  # the model's own continuation of the new answer: two tokens are learnt
    editor.undo()
    editor.apply([{**fact, "target_new": answer}])
    beside = ["The river that flows through the mother city of France is"]
    found = continuations(editor.model, editor.tokenizer, [fact["prompt"], *beside], 4)
    assert found[0] == said(4) and len({*found[0]}) > 1
    assert found[1] == continuations(editor.model, editor.tokenizer, beside, 4)[0]  # asked one by one


def test_figures_of_a_codebook_are_those_of_other_methods_before_the_edit():
    """Not those of generated tokens: so evaluations of the unedited model are shared."""
    grace, ft = editor_of("GRACE"), bridge.load_method("FT", HPARAMS / "FT" / "smollm2-135m.yaml")
    plain = MethodEditor(replace_settings(ft, model_name="any-name", layers=[2]), make_llama(), tokenizer_for(ft))
    found = [editor.evaluate(records()[0], generation=True, seed=1) for editor in (grace, plain)]
    assert found[0]["locality"] == found[1]["locality"] and found[0]["fluency"] == found[1]["fluency"]


# WISE


def test_templates_are_of_the_model_and_of_no_earlier_draw():
    """Also of a model that samples by its own settings."""
    model, found = make_llama(), []
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.6
    editor = editor_of("WISE", model, n_iter=1)
    for _ in range(2):
        torch.manual_seed(42)
        editor.apply(records()[:1])
        layer = model.get_submodule(LLAMA_DOWN.format(2))
        found.append([value.clone() for value in (layer.new_weight, layer.weight_mask)])
        editor.undo()
    assert all(torch.equal(one, other) for one, other in zip(*found))
    templates = list(module("models.wise.utils").CONTEXT_TEMPLATES_CACHE)
    editor_of("WISE", make_llama(seed=5), n_iter=1).apply(records()[:1])
    assert templates != module("models.wise.utils").CONTEXT_TEMPLATES_CACHE


def test_each_prompt_of_a_batch_gets_its_own_weights():
    editor = editor_of("WISE")
    editor.apply(records()[:1])
    prompts = ["The capital of France is", "What is the name of"]
    tokens = [editor.tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    assert tokens[0].shape == tokens[1].shape
    (layer,) = [part for part in editor.model.modules() if type(part).__name__ == "WISEAdapter"]

    @torch.no_grad()
    def asked(ids: torch.Tensor, threshold: float) -> torch.Tensor:
        editor.hparams.act_ratio, layer.editing_mean_act.min_a = 1.0, threshold
        return editor.model(input_ids=ids).logits

    usual = layer.editing_mean_act.min_a
    edited, plain = ([asked(ids, threshold)[0] for ids in tokens] for threshold in (0.0, 1e9))
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(edited, plain))
    for threshold in torch.linspace(0, 2 * usual, 200).tolist():  # one between the two prompts' distances
        alone = [asked(ids, threshold)[0] for ids in tokens]
        inside = [torch.equal(now, its) for now, its in zip(alone, edited)]
        if inside[0] != inside[1]:
            break
    assert inside[0] != inside[1]
    together = asked(torch.cat(tokens), threshold)
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-4)


def test_an_unrelated_text_is_given_where_a_request_has_none():
    fact = records()[0]
    given = with_unrelated("WISE", fact)
    facts = load_requests("embedded", LOCALISING)
    (source,) = [f for f in facts if given["loc_prompt"].startswith(f["prompt"])]
    assert given["loc_prompt"] == f"{source['prompt']} {source['ground_truth']}"
    assert given == with_unrelated("WISE", dict(fact)) == {**fact, "loc_prompt": given["loc_prompt"]}
    asked = {**fact, "locality": {"Other": {"prompt": [f"{source['subject']} is"], "ground_truth": ["old"]}}}
    assert source["subject"] not in with_unrelated("WISE", asked)["loc_prompt"]
    assert with_unrelated("WISE", {**fact, "loc_prompt": "mine"})["loc_prompt"] == "mine"
    assert with_unrelated("FT", fact) == fact
    chosen = {with_unrelated("WISE", {**fact, "prompt": f"The capital of France {i}"})["loc_prompt"] for i in range(40)}
    assert len(chosen) > 5
