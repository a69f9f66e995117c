"""The table of methods: every trait of every method, as literals, and no list of methods in another module."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import kne_easyedit
from kne_easyedit.bridge import memory_formulas as formulas
from kne_easyedit.bridge.methods import LABELS, METHODS, Method, traits_of

pytestmark = pytest.mark.unit
PACKAGE = Path(kne_easyedit.__file__).parent

ALL = [
    "KNE",
    "FT",
    "FT-M",
    "FT-L",
    "LoRA",
    "AdaLoRA",
    "KN",
    "ROME",
    "MEMIT",
    "AlphaEdit",
    "CORE",
    "DEFER",
    "DINM",
    "DPO",
    "DeepEdit-Api",
    "EAMET",
    "EMMET",
    "FT-Api",
    "GRACE",
    "ICE",
    "IKE",
    "MELO",
    "MEMIT-FE",
    "MEND",
    "PMET",
    "QLoRA",
    "R-ROME",
    "SERAC",
    "SPHERE",
    "SimIE",
    "ULTRAEDIT",
    "WISE",
]
RIGHT_PADDED = ("ROME", "MEMIT", "EMMET", "EAMET", "R-ROME", "AlphaEdit", "CORE", "SPHERE")
BY_SUBJECT = (*RIGHT_PADDED, "MEMIT-FE", "PMET", "DeepEdit-Api")
FT, LORA = ("FT", "FT-M", "FT-L"), ("LoRA", "AdaLoRA")
EXPECTED: dict[str, dict[str, object]] = {
    "alg_name": {"FT-M": "FT", "FT-L": "FT", "AdaLoRA": "LoRA"},
    "settings": {
        "FT-M": {"objective_optimization": "target_new"},
        "FT-L": {"objective_optimization": "prompt_last"},
        "LoRA": {"lora_type": "lora"},
        "AdaLoRA": {"lora_type": "adalora"},
    },
    "settings_of_2023": {
        **{label: {"objective_optimization": "prompt_last"} for label in FT},
        **{label: {"lora_type": "adalora"} for label in LORA},
    },
    "padding_side": dict.fromkeys(RIGHT_PADDED, "right"),
    "needs_subject": dict.fromkeys(BY_SUBJECT, True),
    "request_field": {"DPO": "target_neg", "WISE": "loc_prompt"},
    "needs_ground_truth": {"KN": True},
    "one_fact": {"KN": True, "GRACE": True},
    "accumulates": {"AlphaEdit": True, "SPHERE": True},
    "restarts_in_2023": dict.fromkeys(LORA, True),
    "irreversible": {
        "IKE": "edits prompts, not weights",
        "ICE": "edits prompts, not weights",
        "FT-Api": "edits a model behind an API, not this one",
        "DeepEdit-Api": "edits a model behind an API, not this one",
        "MELO": "puts the model into a wrapper of its own and gives nothing by which that could be undone",
        "SERAC": "keeps edits in a memory beside the model and gives nothing by which they could be taken out",
        "ULTRAEDIT": "gives no original weights (it looks for its modules' names among those of parameters)",
        "SimIE": "starts every edit from the first weights that it has seen, so that undoing one does not end "
        "its effect",
        "DINM": "edits by safety records, which have a general knowledge constraint",
        "DEFER": "gives a model that cannot answer several prompts at once, as the evaluation asks them",
    },
    "in_context": {"IKE": True, "ICE": True},
    "originals_if_asked": {"EMMET": True, "DINM": True},
    "replaces_layer": {"GRACE": True, "WISE": True},
    "packages": {
        "IKE": (("models.ike.ike_main", "SentenceTransformer"),),
    },
    "model_names": {"SPHERE": ("llama", "gpt2-xl")},
    "trained_editor": {"MEND": True},
    "own_type": {"QLoRA": True, "MEND": True},
    "one_text": {"GRACE": True, "WISE": True},
    "own_evaluation": {"IKE": True},
    "moments_setting": {"ROME": "mom2_adjustment", "R-ROME": "mom2_adjustment"},
    "memory": {
        **dict.fromkeys(FT, formulas.ft),
        **dict.fromkeys(LORA, formulas.lora),
        "ROME": formulas.rome,
        "R-ROME": formulas.rome,
        "MEMIT": formulas.memit,
        "EMMET": formulas.memit,
        "AlphaEdit": formulas.alphaedit,
        "WISE": formulas.wise,
        "GRACE": formulas.grace,
        "KN": formulas.nothing,
    },
    "texts_at_once": {"MEMIT": 7, "EMMET": 7, "AlphaEdit": 7, "WISE": 12},
    "edits": {**dict.fromkeys(FT, "parameters"), **dict.fromkeys(LORA, "adapter")},
    "only_modules": dict.fromkeys(FT, ("rewrite_module_tmp",)),
    "unused_modules": dict.fromkeys(RIGHT_PADDED, ("attn_module_tmp",)),
}
"""Trait -> the methods that have another value than the default."""


@pytest.mark.parametrize("trait", [field.name for field in dataclasses.fields(Method)])
def test_each_trait_of_each_method(trait):
    if trait == "label":
        assert {label: method.label for label, method in METHODS.items()} == {label: label for label in ALL}
        return
    expected = EXPECTED[trait]
    assert set(expected) < set(ALL)
    default = getattr(Method("x"), trait)
    for label in ALL:
        assert getattr(METHODS[label], trait) == expected.get(label, label if trait == "alg_name" else default), label


@pytest.mark.parametrize(
    ("method", "read", "not_read"),
    [
        ("FT", ["rewrite_module_tmp"], ["layer_module_tmp", "attn_module_tmp", "lm_head_module"]),
        ("ROME", ["rewrite_module_tmp", "mlp_module_tmp", "ln_f_module"], ["attn_module_tmp", "layers"]),
        ("KN", ["attn_module_tmp", "layer_module_tmp", "lm_head_module"], ["model_name", "p"]),
        ("Unheard-Of", ["attn_module_tmp", "ln_f_module"], ["target_modules"]),
    ],
)
def test_the_module_settings_that_a_method_reads(method, read, not_read):
    traits = traits_of(method)
    assert all(map(traits.reads_module, read))
    assert not any(map(traits.reads_module, not_read))


def test_a_method_that_the_table_does_not_contain_has_the_defaults():
    assert traits_of("Unheard-Of") == Method("Unheard-Of")
    assert Method("Unheard-Of").alg_name == "Unheard-Of"
    assert traits_of("Unheard-Of") != Method("Unheard-Of", one_fact=True)


def test_the_labels_of_variants():
    assert list(LABELS) == ["FT-M", "FT-L", "LoRA", "AdaLoRA"]


EXCEPTIONS = {
    "cli/demo.py": {"FT"},  # the two methods of `kne demo`
}
"""Method names that a module may contain: a choice of methods, no trait of one."""


def names_in(source: str) -> set[str]:
    """String constants that are a method's name. KNE, this package's own method, is not looked for."""
    constants = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)}
    return constants & set(METHODS) - {"KNE"}


def test_no_other_module_names_methods():
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "bridge/methods.py" and (names := names_in(path.read_text(encoding="utf-8")))
    }
    assert found == EXCEPTIONS


def test_a_list_of_methods_is_found():
    assert names_in('BATCHED = ("ROME", "MEMIT", "KNE")\ndef f(x):\n    """FT"""\n    return x == "no method"\n') == {
        "ROME",
        "MEMIT",
        "FT",
    }
