"""What the tests of editing share: requests, and hand-made ensembles and edits of the tiny models."""

from __future__ import annotations

import torch
from conftest import LLAMA_DOWN, ONE_TOKEN, SIZE, SPELLED, THREE_TOKENS

from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.editing.row_edit import RowEdit
from kne_easyedit.facts.encoding import encode
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.base import base_of
from kne_easyedit.models.targets import rows as weight_rows

ROWS = {0: (2, 3, 11), 2: (0,), 3: (5, 23)}
"""Several layers, of different numbers of neurons; the last row of a matrix is among them."""

MANY = {layer: tuple(range(0, SIZE["hidden"], 2)) for layer in range(SIZE["layers"])}
"""Enough to learn any fact."""


def ensemble_of(*templates, rows=ROWS, width=None):
    widths = {t: width or (SIZE["inner"] if t.endswith(("up_proj", "fc_in")) else SIZE["hidden"]) for t in templates}
    return NeuronEnsemble(dict.fromkeys(templates, rows), widths)


def masks_of(model, ensemble, transposed=False):
    """Parameter name -> (mask of the chosen entries, number of neurons), without the package's help."""
    masks = {}
    for template, layers in ensemble.neurons.items():
        for layer, rows in layers.items():
            name = f"{template.format(layer)}.weight"
            mask = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
            (mask.t() if transposed else mask)[list(rows)] = True
            masks[name] = mask, len(rows)
    return masks


def full_deltas(model, edit, transposed=False):
    """The edit's rows scattered into matrices of the weights' shapes."""
    full = {}
    for name, (rows, delta) in edit.deltas.items():
        matrix = torch.zeros_like(model.get_parameter(f"{name}.weight"), dtype=delta.dtype, requires_grad=False)
        (matrix.t() if transposed else matrix)[list(rows)] = delta
        full[f"{name}.weight"] = matrix
    return full


def edit_of(model, template=LLAMA_DOWN, rows=ROWS):
    """A hand-made edit of all the ensemble's rows."""
    generator = torch.Generator().manual_seed(3)
    deltas = {}
    for layer, found in rows.items():
        weight = model.get_submodule(template.format(layer)).weight
        inputs = weight.numel() // SIZE["hidden"]
        deltas[template.format(layer)] = found, torch.randn(len(found), inputs, generator=generator).to(torch.float32)
    return RowEdit(deltas, (1.0, 0.1))


def request(fact=ONE_TOKEN, subject=None, **changes):
    prompt, target = fact
    return {"prompt": prompt, "target_new": target, "ground_truth": None, "subject": subject, **changes}


REQUEST = request(ONE_TOKEN, "France")
REQUESTS = [REQUEST, request(SPELLED, "Ada"), request(THREE_TOKENS, "Rome")]


def predicted(model, tokenizer, one):
    """Teacher-forced: the most probable token at every position that predicts one of the target's."""
    fact = encode(tokenizer, one["prompt"], one["target_new"])
    with torch.no_grad():
        best = model(input_ids=torch.tensor([fact.ids])).logits[0].argmax(-1)
    return best[list(fact.positions)].tolist(), list(fact.answer)


def edited(model, tokenizer, one):
    got, wanted = predicted(model, tokenizer, one)
    return got == wanted


def thing_of(model, seed=0, template=LLAMA_DOWN, layers=(0, 2), rows=(2, 3, 11), scale=0.3, trained_on=()):
    """A hand-made `KNEEdit` of ``model`` as it is: random values in the given rows of some layers."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in layers:
        weight = model.get_submodule(template.format(layer)).weight
        inputs = weight.numel() // weight_rows(model.get_submodule(template.format(layer))).shape[0]
        kind = torch.promote_types(weight.dtype, torch.float32)
        values = scale * torch.randn(len(rows), inputs, generator=generator)
        deltas[template.format(layer)] = tuple(rows), values.to(kind)
    asked = {"prompt": f"The capital of number {seed} is", "target_new": "Rome", "subject": f"number {seed}"}
    return KNEEdit(
        deltas, (1.0, 0.1), requests=(asked,), base=base_of(model, list(deltas)), trained_on=tuple(trained_on)
    )
