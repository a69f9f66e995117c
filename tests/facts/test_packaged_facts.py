"""Strict checks of the embedded fact set kne_easyedit/facts/facts.json."""

import json
from collections import Counter
from pathlib import Path

import pytest

FACTS = Path(__file__).resolve().parents[2] / "kne_easyedit" / "facts" / "facts.json"
RECORD_KEYS = {
    "subject",
    "prompt",
    "target_new",
    "ground_truth",
    "rephrase_prompt",
    "relation",
    "portability",
    "locality",
}
PORTABILITY = {"Subject_Aliasing", "Reasoning", "Logical_Generalization"}
LOCALITY = {"Relation_Specificity", "Forgetfulness"}
END_PUNCTUATION = ".,;:!?"
MAX_ANSWER_WORDS = 4

RECORDS = json.loads(FACTS.read_text(encoding="utf-8"))
each_record = pytest.mark.parametrize("rec", RECORDS, ids=[f"{i}-{r.get('subject')}" for i, r in enumerate(RECORDS)])


def items(rec, section):
    return [(cat, item) for cat, its in rec[section].items() for item in its]


def probes(rec):
    return items(rec, "portability") + items(rec, "locality")


def is_question(prompt):
    return prompt.endswith("?")


def check_text(text):
    assert isinstance(text, str) and text
    assert text == text.strip(), f"blank at an end: {text!r}"
    assert "  " not in text and "\n" not in text and "\t" not in text


def check_answer(text):
    check_text(text)
    assert text[-1] not in END_PUNCTUATION, f"punctuation at the end: {text!r}"
    assert len(text.split()) <= MAX_ANSWER_WORDS, f"long answer: {text!r}"


def check_prompt(text):
    check_text(text)
    assert text.endswith("?") or text[-1] not in END_PUNCTUATION


def test_file():
    raw = FACTS.read_bytes()
    assert raw.endswith(b"\n") and len(raw) < 200_000
    assert raw.decode("utf-8") == json.dumps(RECORDS, indent=1, ensure_ascii=False) + "\n"


def test_size_and_variety():
    assert isinstance(RECORDS, list) and len(RECORDS) >= 60
    assert len({r["relation"] for r in RECORDS}) >= 8
    questions = sum(is_question(r["prompt"]) for r in RECORDS)
    assert questions >= len(RECORDS) // 3
    assert len(RECORDS) - questions >= len(RECORDS) // 3
    multi_word = sum(" " in r["target_new"] for r in RECORDS)
    assert 10 <= multi_word <= len(RECORDS) - 10
    assert sum(set(r["portability"]) == PORTABILITY for r in RECORDS) >= 50


def test_relations_are_interleaved():
    for start in range(len(RECORDS) - 19):
        window = Counter(r["relation"] for r in RECORDS[start : start + 20])
        assert len(window) >= 8 and max(window.values()) <= 5


def test_uniqueness():
    for key in ("subject", "prompt", "rephrase_prompt"):
        values = [r[key].lower() for r in RECORDS]
        assert len(set(values)) == len(values), key
    pairs = [(r["subject"].lower(), r["relation"]) for r in RECORDS]
    assert len(set(pairs)) == len(pairs)


def test_no_sentence_is_used_twice():
    seen = Counter()
    for r in RECORDS:
        seen.update([r["prompt"].lower(), r["rephrase_prompt"].lower()])
        seen.update(item["prompt"].lower() for _, item in probes(r))
    assert [p for p, n in seen.items() if n > 1] == []


def test_no_locality_prompt_is_an_edit_prompt():
    edits = {r[k].lower() for r in RECORDS for k in ("prompt", "rephrase_prompt")}
    for r in RECORDS:
        for _, item in items(r, "locality"):
            assert item["prompt"].lower() not in edits


@each_record
def test_record_schema(rec):
    assert isinstance(rec, dict) and set(rec) == RECORD_KEYS
    check_text(rec["subject"])
    check_text(rec["relation"])
    check_prompt(rec["prompt"])
    check_prompt(rec["rephrase_prompt"])
    check_answer(rec["target_new"])
    truth = rec["ground_truth"]
    assert isinstance(truth, list) and truth
    for alias in truth:
        check_answer(alias)
    assert len(set(truth)) == len(truth)


@each_record
def test_subject_and_forms(rec):
    assert rec["subject"] in rec["prompt"]
    assert rec["subject"] in rec["rephrase_prompt"]
    assert is_question(rec["prompt"]) != is_question(rec["rephrase_prompt"])


@each_record
def test_target_differs_from_truth(rec):
    target = rec["target_new"].lower()
    for alias in rec["ground_truth"]:
        assert alias.lower() != target
        assert target not in alias.lower() and alias.lower() not in target


@each_record
@pytest.mark.parametrize("section, allowed", [("portability", PORTABILITY), ("locality", LOCALITY)])
def test_probe_schema(rec, section, allowed):
    assert isinstance(rec[section], dict) and rec[section] and set(rec[section]) <= allowed
    for its in rec[section].values():
        assert isinstance(its, list) and its
        for item in its:
            assert isinstance(item, dict) and set(item) == {"prompt", "ground_truth"}
            check_prompt(item["prompt"])
            answers = item["ground_truth"]
            assert isinstance(answers, list) and answers
            for aliases in answers:
                assert isinstance(aliases, list) and aliases
                assert len(set(aliases)) == len(aliases)
                for alias in aliases:
                    check_answer(alias)


@each_record
def test_portability_content(rec):
    port = rec["portability"]
    assert "Subject_Aliasing" in port and len(port) >= 2
    for item in port["Subject_Aliasing"]:
        assert rec["subject"] not in item["prompt"]
        assert item["ground_truth"][0][0] == rec["target_new"]
    for item in port.get("Reasoning", []):
        assert rec["subject"] in item["prompt"]
        assert rec["target_new"].lower() not in item["prompt"].lower()


@each_record
def test_locality_content(rec):
    assert set(rec["locality"]) == LOCALITY
    assert len(rec["locality"]["Relation_Specificity"]) >= 2
    for item in rec["locality"]["Relation_Specificity"]:
        assert rec["subject"] in item["prompt"]
    for item in rec["locality"]["Forgetfulness"]:
        assert rec["subject"] not in item["prompt"]
    for _, item in items(rec, "locality"):
        assert rec["target_new"].lower() not in item["prompt"].lower()


@each_record
def test_locality_is_untouched_by_all_edits(rec):
    # With every edit applied at once, no locality probe may speak of an edited subject of
    # another record, and so none can change its true answer.
    others = [r["subject"].lower() for r in RECORDS if r is not rec]
    for _, item in items(rec, "locality"):
        prompt = item["prompt"].lower()
        assert [s for s in others if s in prompt] == []
