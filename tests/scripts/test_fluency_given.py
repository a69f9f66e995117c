"""scripts/fluency_given.py: texts after the prompt, and after the prompt and the new answer, over the same records."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("fluency_given")


def test_the_answer_is_given_after_the_prompt(script, monkeypatch):
    asked = []

    def fluency(model, tokenizer, prompt, texts, seed) -> float:
        asked.append((prompt, texts, seed))
        return 500.0 + len(prompt)

    monkeypatch.setattr(script, "fluency", fluency)
    facts = [("Rome lies in", "Spain"), ("Ada spoke", "Ido")]
    requests = [{"index": i, "prompt": prompt, "target_new": new} for i, (prompt, new) in enumerate(facts)]
    plain, given, difference = script.compared(None, None, requests, 8, 42)
    assert asked == [(text, 8, 42) for prompt, new in facts for text in (prompt, f"{prompt} {new}")]
    assert (plain.mean, given.mean, difference.mean) == (510.5, 515.5, 5.0) and difference.records == 2


def test_texts_that_repeat_have_less_of_it(script, monkeypatch):
    """Through EasyEdit's own generator and entropy, which are called as they are."""
    calls = []

    class Module:
        @staticmethod
        def generate_fast(model, tokenizer, prompts, n_gen_per_prompt, max_out_len):
            calls.append((prompts, n_gen_per_prompt, max_out_len))
            return ["a a a", "a b c"]

        @staticmethod
        def n_gram_entropy(texts):
            return len(set(texts[0].split())) / 2

    monkeypatch.setattr(script, "module", lambda name: Module)
    assert script.fluency(None, None, "Rome lies in", 2, 42) == 100.0  # mean of 50 and 150
    assert calls == [(["Rome lies in"], 2, 100)]


def test_nothing_to_ask(script):
    with pytest.raises(SystemExit, match="no record can be asked"):
        script.compared(None, None, [], 8, 42)
