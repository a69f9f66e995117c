"""Neighbours of an edit: what trains and what is asked never meets, kin come first, nothing of the request is used."""

from __future__ import annotations

import random
import re

import pytest
from data_files import case

from kne_easyedit.facts.neighbours import (
    FactPool,
    Neighbour,
    is_held_out,
    packaged_pool,
    prompts_of,
    run_exclusions,
)
from kne_easyedit.facts.records import load_records, to_request
from kne_easyedit.facts.templates import fill, normalised, stands_in, subject_key

PERSONS = """Ada Byron|Carl Linné|C++ Smith|Dr. (Hon.) Who|Emmy Noether|Georg|Georg Cantor|GEORG CANTOR|Hans Bethe
|Ida Noddack|Jean d'Arc|Kurt Gödel|Lise Meitner|Max [Born]|Niels Bohr|Otto Hahn|Paul Dirac|Sofia Kovalevskaya
|Tycho Brahe|Urbain Le Verrier""".replace("\n", "").split("|")
LANDS = """Chad|Chile|China|Cuba|Fiji|Gabon|Guinea|Equatorial Guinea|Iran|Kenya|Laos|Mali|Nepal|Oman|Peru
|Qatar""".replace("\n", "").split("|")
PERSONS += [f"Person {i}" for i in range(40)]
LANDS += [f"Land {i}" for i in range(40)]
ASKED = {
    "person": [
        "The place of birth of {} is",
        "The occupation of {} is",
        "Did {} say that {} lives?",
        "The spouse of {} is",
    ],
    "land": ["The capital of {} is", "The head of state of {} is", "{} has a coast on", "The anthem of {} is"],
}
SHARED = "The name of the continent {} is associated with is"
ANSWERS = ["Rome", "Rome, Italy", "Oslo", "a poet", "nobody"]


def records(seed: int, number: int = 150) -> list[dict]:
    """Random records of persons and of lands; some have aliases, probes about others, or a subject twice."""
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        kind, names = draw.choice([("person", PERSONS), ("land", LANDS)])
        subject, other = draw.sample(names, 2)
        first, *more = draw.sample(ASKED[kind], 3)  # at least one that tells the kind
        own = draw.choice([first, SHARED])
        record = {
            "prompt": own.replace("{}", subject),
            "subject": subject,
            "target_new": draw.choice(ANSWERS),
            "ground_truth": draw.choice([*ANSWERS, None]),
            "locality": {
                "Relation_Specificity": [
                    {"prompt": more[0].replace("{}", subject), "ground_truth": "Oslo"},
                    {"prompt": own.replace("{}", other), "ground_truth": draw.choice(ANSWERS)},
                ]
            },
            "portability": {
                "Subject_Aliasing": [{"prompt": own.replace("{}", f"Old {subject}"), "ground_truth": "Rome"}],
                "Reasoning": [{"prompt": more[1].replace("{}", draw.choice(names)), "ground_truth": "Oslo"}],
            },
        }
        if draw.random() < 0.5:
            record["rephrase_prompt"] = f"Tell me: {record['prompt']}"
        found.append(to_request({name: value for name, value in record.items() if value is not None}))
    return found


def kind_of(subject: str) -> str:
    return "person" if subject in PERSONS else "land"


@pytest.fixture(scope="module", params=range(3))
def requests(request) -> list[dict]:
    return records(request.param)


class TestTrainingNeverMeetsWhatIsAsked:
    def test_in_any_request_seed_and_order(self, requests):
        trained, asked = set(), set()
        for order in range(3):
            random.Random(order).shuffle(requests)
            pool = FactPool.of_requests(requests)
            for record in requests:
                for seed in range(3):
                    trained |= {x.prompt for x in pool.relation_prompts(record, 6, held_out=False, seed=seed)}
                    asked |= {x.prompt for x in pool.relation_prompts(record, 6, held_out=True, seed=seed)}
        assert trained and asked
        assert not set(map(normalised, trained)) & set(map(normalised, asked))

    def test_held_out_subjects_never_train(self, requests):
        pool = FactPool.of_requests(requests)
        for held_out in (True, False):
            found = [x for record in requests for x in pool.relation_prompts(record, 9, held_out=held_out)]
            assert found and {is_held_out(x.subject) for x in found} == {held_out}

    def test_together_with_prompts_of_the_subject_where_several_are_edited(self, requests):
        """The converse: without the exclusions, one edit's training would be another's question."""
        pool, excluded = FactPool.of_requests(requests), run_exclusions(requests)
        asked, met = {}, set()
        trained = {x.prompt for record in requests for x in pool.subject_prompts(record, 9)}
        for exclude in ((), excluded):
            asked = {x.prompt for r in requests for x in pool.relation_prompts(r, 99, held_out=True, exclude=exclude)}
            met = asked & trained
            assert bool(met) == (exclude == ())
        edited = {normalised(record["prompt"]) for record in requests}
        assert not edited & set(map(normalised, asked))

    def test_about_half_of_the_subjects_are_held_out(self):
        names = [f"subject {i}" for i in range(2000)]
        assert 900 < sum(map(is_held_out, names)) < 1100

    @pytest.mark.parametrize(
        ("one", "other"), [("Paris", "PARIS"), ("New  York", " new york\n"), ("The Hague", "hague")]
    )
    def test_a_subject_is_the_same_in_other_spellings(self, one, other):
        assert is_held_out(one) == is_held_out(other)
        assert subject_key(one) == subject_key(other)

    def test_the_side_of_a_subject_does_not_change_with_versions(self):
        """Results of several versions are compared: these are fixed for good."""
        assert [
            is_held_out(name) for name in ("France", "Spain", "Germany", "Japan", "Canada", "Kenya", "Brazil")
        ] == SIDES


SIDES = [True, True, False, True, True, True, True]


class TestWhatIsLeftOut:
    def test_prompts_of_the_request(self, requests):
        pool = FactPool.of_requests(requests)
        for record in requests:
            own = set(map(normalised, prompts_of(record)))
            found = [
                *pool.relation_prompts(record, 99, held_out=True),
                *pool.relation_prompts(record, 99, held_out=False),
                *pool.subject_prompts(record, 99),
            ]
            assert not own & {normalised(x.prompt) for x in found}

    def test_the_subject_its_aliases_and_what_holds_them(self, requests):
        pool = FactPool.of_requests(requests)
        for record in requests:
            for held_out in (True, False):
                for x in pool.relation_prompts(record, 99, held_out=held_out):
                    one, other = normalised(x.subject), normalised(record["subject"])
                    assert not stands_in(one, other) and not stands_in(other, one)
                    assert not one.startswith("old ")

    def test_known_answers_that_are_the_new_one(self):
        edit = request_of("The capital of {} is", "France", "Rome", "Paris")
        others = [
            request_of("The capital of {} is", name, "Lima", answer)
            for name, answer in [
                ("Italy", "Rome"),
                ("Lazio", "Rome, Italy"),
                ("Spain", "Madrid"),
                ("Cuba", "Romeville"),
            ]
        ]
        pool = FactPool.of_requests([edit, *others, request_of("The capital of {} is", "Latium", "Rome", "Turin")])
        assert names(both(pool, edit)) == {"Spain", "Cuba"}
        assert names(both(pool, {**edit, "target_new": "Madrid"})) == {"Italy", "Lazio", "Cuba", "Latium"}

    def test_subjects_that_are_the_new_or_the_old_answer(self):
        """If A's spouse is now C, C's spouse changes, too, and that of A's old spouse."""
        others = [request_of("The spouse of {} is", name, "X", "Y") for name in ("Ben", "Cleo", "Dora")]
        edit = request_of("The spouse of {} is", "Ann", "Cleo", "Ben")
        assert names(both(FactPool.of_requests(others), edit)) == {"Dora"}

    def test_relations_that_follow_or_ask_the_same(self):
        def person(name):
            return {
                "subject": name,
                "prompt": f"The place of birth of {name} is",
                "target_new": "Oslo",
                "locality": {
                    "own": [
                        {"prompt": f"The job of {name} is", "ground_truth": "x"},
                        {"prompt": f"The job of {name}, which is not Oslo, is", "ground_truth": "x"},
                    ]
                },
                "portability": {"own": [{"prompt": f"The mayor of the home town of {name} is", "ground_truth": "x"}]},
            }

        people = [to_request(person(name)) for name in ("Ann", "Ben", "Cleo")]
        questions = [request_of("What is the place of birth of {}?", "Dora", "Rome", "Lima")]
        pool = FactPool.of_requests([*people, *questions])
        edit = request_of("The place of birth of {} is", "Emil", "Rome", "Lima", like="The job of {} is")
        assert pool.subject_prompts(edit, 9) == []  # the job is asked by the request itself
        edit = request_of("{} was born in the town", "Ann", "Rome", "Lima")
        found = {x.prompt for x in pool.subject_prompts(edit, 9)}
        assert found <= {"The job of Ann is", "The place of birth of Ann is", "What is the place of birth of Ann?"}
        assert len(found) == 2


class TestKinds:
    def test_subjects_of_the_kind_come_first(self, requests):
        """Even where the template is asked about persons and lands alike."""
        pool = FactPool.of_requests(requests)
        right, known = [], []
        for record in requests:
            found = pool.relation_prompts(record, 99, held_out=True)
            same = [kind_of(x.subject) == kind_of(record["subject"]) for x in found]
            assert same[0]
            right += same[:6]
            known += [ok for ok, x in zip(same, found) if x.same_kind]
        assert sum(right) > 0.95 * len(right) and sum(known) > 0.9 * len(known)
        asked = {kind_of(r["subject"]) for r in requests if r["prompt"] == SHARED.replace("{}", r["subject"])}
        assert asked == {"person", "land"}, "chance would give both"

    def test_a_template_asked_once_is_asked_about_subjects_of_the_kind(self, requests):
        pool = FactPool.of_requests(requests)
        for name, kind in (("Hendrik Lorentz", "person"), ("Bhutan", "land")):
            for pattern in ASKED[kind]:
                edit = request_of("Whatever became of {}?", name, "nothing", "much", like=pattern)
                found = both(pool, edit)
                assert found and {kind_of(x.subject) for x in found} == {kind}
                assert all(x.prompt == f"Whatever became of {x.subject}?" and x.same_kind for x in found)

    def test_another_kind_only_where_it_is_wanted(self):
        pool = FactPool.of_requests([request_of("The capital of {} is", f"Land{i}", "A", "B") for i in range(9)])
        edit = request_of("Who fathered {}?", "Ann", "Ben", "Carl")
        assert both(pool, edit) == []
        found = both(pool, edit, strangers=True)
        assert len(found) == 9 and not any(x.same_kind for x in found)

    def test_templates_of_the_subject_are_of_its_kind(self, requests):
        pool = FactPool.of_requests(requests)
        patterns = {
            kind: {f"{start}{x}" for x in [*templates, SHARED] for start in ("", "Tell me: ")}
            for kind, templates in ASKED.items()
        }
        found = [(x, kind_of(record["subject"])) for record in requests for x in pool.subject_prompts(record, 9)]
        assert found
        for x, kind in found:
            assert x.template in patterns[kind] and x.prompt == fill(x.template, x.subject) and x.kind == "subject"

    def test_statements_of_other_kinds_only_where_they_are_wanted(self, requests):
        """After those of the kind; neither the edited fact nor what asks the same in other words."""
        pool, more = FactPool.of_requests(requests), set()
        for record in requests:
            found = pool.subject_prompts(record, 99)
            all_ = pool.subject_prompts(record, 99, strangers=True)
            assert all_[: len(found)] == found and pool.subject_prompts(record, 2, strangers=True) == all_[:2]
            stands = {normalised(prompt) for prompt in prompts_of(record)}
            for x in all_[len(found) :]:
                more.add(kind_of(record["subject"]) in {k for k, known in ASKED.items() if x.template in known})
                assert x.prompt == fill(x.template, record["subject"]) and normalised(x.prompt) not in stands
                assert not x.template.endswith("?")
        assert more == {False}, "those of the kind came first"
        # A question about other subjects fills nothing up; the same words in a statement do.
        for pattern, number in (("Who bore {}?", 0), ("The mother of {} is", 1)):
            others = FactPool.of_requests([request_of(pattern, f"Land{i}", "A", "B") for i in range(3)])
            edit = request_of("The capital of {} is", "Ann", "Ben", "Carl")
            assert len(others.subject_prompts(edit, 9, strangers=True)) == number
            assert others.subject_prompts(edit, 9) == []

    def test_packaged_relations_of_another_kind_fill_nothing_up(self):
        """It is known that they make no sense."""
        edit = {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France"}
        of_kind = packaged_pool().subject_prompts(edit, 99)
        assert of_kind and packaged_pool().subject_prompts(edit, 99, strangers=True) == of_kind


class TestDeterminism:
    def test_neither_order_nor_repetition_of_the_pool_matters(self, requests):
        pool = FactPool.of_requests(requests)
        other = FactPool.of_requests(random.Random(1).sample(requests * 2, 2 * len(requests)))
        for record in requests[:20]:
            assert both(pool, record) == both(other, record)
            assert pool.subject_prompts(record, 5, seed=3) == other.subject_prompts(record, 5, seed=3)

    def test_another_seed_gives_others_and_a_smaller_number_the_first_ones(self, requests):
        pool = FactPool.of_requests(requests)
        drawn = [
            [x.prompt for r in requests for x in pool.relation_prompts(r, 2, held_out=True, seed=s)] for s in (0, 1)
        ]
        assert drawn[0] != drawn[1]
        few, many = (pool.relation_prompts(requests[0], n, held_out=True) for n in (2, 6))
        assert few == many[:2]


def request_of(template: str, subject: str, new: str, old: str, like: str | None = None) -> dict:
    """A request; ``like``: a template of a locality prompt."""
    record = {"prompt": template.replace("{}", subject), "subject": subject, "target_new": new, "ground_truth": old}
    if like is not None:
        record["locality"] = {"own": [{"prompt": like.replace("{}", subject), "ground_truth": "x"}]}
    return to_request(record)


def both(pool: FactPool, request: dict, **options) -> list[Neighbour]:
    return [x for held_out in (True, False) for x in pool.relation_prompts(request, 99, held_out=held_out, **options)]


def names(found: list[Neighbour]) -> set[str]:
    return {x.subject for x in found}


def test_a_subject_of_special_characters_is_a_text_not_a_pattern():
    odd = [name for name in PERSONS if re.escape(name.replace(" ", "")) != name.replace(" ", "")]
    requests = [request_of("The place of birth of {} is", name, f"{i}0", "B") for i, name in enumerate(odd)]
    pool = FactPool.of_requests(requests)
    assert len(odd) == 3 and pool.subjects == len(odd)
    for record in requests:
        assert names(both(pool, record)) == {*odd} - {record["subject"]}


@pytest.mark.parametrize("form", ["lists", "single texts", "nested answers"])
def test_probes_of_easyedits_own_requests_count_in_every_form(form):
    """EasyEdit's editors take a probe's prompt as a text or as a list, and answers nested in lists."""
    pool = FactPool.of_requests([request_of("The capital of {} is", name, "Oslo", name) for name in "ABCDEFGHIJ"])
    request = {"prompt": "The capital of Peru is", "subject": "Peru", "target_new": "Rome", "rephrase_prompt": None}
    plain = {one.prompt for one in both(pool, request)}
    left_out = sorted(plain)[0]
    prompt, answer = (left_out, "Lima") if form == "single texts" else ([left_out], ["Lima"])
    answer = [answer] if form == "nested answers" else answer
    request["locality"] = {"mine": {"prompt": prompt, "ground_truth": answer}}
    assert {one.prompt for one in both(pool, request)} == plain - {left_out}


def named_record(**more) -> dict:
    return {
        "template": "The capital of {} is",
        "subject": "Ruria",
        "target_new": "Lom",
        "neighbours": ["Ulia", "Oria", "ulia", "Erania", "Akka", "Ruria", "Lom", "Belm", "Dorn", "Ferr"],
        **more,
    }


def test_subjects_that_a_record_names_come_first_half_of_them_to_train_and_half_to_ask():
    request = to_request(named_record())
    assert request["prompt"] == "The capital of Ruria is"
    others = [
        {"template": "The capital of {} is", "subject": name, "target_new": "Xam"}
        for name in ("Zeria", "Oria", "Yugia")
    ]
    pool = FactPool.of_requests([request, *map(to_request, others)])
    found = {held_out: pool.relation_prompts(request, 50, held_out=held_out) for held_out in (True, False)}
    named = {"Ulia", "Oria", "Erania", "Akka", "Belm", "Dorn", "Ferr"}
    for held_out, neighbours in found.items():
        own = {name for name in named if is_held_out(name) is held_out}
        assert own and {one.subject.casefold() for one in neighbours[: len(own)]} == {name.casefold() for name in own}
        assert all(one.same_kind and one.prompt == f"The capital of {one.subject} is" for one in neighbours[: len(own)])
    subjects = [one.subject.casefold() for one in (*found[True], *found[False])]
    assert len(subjects) == len(set(subjects)), "none twice"
    assert not {"ruria", "lom"} & set(subjects), "neither the subject itself nor the new answer"
    without = to_request({key: value for key, value in named_record().items() if key != "neighbours"})
    assert not {"Ulia", "Akka"} & names(pool.relation_prompts(without, 50, held_out=is_held_out("Akka")))


@pytest.mark.parametrize(
    "more, message",
    [
        ({"neighbours": "Spain"}, "neighbours: is a str, not a list"),
        ({"neighbours": ["Spain", ""]}, r"neighbours\[1\]"),
        ({"neighbours": ["Spain", 3]}, r"neighbours\[1\]"),
        ({"template": "The capital is"}, "template: 'The capital is' must be a text with {} once"),
        ({"template": 7}, "template: 7 must be a text"),
        ({"subject": None}, "subject: None must be a text"),
    ],
)
def test_damaged_names_and_templates_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        to_request(named_record(**more))


def test_the_hard_cases_are_read_as_they_are():
    requests, complaints = load_records(case("neighbourhoods.json"))
    assert len(requests) == 4 and not complaints
    for request in requests:
        pool = FactPool.of_requests(requests)
        asked = names(pool.relation_prompts(request, 50, held_out=True))
        assert asked and asked <= set(request["neighbours"])
