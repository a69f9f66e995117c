"""Settings of several methods that cannot serve one run are refused, by field and method."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import tiny_hparams

from kne_easyedit.bridge.together import require_together


def methods(**kinds: str | None) -> dict:
    """KNE's and EasyEdit's hyperparameters, each with its ``evaluation_type``."""
    found = {}
    for name, kind in kinds.items():
        found[name] = tiny_hparams() if name == "KNE" else SimpleNamespace(alg_name=name)
        if kind is not None:
            found[name].evaluation_type = kind
    return found


def test_figures_of_one_kind_are_compared():
    for kinds in ({"KNE": None, "FT": None}, {"KNE": "generate-text", "FT": "generate-text"}, {"FT": "LLM-judge"}):
        require_together(methods(**kinds), "single", False)


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        (
            {"KNE": "generate-text", "FT": None},
            "evaluation_type: KNE: generate-text, FT: none, teacher-forced; one run",
        ),
        ({"KNE": None, "FT": "LLM-judge"}, "evaluation_type: KNE: none, teacher-forced, FT: LLM-judge; one run"),
        ({"FT": "generate_text"}, "FT: evaluation_type: 'generate_text' must be .*; did you mean 'generate-text'"),
    ],
)
def test_figures_of_two_kinds_are_not(kinds, says):
    with pytest.raises(ValueError, match=says):
        require_together(methods(**kinds), "single", False)


def test_knes_own_settings_refuse_an_unknown_kind():
    """EasyEdit takes it for teacher-forced figures."""
    hparams = tiny_hparams()
    hparams.evaluation_type = "generate_text"
    with pytest.raises(ValueError, match="evaluation_type: 'generate_text' must be one of"):
        hparams.validate()
