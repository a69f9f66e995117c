"""KnowEdit records in every shape that the published files have, and complaints that say where the fault is."""

import json

import pytest

from kne_easyedit.facts.readers import read_records
from kne_easyedit.facts.records import CATEGORIES, BadRecord, load_records, load_requests, to_request

PROBE = {"prompt": "The river of Rome is", "ground_truth": "Tiber"}
RECORD = {
    "subject": "France",
    "prompt": "The capital of France is",
    "target_new": "Rome",
    "ground_truth": ["Paris", "Lutetia"],
    "rephrase_prompt": "What is the capital of France?",
    "portability": {"Reasoning": [PROBE], "Subject_Aliasing": [PROBE]},
    "locality": {"Relation_Specificity": [PROBE], "Forgetfulness": [PROBE]},
}
WIKIBIO = {
    "text": "This is a Wikipedia passage about ada lovelace. She was born in London.",
    "labels": "She wrote the first program.",
    "concept": "ada lovelace",
    "locality": {"Relation_Specificity": [{"prompt": "ada lovelace country is", "ground_truth": ["England"]}]},
}


def record(**changes):
    return {**RECORD, **changes}


def without(*names):
    return {name: value for name, value in RECORD.items() if name not in names}


@pytest.fixture
def file(tmp_path):
    def write(*records, name="data.json"):
        path = tmp_path / name
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    return write


class TestShapes:
    def test_a_whole_record(self):
        probes = {"prompt": [PROBE["prompt"]], "ground_truth": ["Tiber"]}
        assert to_request(RECORD) == {
            "prompt": RECORD["prompt"],
            "target_new": "Rome",
            "ground_truth": "Paris",
            "subject": "France",
            "rephrase_prompt": RECORD["rephrase_prompt"],
            "portability": {"Subject_Aliasing": probes, "Reasoning": probes},
            "locality": {"Relation_Specificity": probes, "Forgetfulness": probes},
        }

    def test_wikibio(self):
        """Other names for the same fields, and one category only."""
        request = to_request(WIKIBIO)
        assert (request["prompt"], request["target_new"], request["subject"]) == (
            WIKIBIO["text"],
            WIKIBIO["labels"],
            WIKIBIO["concept"],
        )
        assert request["ground_truth"] is None
        assert request["portability"] == {}
        assert request["locality"] == {
            "Relation_Specificity": {"prompt": ["ada lovelace country is"], "ground_truth": ["England"]}
        }

    @pytest.mark.parametrize(
        ("answer", "first"),
        [
            ("Tiber", "Tiber"),
            (["Tiber", "Tevere"], "Tiber"),
            ([["Tiber", "Tevere"], ["Arno"]], "Tiber"),
            (1912, "1912"),
            ([[3]], "3"),
            (0, "0"),
        ],
    )
    def test_answers(self, answer, first):
        """A text, aliases, lists of aliases, a number: the first alias counts, as a text."""
        request = to_request(record(locality={"Forgetfulness": [{**PROBE, "ground_truth": answer}]}))
        assert request["locality"]["Forgetfulness"]["ground_truth"] == [first]

    @pytest.mark.parametrize("answer", ["", "  ", [], [[]], [""], [[""]], None])
    def test_probes_without_an_answer_are_left_out(self, answer):
        useless = {**PROBE, "ground_truth": answer}
        request = to_request(record(locality={"Forgetfulness": [useless, PROBE], "Relation_Specificity": [useless]}))
        assert request["locality"] == {"Forgetfulness": {"prompt": [PROBE["prompt"]], "ground_truth": ["Tiber"]}}

    @pytest.mark.parametrize("section", CATEGORIES)
    @pytest.mark.parametrize("empty", [None, {}, {"Reasoning": []}, {"Forgetfulness": None}, {"Unknown": []}], ids=str)
    def test_sections_without_probes(self, section, empty):
        assert to_request(record(**{section: empty}))[section] == {}

    @pytest.mark.parametrize("name", ["portability", "locality", "rephrase_prompt", "ground_truth", "subject"])
    def test_what_may_be_missing(self, name):
        request = to_request(without(name))
        assert request.get(name) in ({}, None)

    @pytest.mark.parametrize(
        ("truth", "first"),
        [("Paris", "Paris"), (["Paris", "P."], "Paris"), ([["Paris"]], "Paris"), ([], None), (None, None)],
    )
    def test_ground_truth(self, truth, first):
        assert to_request(record(ground_truth=truth))["ground_truth"] == first

    def test_the_record_is_left_alone(self):
        before = json.dumps(RECORD)
        to_request(RECORD)["locality"]["Forgetfulness"]["prompt"].append("x")
        assert json.dumps(RECORD) == before


BAD = [
    (record(prompt=""), r"request\.prompt: ''"),
    (record(prompt=" \n"), r"request\.prompt: "),
    (without("prompt"), r"request\.prompt: None"),
    (record(target_new=""), r"request\.target_new: ''"),
    (record(target_new=["Rome"]), r"request\.target_new: \['Rome'\]"),
    (without("target_new"), r"request\.target_new: None"),
    (record(subject="Spain"), r"request\.subject: 'Spain' does not stand in the prompt"),
    (record(portability=[PROBE]), "portability: is a list, not a mapping of categories"),
    (record(locality="none"), "locality: is a str, not a mapping of categories"),
    (record(locality={"Forgetfulness": PROBE}), r"locality\.Forgetfulness: is a dict, not a list"),
    (
        record(locality={"Forgetfulness": [PROBE, "text"]}),
        r"locality\.Forgetfulness\[1\]\.prompt: 'text' has no prompt",
    ),
    (
        record(portability={"Reasoning": [{"ground_truth": "x"}]}),
        r"portability\.Reasoning\[0\]\.prompt: .* has no prompt",
    ),
    (record(portability={"Reasoning": [{**PROBE, "prompt": " "}]}), r"portability\.Reasoning\[0\]\.prompt: "),
    ("text", "is a str, not a mapping"),
    (None, "is a NoneType, not a mapping"),
    ([RECORD], "is a list, not a mapping"),
]
bad = pytest.mark.parametrize(("broken", "message"), BAD, ids=[f"{i}" for i in range(len(BAD))])


class TestBadRecords:
    @bad
    def test_fail_names_file_record_field_and_value(self, file, broken, message):
        path = file(RECORD, RECORD, broken)
        with pytest.raises(BadRecord, match=rf"data\.json: record 2: {message}.*--on-bad-record skip"):
            load_records(path)

    @bad
    def test_skip_goes_on_and_complains(self, file, broken, message):
        requests, complaints = load_records(file(RECORD, broken, RECORD), on_bad="skip")
        assert [request["index"] for request in requests] == [0, 2]
        (complaint,) = complaints
        with pytest.raises(ValueError, match=message):
            to_request(broken)
        assert "record 1: " in complaint

    def test_none_is_bad(self, file):
        assert load_records(file(RECORD), on_bad="skip")[1] == []

    def test_a_bad_record_is_a_value_error(self):
        assert issubclass(BadRecord, ValueError)

    def test_only_the_wanted_ones_are_checked(self, file):
        assert len(load_records(file(RECORD, RECORD, "bad"), size=2)[0]) == 2
        assert len(load_records(file("bad", RECORD), offset=1)[0]) == 1

    def test_localisation_takes_the_usable_ones(self, file):
        assert [request["index"] for request in load_requests(file(RECORD, "bad", RECORD, RECORD), 3)] == [0, 2]

    @pytest.mark.parametrize("on_bad", ["ignore", "", None])
    def test_unknown_wish(self, file, on_bad):
        with pytest.raises(ValueError, match=f"on_bad_record: {on_bad!r} must be 'fail' or 'skip'"):
            load_records(file(RECORD), on_bad=on_bad)


class TestFiles:
    @pytest.mark.parametrize(
        ("size", "offset", "indices"),
        [(None, 0, [0, 1, 2, 3, 4]), (2, 0, [0, 1]), (2, 3, [3, 4]), (9, 3, [3, 4]), (None, 4, [4]), (1, 2, [2])],
    )
    def test_size_and_offset(self, file, size, offset, indices):
        requests, _ = load_records(file(*[RECORD] * 5), size, offset)
        assert [request["index"] for request in requests] == indices

    @pytest.mark.parametrize("offset", [5, 6, -1])
    def test_offset_out_of_range(self, file, offset):
        with pytest.raises(ValueError, match=rf"offset: {offset} out of range; .*data\.json has 5 records"):
            load_records(file(*[RECORD] * 5), offset=offset)

    @pytest.mark.parametrize(
        ("content", "found"), [("{}", "dict"), ("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"text"', "str")]
    )
    def test_no_list_of_records(self, tmp_path, content, found):
        (tmp_path / "data.json").write_text(content)
        with pytest.raises(
            ValueError,
            match=rf"data\.json: not a KnowEdit file, expected a JSON list of records, JSON Lines .*, found {found}",
        ):
            load_records(tmp_path / "data.json")

    @pytest.mark.parametrize("content", [b"", b"[", b'[{"prompt": "x"', b"\xff\xfe\x00"])
    def test_no_json(self, tmp_path, content):
        (tmp_path / "data.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"data\.json: not a JSON file"):
            load_records(tmp_path / "data.json")

    def test_missing(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"nowhere\.json does not exist; .*zjunlp/KnowEdit, 'embedded' needs no file"
        ):
            load_records(tmp_path / "nowhere.json")

    def test_a_folder_is_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_records(tmp_path)

    @pytest.mark.parametrize("path", ["$KNE_TEST_DATA/data.json", "${KNE_TEST_DATA}/data.json", "~/data.json"])
    def test_variables_in_the_path(self, file, tmp_path, monkeypatch, path):
        file(RECORD)
        monkeypatch.setenv("KNE_TEST_DATA", str(tmp_path))
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(load_records(path)[0]) == 1

    def test_text_beyond_ascii(self, tmp_path):
        path = tmp_path / "data.json"
        path.write_text(
            json.dumps([record(subject="Ingrīda", prompt="Ingrīda is", target_new="naïve")], ensure_ascii=False),
            encoding="utf-8",
        )
        (request,), _ = load_records(path)
        assert (request["subject"], request["target_new"]) == ("Ingrīda", "naïve")


class TestEmbedded:
    def test_every_record_is_usable(self):
        requests, complaints = load_records("embedded")
        assert len(requests) == len(read_records("embedded")) >= 60
        assert complaints == []
        assert [request["index"] for request in requests] == list(range(len(requests)))

    def test_every_record_can_be_evaluated(self):
        for request in load_records("embedded")[0]:
            assert set(request["locality"]) == set(CATEGORIES["locality"])
            assert set(request["portability"]) <= set(CATEGORIES["portability"]) and request["portability"]
            assert request["ground_truth"] != request["target_new"]
            for section in CATEGORIES:
                for probes in request[section].values():
                    assert len(probes["prompt"]) == len(probes["ground_truth"]) > 0

    def test_a_file_of_that_name_is_reached_by_a_path(self, file, tmp_path, monkeypatch):
        file(RECORD, name="embedded")
        monkeypatch.chdir(tmp_path)
        assert len(load_records("./embedded")[0]) == 1 < len(load_records("embedded")[0])
