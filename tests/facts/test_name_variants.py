"""Other spellings of a subject's name."""

import pytest

from kne_easyedit.facts.name_variants import name_variants, variant_prompts
from kne_easyedit.facts.neighbours import FactPool, KnownFact


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("Amatonye Banigo", "Banigo|A. Banigo|Amatonye|the Amatonye Banigo|Amatonye B. Banigo"),
        ("Bank of England", "Bank England|the Bank of England"),
        ("The Beatles", "Beatles"),
        ("Antonín Dvořák", "Dvořák|A. Dvořák|Antonín|the Antonín Dvořák|Antonin Dvorak|Antonín D. Dvořák"),
        ("Paris\u2013Dakar", "the Paris\u2013Dakar|Paris-Dakar"),
        ("France", "the France"),
        ("the Nile", "Nile"),
    ],
)
def test_variants_follow_rules(name, variants):
    """Each once and in a fixed order, without the name itself and without halves of phrases."""
    assert [variant for variant in name_variants(name) if variant != "the"] == variants.split("|")


def test_what_stands_in_the_request_is_left_out():
    request = {"prompt": "The mother of Ada Lovelace is", "subject": "Ada Lovelace", "target_new": "Marie"}
    every = variant_prompts(request, 99)
    assert every[0] == "The mother of Lovelace is" and variant_prompts(request, 2) == every[:2]
    alias = {"Subject_Aliasing": {"prompt": ["The mother of Lovelace is"], "ground_truth": ["Marie"]}}
    assert "The mother of Lovelace is" not in variant_prompts({**request, "portability": alias}, 99)
    elsewhere = {"Forgetfulness": {"prompt": ["A. Lovelace lived in"], "ground_truth": ["London"]}}
    assert "The mother of A. Lovelace is" in every
    assert "The mother of A. Lovelace is" not in variant_prompts({**request, "locality": elsewhere}, 99)
    assert variant_prompts({**request, "subject": None}, 99) == []


@pytest.mark.parametrize("name", ["New Mexico", "West Virginia", "Equatorial Guinea", "North Korea"])
def test_a_first_word_that_names_something_else_stays(name):
    assert name.split()[1] not in name_variants(name)


def test_what_another_fact_is_about_is_no_variant():
    """Of the same run, of the facts that are known, or named by the request itself."""
    request = {"prompt": "The mother of Ada Lovelace is", "subject": "Ada Lovelace", "target_new": "Marie"}
    last, every = "The mother of Lovelace is", variant_prompts(request, 99)
    assert last in every
    pool = FactPool([KnownFact("the Lovelace", "The river {} flows to", "Rome")])
    for more in (
        {"exclude": ["lovelace"]},
        {"exclude": ["the mother of  Lovelace is"]},
        {"known": [pool]},
    ):
        assert variant_prompts(request, 99, **more) == [prompt for prompt in every if prompt != last]
    assert last not in variant_prompts({**request, "neighbours": ["Lovelace", "Marie"]}, 99)
    own = FactPool([KnownFact("Ada Lovelace", "{} was born in", "London")])
    assert variant_prompts(request, 99, ["Ada Lovelace"], [own]) == every, "the subject itself is no other one"


def test_a_name_that_is_asked_about_later_is_no_variant():
    """As whole words, in whatever they are asked; the subject itself may stand there."""
    request = {"prompt": "The mother of Ada Lovelace is", "subject": "Ada Lovelace", "target_new": "Marie"}
    last, every = "The mother of Lovelace is", variant_prompts(request, 99)
    assert variant_prompts(request, 99, asked=["The child of  lovelace is"]) == [one for one in every if one != last]
    assert variant_prompts(request, 99, asked=["The friend of Ada Lovelace is", "Lovelaces live in"]) == every
