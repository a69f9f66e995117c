"""Templates: prompts without their subject, and subjects in them, whatever characters they have."""

from __future__ import annotations

import pytest

from kne_easyedit.facts.templates import fill, template_of


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        ("The capital of France is", "France", "The capital of {} is"),
        ("Rome, is Rome Rome?", "Rome", "{}, is {} {}?"),
        ("The author of Romeo and Juliet is", "Rome", None),
        ("Is Georg Cantor Georg?", "Georg", "Is {} Cantor {}?"),
        ("The speed of C++ is", "C++", "The speed of {} is"),
        ("Who was (A.*b)?'s mother", "(A.*b)?", "Who was {}'s mother"),
        ("the capital of france is", "France", "the capital of {} is"),
        ("法国的首都是", "法国", "{}的首都是"),
        ("The value of {} for France is", "France", None),
        ("The capital of France is", None, None),
        ("The capital of France is", "Spain", None),
    ],
)
def test_template_of(prompt, subject, template):
    assert template_of({"prompt": prompt, "subject": subject}) == template
    assert template is None or fill(template, subject).casefold() == prompt.casefold()


@pytest.mark.parametrize(
    ("template", "subject", "prompt"),
    [
        ("The {} was built in", "the Louvre", "The Louvre was built in"),
        ("{} lies in", "the Louvre", "The Louvre lies in"),
        ("The home of {} is", "the Louvre", "The home of the Louvre is"),
        ("{} is {}", r"\1 {0}", r"\1 {0} is \1 {0}"),
    ],
)
def test_fill(template, subject, prompt):
    assert fill(template, subject) == prompt
