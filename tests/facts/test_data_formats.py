"""Formats of data files (JSON, JSON Lines, CSV), and the schemas of known data sets."""

from __future__ import annotations

import json

import pytest
from data_files import FACT, case, writer

from kne_easyedit.facts.readers import data_digest
from kne_easyedit.facts.records import BadRecord, load_records, load_requests, to_request


@pytest.fixture
def file(tmp_path):
    return writer(tmp_path)


class TestFormats:
    @pytest.mark.parametrize(("name", "records"), [("facts-with-bom.json", 1), ("facts.jsonl", 3), ("facts.csv", 3)])
    def test_as_people_keep_their_facts(self, name, records):
        requests, complaints = load_records(case(name))
        assert len(requests) == records and complaints == []
        assert requests[0] == {**to_request(FACT), "index": 0}
        assert load_requests(case(name)) == requests and len(data_digest(case(name))) == 64

    @pytest.mark.parametrize("ending", ["data.json", "data.txt", "data"])
    def test_the_content_tells_the_format(self, file, ending):
        lines = "\n".join(
            [json.dumps(FACT), "", json.dumps({**FACT, "prompt": "The\u2028\x85 Peru is"}, ensure_ascii=False)]
        )
        requests, _ = load_records(file(lines, ending))
        assert [request["prompt"] for request in requests] == [FACT["prompt"], "The\u2028\x85 Peru is"]
        assert len(load_records(file("\n\ufeffprompt\ttarget_new\nA b\tc\n".lstrip("\n"), ending))[0]) == 1
        assert load_records(file('prompt;target_new;subject\r\n"A; b";c;\r\n', ending))[0][0]["prompt"] == "A; b"
        assert len(load_records(file(json.dumps(FACT), ending))[0]) == 1

    def test_a_torn_line_is_a_bad_record_with_its_number(self, file):
        text = json.dumps(FACT) + '\n{"prompt": "The cap\n\n' + json.dumps(FACT)
        with pytest.raises(BadRecord, match="record 1: line 2: no JSON"):
            load_records(file(text))
        requests, (_,) = load_records(file(text), on_bad="skip")
        assert [request["index"] for request in requests] == [0, 2]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [("A b,c,d\nA b,c", "line 2: 3 cells, the header has 2"), ('A b,c\n"A b,c', "line 3: no CSV")],
    )
    def test_a_row_of_other_cells(self, file, rows, message):
        requests, (complaint,) = load_records(file(f"prompt,target_new\n{rows}"), on_bad="skip")
        assert len(requests) == 1 and message in complaint

    @pytest.mark.parametrize("lines", [False, True])
    def test_a_number_keeps_its_digits(self, file, lines):
        found = [f'{{"prompt": "Python is at version", "target_new": {text}}}' for text in ("3.10", "1e3", "-0.50")]
        text = "\n".join(found) if lines else f"[{', '.join(found)}]"
        assert [one["target_new"] for one in load_records(file(text))[0]] == ["3.10", "1e3", "-0.50"]

    def test_a_template_in_place_of_a_prompt_in_every_format(self, file):
        wanted = to_request({"template": "The capital of {} is", "subject": "Peru", "target_new": "Oslo"})
        line = '{"template": "The capital of {} is", "subject": "Peru", "target_new": "Oslo"}'
        table = "template,subject,target_new\nThe capital of {} is,Peru,Oslo"
        for text in (line, f"{line}\n{line}", f"[{line}]", table):
            assert load_records(file(text))[0][0] == {**wanted, "index": 0}

    def test_a_name_twice_in_a_header(self, file):
        with pytest.raises(ValueError, match=r"data.*: 'target_new' stands twice in the header"):
            load_records(file("prompt,target_new,target_new\nThe capital of Peru is,Oslo,Rome"))

    def test_rows_after_a_badly_quoted_one_are_read(self, file):
        rows = ["The capital of Peru is,Rome", 'The capital of Chile is,"Oslo" ,x', "The capital of Spain is,Lima"]
        requests, complaints = load_records(file("\n".join(["prompt,target_new", *rows])), on_bad="skip")
        assert [(one["index"], one["target_new"]) for one in requests] == [(0, "Rome"), (2, "Lima")]
        assert len(complaints) == 1 and "record 1: line 3: no CSV" in complaints[0]
        _, (open_quote,) = load_records(file('prompt,target_new\nA b,c\n"A b,c\nA,c\nB,c'), on_bad="skip")
        assert "line 3 to 5: no CSV" in open_quote, "it has taken all that follows"

    @pytest.mark.parametrize(
        "content",
        ["[" * 100_000, '[{"prompt": ' + "9" * 5000 + "}]", "name,age\nx,3\n", "prompt\nx\n", "{\n", "\x00"],
        ids=lambda c: c[:20],
    )
    def test_no_data_file(self, file, content):
        with pytest.raises(ValueError, match=r"data\.json: not a JSON file"):
            load_records(file(content))


class TestShapes:
    def test_counterfact(self, caplog):
        (first, second), _ = load_records(case("schema-counterfact.json"))
        assert first == {
            "prompt": "The capital of Norway is",
            "target_new": "Lisbon",
            "ground_truth": "Oslo",
            "subject": "Norway",
            "index": 0,
            "rephrase_prompt": "Norway has its seat of government in",
            "portability": {"Paraphrase": {"prompt": ["Norway, whose capital city is"], "ground_truth": ["Lisbon"]}},
            "locality": {
                "Neighborhood": {
                    "prompt": ["The capital of Sweden is", "The capital of Finland is", "The capital of Denmark is"],
                    "ground_truth": ["Oslo"] * 3,
                }
            },
        }
        assert second["prompt"] == "Haruki Murakami writes in"
        assert "'generation_prompts' of CounterFact (2 times)" in caplog.text

    def test_mquake(self):
        (request,), _ = load_records(case("schema-mquake.json"))
        assert (request["prompt"], request["subject"], request["target_new"]) == (
            "Émile Zola is a citizen of",
            "Émile Zola",
            "Japan",
        )
        question = "What is the capital of the country of which Émile Zola is a citizen?"
        assert request["portability"] == {"Multi_hop": {"prompt": [question], "ground_truth": ["Tokyo"]}}

    def test_mquake_of_several_rewrites_says_how_to_convert_it(self):
        record = json.loads(case("schema-mquake.json").read_text(encoding="utf-8"))[0]
        record["requested_rewrite"] *= 2
        with pytest.raises(
            ValueError, match=r"requested_rewrite: 2 rewrites in one MQuAKE case.*write a record of each"
        ):
            to_request(record)

    def test_zsre(self):
        (request,), _ = load_records(case("schema-zsre-mend.json"))
        assert (request["prompt"], request["target_new"], request["ground_truth"]) == (
            "Which continent is Lake Superior on?",
            "Africa",
            "North America",
        )
        assert request["locality"]["Unrelated"]["ground_truth"] == ["William Shakespeare"]

    def test_cknowedit(self):
        """As in the case, and with the lists of probes that its published files have."""
        path = case("schema-cknowedit.json")
        (request,), _ = load_records(path)
        assert (request["prompt"], request["target_new"], request["ground_truth"], request["subject"]) == (
            "法国的首都是",
            "罗马",
            "巴黎",
            None,
        )
        assert request["rephrase_prompt"] == "请问法国的首都是哪里？"
        assert request["portability"] == {
            "Portability": {"prompt": ["法国首都所在的河流是"], "ground_truth": ["台伯河"]}
        }
        record = json.loads(path.read_text(encoding="utf-8"))[0]
        record["portability"] = [{"prompt": "法国首都所在的河流是", "answer": "台伯河"}]
        assert {**to_request(record), "index": 0} == request
