"""What an edit does to its neighbours: against models whose answers are known, and through real runs of tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytest import approx
from runs import RECORDS, counting, job_fixture, lines_of, quick_fixture, record  # noqa: F401  (fixtures)
from torch import nn

from kne_easyedit.benchmark import run
from kne_easyedit.benchmark.console import print_report
from kne_easyedit.benchmark.neighbourhood import Questioner
from kne_easyedit.benchmark.probes import OWN, Asked, choose
from kne_easyedit.bridge import MethodEditor
from kne_easyedit.editing import neighbours as training
from kne_easyedit.facts.encoding import encode
from kne_easyedit.facts.neighbours import Neighbour, is_held_out
from kne_easyedit.facts.records import to_request

TARGET = "Rome"
REQUEST = {"prompt": "The capital of France is", "target_new": TARGET, "ground_truth": "Paris", "subject": "France"}
BEFORE = {
    "The capital of Spain is": "Madrid",
    "The capital of Peru is": "Lima",
    "The capital of Italy is": "Rome",
    "The capital of Ada is": "Paris and Madrid",
    "The capital of Marie is": "Paris",
    "The capital of Ido is": "Lima",
}
AFTER = {
    **BEFORE,
    "The capital of Spain is": "Rome",
    "The capital of Ada is": "Paris and Rome",
    "The capital of Marie is": "Rome and Oslo",
    "The capital of Ido is": "Oslo",
}
ASKED = Asked(
    tuple(Neighbour(prompt, "", OWN, "") for prompt in list(BEFORE)[:4]),
    ("The capital of Marie is", "The capital of Ido is"),
)
POST = {"portability": {"Subject_Aliasing_acc": [1.0, 0.5], "Reasoning_acc": [0.0]}}


class Scripted(nn.Module):
    """Gives each prompt its answer, token by token, whatever stands at the places of the tokens before; then ends."""

    def __init__(self, tokenizer, answers: dict[str, str]):
        super().__init__()
        self.words = nn.Embedding(len(tokenizer), 1)  # says on which device it is
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.size, self.end = len(tokenizer), tokenizer.eos_token_id
        self.answers = {}
        for prompt, answer in answers.items():
            fact = encode(tokenizer, prompt, answer)
            self.answers[fact.ids[: fact.prompt_length]] = fact.answer
        self.texts_at_once = []

    def get_input_embeddings(self):
        return self.words

    def next(self, ids: tuple[int, ...]) -> int:
        for prompt, answer in self.answers.items():
            if ids[: len(prompt)] == prompt:
                return [*answer, self.end][min(len(ids) - len(prompt), len(answer))]
        return self.end

    def forward(self, input_ids, attention_mask):
        self.texts_at_once.append(len(input_ids))
        logits = torch.zeros(*input_ids.shape, self.size)
        for row, ids, mask in zip(logits, input_ids.tolist(), attention_mask.tolist()):
            own = tuple(token for token, there in zip(ids, mask) if there)
            start = mask.index(1)
            for place in range(len(own)):
                row[start + place, self.next(own[: place + 1])] = 9.0
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        self.texts_at_once.append(len(input_ids))
        rows = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist()):
            own = tuple(token for token, there in zip(ids, mask) if there)
            for _ in range(max_new_tokens):
                own = (*own, self.end if own[-1] == self.end else self.next(own))
            rows.append([*ids, *own[-max_new_tokens:]])
        return torch.tensor(rows)


def measured(tokenizer, after: dict[str, str], at_once: int = 16, asked: Asked = ASKED) -> dict:
    questioner = Questioner(tokenizer)
    before = questioner.before(Scripted(tokenizer, BEFORE), REQUEST, asked)
    model = Scripted(tokenizer, after)
    found = questioner.after(model, REQUEST, asked, json.loads(json.dumps(before)), POST, at_once=at_once)
    assert max(model.texts_at_once, default=0) <= at_once
    return found


# A known case


@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_a_known_neighbourhood(tokenizer, at_once):
    """Of four neighbours one takes the new answer, one had it, one keeps its first word, one keeps all."""
    found = measured(tokenizer, AFTER, at_once)
    assert {name: value for name, value in found.items() if isinstance(value, float)} == approx(
        {
            "neighbourhood": (0 + 1 + 1 + 2 / 3) / 4,
            "neighbourhood_free": 3 / 4,
            "bleed": 1 / 3,
            "bleed_forced": (1 + 0 + 1 + 0) / 4,
            "alias_beyond_bleed": 1 / 2 - 1 / 3,
            "alias_beyond_bleed_forced": 3 / 4 - 1 / 2,
        }
    )
    spain = found["neighbours"][0]
    assert (spain["before"].strip(), spain["after"].strip(), spain["kept"]) == ("Madrid", "Rome", 0)
    assert [its["forced_before"] for its in found["neighbours"]] == [0, 0, 1, 0]
    assert [(its["before"].strip(), its["after"].strip()) for its in found["aliases"]] == [
        ("Paris", "Rome and Oslo"),
        ("Lima", "Oslo"),
    ]


def test_an_edit_without_effect_bleeds_nowhere(tokenizer):
    """The converse: the aliases, too, are as before."""
    found = measured(tokenizer, BEFORE)
    assert (found["neighbourhood"], found["neighbourhood_free"], found["bleed"]) == (1, 1, 0)
    assert found["bleed_forced"] == 1 / 4  # Italy's own answer
    assert found["alias_beyond_bleed"] == 0


def test_an_edit_of_everything_has_no_portability_beyond_bleed(tokenizer):
    found = measured(tokenizer, dict.fromkeys(BEFORE, TARGET))
    assert (found["bleed"], found["neighbourhood"], found["alias_beyond_bleed"]) == (1, 1 / 4, 0)


def test_what_is_not_asked_has_no_figures(tokenizer):
    nothing = measured(tokenizer, AFTER, asked=Asked())
    assert nothing["neighbours"] == nothing["aliases"] == []
    assert all(value is None for name, value in nothing.items() if name not in ("neighbours", "aliases"))
    only_italy = measured(tokenizer, AFTER, asked=Asked((ASKED.neighbours[2],), ASKED.aliases))
    assert only_italy["bleed"] is None and only_italy["alias_beyond_bleed"] is None  # it gave that answer before
    assert only_italy["neighbourhood"] == 1


# What is asked


def many(tmp_path, job, subjects) -> None:
    job.data = str(tmp_path / "many.json")
    Path(job.data).write_text(json.dumps([*RECORDS, *(record(subject, "Lima") for subject in subjects)]))


SUBJECTS = [
    f"{first}{second}" for first in ("Lo", "Mi", "Na", "Pe") for second in ("ra", "so", "ti", "vu", "wen", "xo")
]


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_neighbours_are_held_out_facts_that_no_one_trains(job, tmp_path, mode):
    many(tmp_path, job, SUBJECTS)
    job.mode, job.batch_size = mode, 2 if mode == "batch" else 1
    localised = {"The capital of Peru is", "The capital of Italy is"}
    apart = f"The capital of {next(filter(is_held_out, SUBJECTS))} is"
    asked = choose(replace(job, apart=[{"prompt": apart}]))
    edited = {request["prompt"] for request in job.requests}
    for request in job.requests:
        found = asked[request["index"]].neighbours
        assert 3 <= len(found) <= 8 and all(is_held_out(its.subject) for its in found)
        assert all(its.prompt == f"The capital of {its.subject} is" for its in found)
        prompts = {its.prompt for its in found}
        assert len(prompts) == len(found)
        assert not prompts & (localised | {apart, request["prompt"]})
        assert mode == "single" or not prompts & edited
    assert choose(replace(job, apart=[{"prompt": apart}])) == asked
    everything = {its.prompt for its in choose(replace(job, neighbours=99))[0].neighbours}
    assert apart in everything  # the converse: it is the exclusion that left it out


def test_another_seed_asks_others_and_zero_asks_none(job, tmp_path):
    many(tmp_path, job, SUBJECTS)
    job.neighbours = 3
    sets = {tuple(choose(replace(job, seed=seed))[0].prompts) for seed in range(6)}
    assert len(sets) > 1 and all(len(its) == 3 for its in sets)
    assert choose(replace(job, neighbours=0))[0] == Asked()


COUNTERFACT = {
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "subject": "France",
        "target_new": {"str": "Rome"},
        "target_true": {"str": "Paris"},
    },
    "neighborhood_prompts": [f"The capital of {subject} is" for subject in ("Spain", "Marie", "Ada")],
}
FLAT = {**record(), "locality_prompt": ["The capital of Spain is"], "locality_ground_truth": ["Madrid"]}
OWN_CATEGORY = record(locality={"Neighbourhood": [{"prompt": "The capital of Spain is", "ground_truth": "Madrid"}]})


@pytest.mark.parametrize(("found", "number"), [(COUNTERFACT, 3), (FLAT, 1), (OWN_CATEGORY, 1)])
def test_neighbours_that_the_record_brings_come_before_made_ones(job, tmp_path, found, number):
    many(tmp_path, job, SUBJECTS)
    job.requests = [{**to_request(found), "index": 0}]
    its = choose(job)[0].neighbours
    assert [neighbour.kind for neighbour in its] == [OWN] * number
    assert {neighbour.prompt for neighbour in its} <= {f"The capital of {s} is" for s in ("Spain", "Marie", "Ada")}
    job.neighbours = 2
    assert len(choose(job)[0].neighbours) == min(2, number)
    if number == 1:
        edited = {**to_request(record("Spain", "Oslo")), "index": 1}
        together = choose(replace(job, requests=[*job.requests, edited], mode="batch", batch_size=2))
        assert "The capital of Spain is" not in together[0].prompts  # it is edited itself


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_facts_edited_in_other_words_are_no_neighbours(job, tmp_path, mode):
    """They should change. One at a time, they are not edited when they are asked."""
    other = [to_request(record(subject, "Lima", prompt=f"What is the capital of {subject} ?")) for subject in SUBJECTS]
    many(tmp_path, job, SUBJECTS)
    requests = [job.requests[0], *({**its, "index": i} for i, its in enumerate(other[:20], start=1))]
    own = record(locality={"Neighbourhood": [{"prompt": f"In {SUBJECTS[0]} the capital is", "ground_truth": "x"}]})
    requests.append({**to_request(own | {"prompt": "The river of France is"}), "index": 99})
    together = replace(job, requests=requests, mode=mode, batch_size=22 if mode == "batch" else 1)
    asked = choose(together)
    edited = {request["subject"] for request in requests}
    assert bool({its.subject for its in asked[0].neighbours} & edited) is (mode == "single")
    assert (own["locality"]["Neighbourhood"][0]["prompt"] in asked[99].prompts) is (mode == "single")


def test_a_path_of_the_data_may_have_variables(job, tmp_path, monkeypatch):
    """As all readers expand them."""
    many(tmp_path, job, SUBJECTS)
    plain = choose(job)
    monkeypatch.setenv("KNE_TEST_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("$KNE_TEST_DATA/many.json", "~/many.json"):
        assert choose(replace(job, data=path)) == plain


@pytest.mark.usefixtures("quick")
def test_what_later_records_bring_to_be_asked_trains_in_no_edit_of_a_sequence(job, tmp_path, monkeypatch):
    many(tmp_path, job, SUBJECTS)
    hparams = job.hparams["KNE"] = replace(
        job.hparams["KNE"], neighbour_weight=1.0, neighbour_data=job.data, neighbour_subject_size=0
    )
    (trained,) = training.neighbours_by_request(job.requests[:1], hparams)
    later = next(prompt for prompt in trained if "Spain" not in prompt)
    probe = {"Neighborhood": [{"prompt": later, "ground_truth": "x"}]}
    job.requests[1] = {**to_request(record("Spain", "Oslo", locality=probe)), "index": 1}
    given = []
    apply = MethodEditor.apply
    monkeypatch.setattr(MethodEditor, "apply", lambda self, its: given.extend(its) or apply(self, its))
    prints = {}
    for mode in ("single", "sequential"):
        job.mode, job.folder = mode, tmp_path / mode
        given.clear()
        prints[mode] = run(job)["fingerprints"]["KNE"]
        (found,) = training.neighbours_by_request(given[:1], hparams)
        assert (later in found) is (mode == "single") and (training.ASKED in given[0]) is (mode == "sequential")
        assert later in {its["prompt"] for its in lines_of(job)[1]["neighbours"]}


def test_prompts_are_in_the_chat_template_where_the_run_is(job, tmp_path):
    many(tmp_path, job, SUBJECTS)
    job.requests[0]["portability"]["Subject_Aliasing"] = {"prompt": ["The capital of Ada is"], "ground_truth": ["Rome"]}
    plain = choose(replace(job, contradiction=True))[0]
    job.tokenizer.chat_template = "{% for m in messages %}What is {{ m['content'] }} ?{% endfor %}"
    found = choose(replace(job, contradiction=True, chat_template=True))[0]
    assert found.prompts == [f"What is {prompt} ?" for prompt in plain.prompts] and found.aliases
    assert [denial.prompt for denial in found.denials] == [f"What is {denial.prompt} ?" for denial in plain.denials]
    assert '"The capital of France is Rome"' in plain.denials[0].prompt


# Runs


@pytest.mark.usefixtures("quick")
def test_a_run_keeps_what_it_asked(job, tmp_path, capsys):
    many(tmp_path, job, SUBJECTS)
    job.requests[0]["portability"]["Subject_Aliasing"] = {"prompt": ["The capital of Ada is"], "ground_truth": ["Rome"]}
    job.contradiction = True
    asked = choose(job)
    summary = run(job)
    for line in lines_of(job):
        its = asked[line["index"]]
        assert [found["prompt"] for found in line["neighbours"]] == [found.prompt for found in its.neighbours]
        assert line["probes"] == len(its.neighbours) > 0
        assert 0 <= line["neighbourhood"] <= 1 and 0 <= line["denial"] <= 1 != line["denial"]
        assert line["denial"] != line["denial_before"]
        assert 0 < line["probabilities_before"]["new"] < line["probabilities_after"]["new"] < 1
        assert line["answer_after"].startswith(line["after"]) or line["after"].startswith(line["answer_after"])
    first, second = lines_of(job)
    assert first["alias_beyond_bleed"] is not None and second["alias_beyond_bleed"] is None
    figures = summary["methods"]["KNE"]
    assert figures["neighbourhood"] == approx(50 * (first["neighbourhood"] + second["neighbourhood"]))
    assert figures["alias_beyond_bleed"] == approx(100 * first["alias_beyond_bleed"])
    print_report(summary, job.folder)
    printed = capsys.readouterr().out
    assert "| neighbourhood | bleed |" in printed and "bleed " in printed


@pytest.mark.usefixtures("quick")
def test_a_run_that_asks_nothing_has_the_figures_of_before(job):
    run(job)
    asked = lines_of(job)
    job.neighbours = 0
    summary = run(job)
    for line, old in zip(lines_of(job), asked):
        assert line["fingerprint"] != old["fingerprint"] and line["metrics"] == old["metrics"]
        assert (line["after"], line["probes"], line["neighbours"]) == (old["after"], 0, [])
        assert line["bleed"] is None
    assert summary["methods"]["KNE"]["neighbourhood"] is None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_a_killed_run_resumes_with_the_same_neighbours(job, tmp_path, monkeypatch, mode):
    many(tmp_path, job, SUBJECTS)
    job.requests += [{**to_request(record("Ada", "Oslo")), "index": 2}]
    job.mode, job.retention_every = mode, 2
    run(job)
    whole = [{**line, "seconds": 0, "peak_bytes": 0} for line in lines_of(job)]
    again = (job.folder / "retention.jsonl").read_text() if mode == "sequential" else ""
    job.folder = tmp_path / "second"
    with monkeypatch.context() as patch:
        counting(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            run(job)
    assert len(lines_of(job)) == 2
    run(job)
    assert [{**line, "seconds": 0, "peak_bytes": 0} for line in lines_of(job)] == whole
    if mode == "sequential":
        assert (job.folder / "retention.jsonl").read_text() == again


def test_a_sequence_asks_the_neighbours_of_earlier_facts_again(job, tmp_path):
    many(tmp_path, job, SUBJECTS)
    job.fluency, job.mode, job.retention_every = False, "sequential", 1
    summary = run(job)
    stops = summary["methods"]["KNE"]["retention"]
    assert [stop["edits"] for stop in stops] == [1, 2]
    assert all(0 <= stop[name] <= 100 for stop in stops for name in ("neighbourhood", "neighbourhood_free", "bleed"))
    asked = [json.loads(text) for text in (job.folder / "retention.jsonl").read_text().splitlines()]
    assert [line["probes"] for line in asked] == [len(choose(job)[line["index"]].neighbours) for line in asked]
    # Right after its own edit a fact's neighbours answer as in its result line, after the next one they may not.
    first = lines_of(job)[0]
    assert (asked[0]["neighbourhood"], asked[0]["bleed"]) == (first["neighbourhood"], first["bleed"])
    assert asked[1]["neighbourhood"] < asked[0]["neighbourhood"]
    assert (job.folder / "retention.png").stat().st_size > 5000


@pytest.mark.usefixtures("quick")
def test_figures_of_an_earlier_version_before_the_edit_are_completed(job, monkeypatch):
    run(job)
    expected = [line["neighbours"] for line in lines_of(job)]
    files = sorted((job.folder / "before").glob("*.json"))
    whole = [path.read_text() for path in files]
    for path in files:
        found = json.loads(path.read_text())
        path.write_text(json.dumps({name: found[name] for name in ("metrics", "answer")}, ensure_ascii=False))
    (job.folder / "results.jsonl").unlink()
    evaluated = []
    evaluate = MethodEditor.evaluate
    monkeypatch.setattr(
        MethodEditor, "evaluate", lambda self, r, **k: evaluated.append(r["index"]) or evaluate(self, r, **k)
    )
    run(job)
    assert evaluated == [0, 1]  # after the edits only
    assert [path.read_text() for path in files] == whole
    assert [line["neighbours"] for line in lines_of(job)] == expected


@pytest.mark.usefixtures("quick")
def test_lines_with_other_neighbours_are_computed_again(job, tmp_path, monkeypatch):
    """Another file of facts makes others; the records and settings are the same."""
    many(tmp_path, job, SUBJECTS[:12])
    run(job)
    many(tmp_path, job, SUBJECTS)
    edited = counting(monkeypatch)
    run(job)
    assert edited == ["France", "Spain"]
    run(job)
    assert len(edited) == 2


@pytest.mark.parametrize("number", [-1])
def test_fewer_than_none(job, number):
    job.neighbours = number
    with pytest.raises(ValueError, match="neighbours: -1 must be at least 0"):
        run(job)
