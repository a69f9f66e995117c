"""The packaged relations, and how a fact of one's own finds its neighbours among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from data_files import case as case_file

from kne_easyedit.facts.neighbours import is_held_out, packaged_pool, prompts_of
from kne_easyedit.facts.templates import content_words, fill, template_key

FILE = Path(__file__).resolve().parents[2] / "kne_easyedit" / "facts" / "relations.json"


def without_repetitions(pairs: list[tuple[str, object]]) -> dict:
    assert not [name for name, number in Counter(name for name, _ in pairs).items() if number > 1]
    return dict(pairs)


RELATIONS = json.loads(FILE.read_text(encoding="utf-8"), object_pairs_hook=without_repetitions)
each_relation = pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)


class TestFile:
    def test_there_are_enough(self):
        assert len(RELATIONS) >= 30
        assert len({relation["kind"] for relation in RELATIONS.values()}) >= 12
        raw = FILE.read_bytes()
        assert len(raw) < 60_000 and raw.endswith(b"}\n")
        assert max(map(len, raw.decode().splitlines())) <= 200

    @each_relation
    def test_a_relation_has_subjects_to_train_and_to_ask(self, relation):
        assert set(relation) - {"implies"} == {"kind", "templates", "facts"}
        assert len(relation["facts"]) >= 16
        held_out = sum(map(is_held_out, relation["facts"]))
        assert 6 <= held_out <= len(relation["facts"]) - 6

    @each_relation
    def test_texts(self, relation):
        templates, facts = relation["templates"], relation["facts"]
        assert len({template_key(text) for text in templates}) == len(templates) >= 3
        assert any(text.endswith("?") for text in templates) and not all(text.endswith("?") for text in templates)
        for text in templates:
            assert text.count("{}") == 1 and content_words(text), text
        for text in [relation["kind"], *templates, *facts, *facts.values()]:
            assert isinstance(text, str) and text == " ".join(text.split()) and text
        assert len(set(facts.values())) > 2, "an answer that all have is none that can change"
        assert set(relation.get("implies", [])) <= RELATIONS.keys()

    def test_no_subject_is_spelt_in_two_ways(self):
        spellings = {name for relation in RELATIONS.values() for name in relation["facts"]}
        assert len({name.casefold().removeprefix("the ") for name in spellings}) == len(spellings)


def ask(prompt: str, subject: str | None = None, new: str = "Rome", **more: object) -> dict:
    return {"prompt": prompt, "target_new": new, **({"subject": subject} if subject else {}), **more}


def kinds_of(subjects: list[str]) -> set[str]:
    """The kinds that all of them have."""
    found = [{r["kind"].split("/")[0] for r in RELATIONS.values() if name in r["facts"]} for name in subjects]
    return set.intersection(*found) if found else set()


class TestOwnRequests:
    @pytest.mark.parametrize(
        "prompt",
        [
            "The capital of France is",
            "the capital of france is ",
            "Capital of France is the",
            "What's the capital of France?",
            "What is capital of France",
            "The capital city of France is called",
        ],
    )
    def test_a_template_is_known_in_other_spellings_without_a_subject(self, prompt):
        found = packaged_pool().relation_prompts(ask(prompt), 5, held_out=False)
        assert len(found) == 5
        for x in found:
            assert x.answer == RELATIONS["capital"]["facts"][x.subject]
            assert x.prompt.casefold() == prompt.casefold().replace("france", x.subject.casefold())

    @pytest.mark.parametrize(
        ("prompt", "subject", "kind"),
        [
            ("France is famous for its", None, "country"),
            ("The weather in Norway is", None, "country"),
            ("Albert Einstein played the", None, "person"),
            ("Gold melts at", None, "element"),
            ("The Colosseum was built by", None, "landmark"),
            ("The capital of Ruritania is", None, "country"),
            ("The capital of Ruritania is", "Ruritania", "country"),
            ("What is the chemical symbol of unobtainium?", "unobtainium", "element"),
            ("Everybody has read The Hobbit and", None, "book"),
        ],
    )
    def test_kin_where_template_or_subject_is_unknown(self, prompt, subject, kind):
        for held_out in (True, False):
            found = packaged_pool().relation_prompts(ask(prompt, subject), 6, held_out=held_out)
            assert len(found) == 6 and kind in kinds_of([x.subject for x in found])
            assert {is_held_out(x.subject) for x in found} == {held_out}

    @pytest.mark.parametrize(
        "request_",
        [
            ask("The boss of Acme Corp. is", "Acme Corp."),
            ask("The boss of it is"),
            ask("The iron lady was"),  # no element
            ask("My cat is called"),
            ask("The answer is"),
        ],
        ids=lambda request: request["prompt"],
    )
    def test_nothing_where_nothing_fits(self, request_):
        assert packaged_pool().relation_prompts(request_, 5, held_out=False) == []
        assert packaged_pool().subject_prompts(request_, 5) == []

    @pytest.mark.parametrize(
        ("prompt", "subject", "other"),
        [
            ("The capital of the Netherlands is", "Netherlands", "The capital of Spain is"),
            ("The capital of the Netherlands is", "the Netherlands", "The capital of Spain is"),
            ("The Nile flows into the", "The Nile", "The Rhine flows into the"),
            ("The Nile flows into the", "Nile", "The Rhine flows into the"),
            ("We know that the Nile flows", "the Nile", "We know that the Rhine flows"),
            ("The Beatles come from", "The Beatles", "ABBA come from"),
            ("Gold melts at", "Gold", "Silver melts at"),
            ("gold melts at", "gold", "silver melts at"),
        ],
    )
    def test_articles_and_capitals_stay_right(self, prompt, subject, other):
        found = [
            x.prompt
            for held_out in (True, False)
            for x in packaged_pool().relation_prompts(ask(prompt, subject), 99, held_out=held_out)
        ]
        assert other in found
        assert not [text for text in found if "the the" in text.lower()]

    def test_known_answers_that_are_the_new_one_are_left_out(self):
        def countries(new):
            request = ask("The capital of France is", "France", new)
            return {x.subject for h in (True, False) for x in packaged_pool().relation_prompts(request, 99, held_out=h)}

        assert countries("Lima") - countries("Rome") == {"Italy"}
        assert countries("Rome") - countries("Lima") == {"Peru"}

    def test_templates_of_the_subject(self):
        request = ask("The capital of France is", "France", ground_truth="Paris")
        found = packaged_pool().subject_prompts(request, 9)
        assert {"France"} == {x.subject for x in found}
        asked = {name for name, r in RELATIONS.items() for x in found if x.template in r["templates"]}
        # Paris is the largest city, too: what asks for the old answer may ask the same
        assert asked == {"official language", "currency", "continent", "Internet domain"}
        assert all(
            x.answer == r["facts"].get("France")
            for x in found
            for r in RELATIONS.values()
            if x.template in r["templates"]
        )

    def test_what_follows_from_the_fact_is_no_neighbour(self):
        request = ask("The Eiffel Tower is located in the city of", "Eiffel Tower")
        assert packaged_pool().subject_prompts(request, 9) == []
        request = ask("The height of the Eiffel Tower is", "Eiffel Tower")
        assert len(packaged_pool().subject_prompts(request, 9)) == 2

    def test_a_paraphrase_is_no_neighbour(self):
        found = packaged_pool().subject_prompts(ask("Lionel Messi plays the sport of", "Lionel Messi"), 9)
        assert [x.answer for x in found] == ["Argentina"]

    @pytest.mark.parametrize("number", range(4))
    def test_the_hard_set(self, number):
        """Every relation of it is known, and a list's two halves are told apart."""
        case = json.loads(case_file("neighbourhoods.json").read_text(encoding="utf-8"))[number]
        request = ask(fill(case["template"], case["subject"]), case["subject"], case["target_new"])
        pool = packaged_pool()
        train, others = (pool.relation_prompts(request, 99, held_out=held_out) for held_out in (False, True))
        assert len(train) >= 12 and len(others) >= 12
        prompts = {fill(case["template"], name) for name in case["neighbours"] if is_held_out(name)}
        assert len(prompts) >= 5 and not prompts & {x.prompt for x in train}
        assert not set(prompts_of(request)) & {x.prompt for x in (*train, *others)}


def test_the_choice_is_the_same_in_every_process():
    """Sets have another order where texts have another hash."""
    request = {"prompt": "Amazon is known for", "target_new": "x"}
    code = f"""
from kne_easyedit.facts.neighbours import packaged_pool
print(packaged_pool().relation_prompts({request}, 30, held_out=True), packaged_pool().subject_prompts({request}, 9))
"""
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    pool = packaged_pool()
    assert printed == f"{pool.relation_prompts(request, 30, held_out=True)} {pool.subject_prompts(request, 9)}\n"
    assert printed.count("Neighbour(") > 20
