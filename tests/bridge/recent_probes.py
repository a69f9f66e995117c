"""Probes of `test_patch_faults.py`: second moments, and methods that not every version has."""

from __future__ import annotations

import dataclasses

import numpy
import torch
from conftest import LLAMA_DOWN, make_llama, make_tokenizer
from methods import records, settings, tokenizer_for

from kne_easyedit import bridge
from kne_easyedit.bridge.importing import module


def has(label: str) -> bool:
    """Whether this EasyEdit has a method; what it lacks has no faults."""
    bridge.register()
    return label in module("util.alg_dict").ALG_DICT


def layer_editor(label: str, **changes):
    """A method that replaces a layer, on the tiny model: EasyEdit's own object, and the model's tokenizer."""
    hparams, model = settings(label, **changes), make_llama()
    tokenizer, facts = tokenizer_for(hparams), [{**fact, "loc_prompt": "The river"} for fact in records()]
    apply = module("util.alg_dict").ALG_DICT[label]
    return hparams, tokenizer, facts, lambda fact: apply(model, tokenizer, [fact], hparams)[0]


def a_codebook_is_evaluated_as_other_methods() -> bool:
    """The answer is right after the prompt that was edited, once another prompt was asked."""
    if not has("GRACE"):
        return True
    hparams, tokenizer, facts, edit = layer_editor("GRACE")
    edited, evaluate = edit(facts[0]), module("evaluate.evaluate")
    evaluate.F1 = lambda *args, **kwargs: 0.0  # scikit-learn's, which may not be installed
    long = {**facts[1], "prompt": "What is the name of the river that flows through the city of Rome ?"}
    for fact in (long, facts[0]):
        found = evaluate.compute_edit_quality(edited, "any", hparams, tokenizer, fact, "cpu")
    return "rewrite_F1" not in found and found["rewrite_acc"] == [1.0]


def masks_are_seeded() -> bool:
    if not has("WISE"):
        return True
    found = []
    for draws in (1, 2):
        _, _, facts, edit = layer_editor("WISE", n_iter=1)
        torch.manual_seed(1)
        numpy.random.seed(draws)
        found.append(edit(facts[0]).get_adapter_layer().weight_mask)
    return torch.equal(*found)


def fluency_after_a_wrapper() -> str:
    if has("WISE"):
        hparams, tokenizer, facts, edit = layer_editor("WISE", n_iter=1)
        evaluate = module("evaluate").compute_edit_quality
        evaluate(edit(facts[0]), "any", hparams, tokenizer, facts[0], "cpu", test_generation=True)
    return "sampled"


def layers_of_a_sequence() -> int:
    """Edits in the layer after two in a row."""
    if not has("WISE"):
        return 2
    _, _, facts, edit = layer_editor("WISE", n_iter=1)
    return [edit(fact).get_adapter_layer().editing_total_cnt for fact in facts[:2]][-1]


def prompts_decide_alone() -> bool:
    """With a threshold between the two prompts' distances, one of them gets the edited weights, alone or not."""
    if not has("WISE"):
        return True
    hparams, _, facts, edit = layer_editor("WISE")
    layer = edit(facts[0]).get_adapter_layer()
    torch.manual_seed(1)
    x = torch.randn(2, 3, 40) * torch.tensor([1.0, 3.0]).view(2, 1, 1)
    with torch.no_grad():
        distances = sorted(
            float(module("models.wise.WISE").euc(layer.original_layer(row), layer.new_weight_forward(row), hparams))
            for row in x.split(1)
        )
        hparams.act_ratio, layer.editing_mean_act.min_a = 1.0, sum(distances) / 2
        return torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


def projections_of_any_model():
    if not has("AlphaEdit"):
        return "projected"
    hparams = dataclasses.replace(settings("AlphaEdit"), model_name="any-name")
    apply = module("models.alphaedit.AlphaEdit_main").apply_AlphaEdit_to_model
    apply(make_llama(), tokenizer_for(hparams), records()[:1], hparams)
    return "projected"


def needs_no_download():
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Wikipedia")

    module("models.rome.layer_stats").load_dataset = load_dataset
    hparams = settings("MEMIT", layers=[1])
    get_cov = module("models.memit.memit_main").get_cov
    return list(
        get_cov(make_llama(), make_tokenizer(), LLAMA_DOWN.format(1), "wikipedia", 7, "float32", hparams=hparams).shape
    )


def probes_are_read_where_their_answers_are() -> bool:
    """What is predicted for a probe does not depend on a longer one beside it."""
    hparams, model = settings("ROME"), make_llama()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # it says something else at every place
    tokenizer = tokenizer_for(hparams)  # padded at the right
    prompts = ["The capital of France is", "What is the name of the river that flows through Rome and is"]
    answers = ["the Tiber .", "Rome"]
    predict = module("evaluate.evaluate_utils").test_prediction_acc
    together = predict(model, tokenizer, hparams, prompts, answers, "cpu", locality=True)
    alone = [predict(model, tokenizer, hparams, *one, "cpu", locality=True)[0] for one in zip(prompts, answers)]
    return together == alone
