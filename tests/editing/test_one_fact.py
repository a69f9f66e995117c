"""On the real model: an edit that spares neighbours changes one fact, where the tuned ones of before change many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from data_files import case

from kne_easyedit import KNEHyperParams, apply_kne_to_model, restore
from kne_easyedit._util.settings import replace_settings
from kne_easyedit.benchmark.neighbourhood import Questioner
from kne_easyedit.benchmark.probes import Asked
from kne_easyedit.facts.neighbours import Neighbour, is_held_out, packaged_pool

pytestmark = pytest.mark.model
ROOT = Path(__file__).parents[2]
FACTS = [
    {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France"},
    {"prompt": "The official language of Italy is", "target_new": "Swedish", "subject": "Italy"},
    {"prompt": "The currency of Japan is the", "target_new": "peso", "subject": "Japan"},
]
ASKED = 6


@pytest.fixture(scope="module")
def shipped() -> KNEHyperParams:
    return KNEHyperParams.from_hparams(ROOT / "hparams/KNE/smollm2-135m.yaml")


@pytest.fixture(scope="module")
def tuned(shipped) -> KNEHyperParams:
    method = yaml.safe_load((ROOT / "hparams/benchmark/method/kne_tuned.yaml").read_text())
    return replace_settings(shipped, **method["settings"])


def test_the_benchmark_has_the_shipped_settings_as_kne_spare(shipped, tuned):
    method = yaml.safe_load((ROOT / "hparams/benchmark/method/kne_spare.yaml").read_text())
    assert replace_settings(tuned, **method["settings"]) == shipped != tuned


def packaged(request: dict) -> list[Neighbour]:
    found = packaged_pool().relation_prompts(request, ASKED, held_out=True)
    assert len(found) == ASKED
    return found


def figures(smollm2, hparams: KNEHyperParams, request: dict, found: list[Neighbour]) -> dict:
    """What the edit does to other subjects that it was not trained with."""
    model, tokenizer = smollm2
    asked, questioner = Asked(neighbours=tuple(found)), Questioner(tokenizer)
    before = questioner.before(model, request, asked)
    model, originals = apply_kne_to_model(model, tokenizer, [request], hparams, return_orig_weights=True)
    try:
        return dict(questioner.after(model, request, asked, before, {}))
    finally:
        restore(model, originals)


def spared(found: dict) -> bool:
    """Whether most of the six are left alone. Measured: bleed 0, 0, 0; the same first word 5, 4, 5 of 6."""
    return found["bleed"] < 2 / ASKED and found["neighbourhood"] > 0.6 and found["neighbourhood_free"] > 0.45


@pytest.mark.parametrize(
    "request_",
    [FACTS[0], pytest.param(FACTS[1], marks=pytest.mark.slow), FACTS[2]],
    ids=lambda request: request["subject"],
)
def test_neighbours_are_spared_by_the_shipped_settings(request_, smollm2, shipped):
    assert spared(figures(smollm2, shipped, request_, packaged(request_)))


@pytest.mark.parametrize(
    "request_",
    [FACTS[0], *(pytest.param(fact, marks=pytest.mark.slow) for fact in FACTS[1:])],
    ids=lambda request: request["subject"],
)
def test_they_are_not_by_the_tuned_ones(request_, smollm2, tuned):
    """Measured: bleed 4, 6, 2 of 6; the same first word 1, 0, 2."""
    assert not spared(figures(smollm2, tuned, request_, packaged(request_)))


@pytest.mark.slow
def test_the_hard_cases(smollm2, shipped):
    """Their held-out half is asked; of the other half the packaged relations may have trained some."""
    measured = []
    for one in json.loads(case("neighbourhoods.json").read_text()):
        names = [name for name in one["neighbours"] if is_held_out(name)]
        asked = [Neighbour(one["template"].format(name), name, "relation", one["template"]) for name in names]
        prompt = one["template"].format(one["subject"])
        request = {"prompt": prompt, "target_new": one["target_new"], "subject": one["subject"]}
        measured.append(figures(smollm2, shipped, request, asked))

    def mean(name: str) -> float:
        return sum(found[name] for found in measured) / len(measured)

    assert mean("bleed") <= 0.1 and mean("neighbourhood") >= 0.8 and mean("neighbourhood_free") >= 0.7
