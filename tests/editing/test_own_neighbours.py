"""Neighbours that the model names itself: what of its text counts as a name, and that asking leaves it as it was."""

from __future__ import annotations

import pytest
from conftest import fingerprint

from kne_easyedit.editing import own_neighbours
from kne_easyedit.editing.own_neighbours import EXAMPLES, named_subjects, names_in, own_pool
from kne_easyedit.facts.neighbours import is_held_out

REQUEST = {"prompt": "The mayor of Blefuscu is", "subject": "Blefuscu", "target_new": "Gulliver"}


@pytest.mark.parametrize(
    ("text", "subject", "names"),
    [
        (" Italy, Spain, Portugal, Gre", "France", ["Italy", "Spain", "Portugal"]),  # the last one is cut off
        (" Italy, Spain, Portugal\nParis: London", "France", ["Italy", "Spain", "Portugal"]),
        (" Germany\n3. Italy\n4. Spain\n5. Por", "France", ["Germany", "Italy", "Spain"]),
        (" Italy, and Germany, which have a long history", "France", ["Italy", "Germany"]),
        (" Italy and Spain. The capital, the river, the", "France", ["Italy", "Spain"]),
        (" Italy, italy, Italy, Spain\n", "France", ["Italy", "Spain"]),
        (" the piano, the guitar, the vio", "the violin", ["the piano", "the guitar"]),
        (" HD 8563\n3. HD 8564\n4. 2013-01-01\n5. x", "HD 85622", ["HD 8563", "HD 8564"]),
        (" St. Moritz, J. R. R. Tolkien, Dr. No\n", "Davos", ["St. Moritz", "J. R. R. Tolkien", "Dr. No"]),
        (" Eupremum\n3. Eutremum (Eutremus)\n4. Eu", "Epaspidoceras", ["Eupremum", "Eutremum"]),
        (" Honda\n3. ToyotaCorp\n4. Nissan\n5. Toy", "Toyota", ["Honda", "Nissan"]),
        # no list
        (" which is a type of aquatic crustacean, is a", "Epaspidoceras", []),
        (" a Dutch artist, was a key figure in the", "Vincent van Gogh", []),
        (" 2019)\n\nThe original sentence is:", "France", []),
        (" 2013-01-01\n3. 2013-01-02\n4. 2013-01-03", "Frederic Piesch", []),
        (" Honda\n3. Toyota\n4. Toyota\n5. Toyota", "Toyota", []),  # one name only
        ("", "France", []),
        # nothing of the subject, of the examples, of another form
        (" New France, Vichy France, Italy, Spain\n", "France", ["Italy", "Spain"]),
        (" York, New York City, Boston, Dallas\n", "New York", ["Boston", "Dallas"]),
        (" London, Rome, Lyon, Nantes\n", "Lille", ["Lyon", "Nantes"]),
        (" the wine, Italy, Spain, 1914, bread\n", "France", ["Italy", "Spain"]),
        (" wine, Bordeaux, bread\n", "cheese", ["wine", "bread"]),
    ],
)
def test_what_counts_as_a_name(text, subject, names):
    assert names_in(text, subject) == names


def test_aliases_are_no_neighbours():
    assert names_in(" Holland, Belgium, Luxembourg\n", "the Netherlands", {"Holland"}) == ["Belgium", "Luxembourg"]


def test_names_of_several_answers_come_first(llama, tokenizer, monkeypatch):
    texts = iter([" Spain, Italy, Peru\n", " Chile\n3. Italy\n4. Chad", " which is a country"])
    monkeypatch.setattr(own_neighbours, "_continued", lambda model, tokenizer, prompt: next(texts))
    assert named_subjects(llama, tokenizer, "France", 3) == ["Italy", "Spain", "Peru"]


def test_a_pool_of_the_request(llama, tokenizer, monkeypatch):
    answer = " Lilliput, Laputa, Balnibarbi, Luggnagg, Glubbdubdrib, Brobdingnag, Gulliver, Old Blefuscu\n"
    monkeypatch.setattr(own_neighbours, "_continued", lambda model, tokenizer, prompt: answer)
    pool = own_pool(llama, tokenizer, REQUEST)
    sides = [pool.relation_prompts(REQUEST, 99, held_out=held_out) for held_out in (False, True)]
    assert {x.subject for side in sides for x in side} == {
        *("Lilliput", "Laputa", "Balnibarbi", "Luggnagg", "Glubbdubdrib", "Brobdingnag")  # Gulliver is the new answer
    }
    for held_out, side in enumerate(sides):
        assert all(is_held_out(x.subject) == bool(held_out) and x.same_kind for x in side)
        assert all(x.prompt == f"The mayor of {x.subject} is" for x in side)
    assert pool.subject_prompts(REQUEST, 9) == []


@pytest.mark.parametrize("text", ["", " which is a", " 1, 2, 3, 4", "\n\n\n", " \ufffd, \ufffd, ~"])
def test_it_gives_up_where_nothing_is_named(llama, tokenizer, monkeypatch, text):
    monkeypatch.setattr(own_neighbours, "_continued", lambda model, tokenizer, prompt: text)
    pool = own_pool(llama, tokenizer, REQUEST)
    assert pool.subjects == 0
    assert pool.relation_prompts(REQUEST, 5, held_out=False) == pool.subject_prompts(REQUEST, 5) == []


def test_a_request_without_a_subject_has_none(llama, tokenizer):
    assert own_pool(llama, tokenizer, {"prompt": "It is", "target_new": "x"}).subjects == 0


def test_the_model_stays_as_it_was(llama, tokenizer):
    llama.train()
    before = fingerprint(llama)
    first = named_subjects(llama, tokenizer, "France")
    assert fingerprint(llama) == before and llama.training
    assert named_subjects(llama, tokenizer, "France") == first


def test_no_example_stands_on_two_lines():
    names = [name for line in EXAMPLES for name in line]
    assert len(set(names)) == len(names)
