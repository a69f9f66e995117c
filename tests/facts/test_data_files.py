"""What people bring as data: shapes, formats, odd and bad records, from the file to the results. Nothing is dropped in silence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import fingerprint, make_gpt2, make_llama, make_tokenizer, tiny_hparams, weights
from methods import settings, tokenizer_for
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kne_easyedit.benchmark import Run, run
from kne_easyedit.benchmark.answers import free_answer
from kne_easyedit.benchmark.bad_records import is_record_error
from kne_easyedit.bridge import MethodEditor, patches
from kne_easyedit.facts.encoding import chat_prompt, encode, encode_request
from kne_easyedit.facts.readers import data_digest
from kne_easyedit.facts.records import BadRecord, load_records, load_requests, require_evaluable, to_request
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.benchmark.answers import begins_with

CASES = Path(os.environ.get("KNE_CASES", Path(__file__).parents[3] / "shared/cases"))
FACT = {"subject": "Peru", "prompt": "The capital of Peru is", "target_new": "Oslo", "ground_truth": "Lima"}
PROBE = {"prompt": "The river of Rome is", "ground_truth": "Tiber"}


def case(name: str) -> Path:
    if not (CASES / name).is_file():
        pytest.skip(f"{CASES / name} is not there; name its folder by KNE_CASES")
    return CASES / name


@pytest.fixture
def file(tmp_path):
    def write(content, name="data.json") -> Path:
        path = tmp_path / name
        data = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def job_of(requests, tmp_path, hparams=None, **changes) -> Run:
    requests = [{"index": i, **request} for i, request in enumerate(requests)]
    hparams = hparams or {"KNE": tiny_hparams()}
    return Run(
        make_llama(), make_tokenizer(), requests, hparams, "FACTS", tmp_path / "out", **{"fluency": False, **changes}
    )


def lines_of(job) -> list[dict]:
    return [json.loads(line) for line in (job.folder / "results.jsonl").read_text(encoding="utf-8").split("\n") if line]


class TestCategories:
    def test_own_categories_and_flat_fields_are_evaluated(self, tmp_path):
        requests, _ = load_records(case("own-categories.json"))
        run(job := job_of(requests, tmp_path))
        first, second = (line["metrics"]["post"] for line in lines_of(job))
        assert set(first["portability"]) == {"one_hop_acc"} and set(first["locality"]) == {"neighborhood_acc"}
        assert set(second["locality"]) == {"neighborhood_acc"}

    def test_knowedits_categories_come_first_and_in_their_order(self):
        found = {
            name: [PROBE] for name in ("mine", "Logical_Generalization", "Reasoning", "../../x", "Subject_Aliasing")
        }
        request = to_request({**FACT, "portability": found})
        assert list(request["portability"]) == [
            "Subject_Aliasing",
            "Reasoning",
            "Logical_Generalization",
            "mine",
            "../../x",
        ]

    def test_flat_fields_join_what_is_there(self):
        flat = {
            f"{s}_{k}": v
            for s in ("portability", "locality")
            for k, v in (("prompt", ["A b", "C d"]), ("ground_truth", ["e", "f"]))
        }
        request = to_request(
            {
                **FACT,
                **flat,
                "rephrase": ["One ?", "Two ?"],
                "locality": {"neighborhood": [PROBE], "Forgetfulness": [PROBE]},
            }
        )
        assert request["rephrase_prompt"] == "One ?"
        assert request["portability"] == {
            "Paraphrase": {"prompt": ["Two ?"], "ground_truth": ["Oslo"]},
            "one_hop": {"prompt": ["A b", "C d"], "ground_truth": ["e", "f"]},
        }
        assert request["locality"]["neighborhood"] == {
            "prompt": [PROBE["prompt"], "A b", "C d"],
            "ground_truth": ["Tiber", "e", "f"],
        }

    def test_a_category_needs_a_name(self):
        """EasyEdit's evaluator would leave out a section whose names are empty."""
        with pytest.raises(ValueError, match="locality: ''"):
            to_request({**FACT, "locality": {"": [PROBE]}})

    def test_what_is_not_evaluated_is_named(self, file, caplog):
        path = file(
            [
                {
                    **FACT,
                    "generation_prompts": ["x"],
                    "mine\ud800": 1,
                    "locality": {"Own": [{"prompt": "x", "ground_truth": ""}]},
                }
            ]
        )
        load_records(path)
        (record,) = caplog.records
        for name in (
            "'generation_prompts' of KnowEdit (1 times)",
            r"'mine\ud800'",
            "probes without an answer (1 times)",
        ):
            assert name in record.getMessage()

    def test_localisation_names_the_facts_that_it_leaves_out(self, file, caplog):
        assert len(load_requests(file([FACT, "bad"]))) == 1
        assert "1 of the records wanted" in caplog.text and "record 1: is a str" in caplog.text


class TestAnswers:
    @pytest.mark.parametrize(
        ("prompt", "answer"),
        [
            ("The capital of Peru is", " Oslo"),
            ("The capital of Peru is", "Oslo \n"),
            ("The capital of Peru is \t", "Oslo"),
        ],
    )
    def test_the_natural_answer_is_trained_localised_and_asked(self, tokenizer, prompt, answer):
        plain = encode(tokenizer, FACT["prompt"], "Oslo")
        odd = {**FACT, "prompt": prompt, "target_new": answer}
        assert encode_request(tokenizer, odd) == encode(tokenizer, prompt, answer) == plain
        request = to_request(
            {**odd, "rephrase_prompt": prompt, "locality": {"Own": [{"prompt": prompt, "ground_truth": [[answer]]}]}}
        )
        assert (request["prompt"], request["target_new"], request["rephrase_prompt"]) == (
            FACT["prompt"],
            "Oslo",
            FACT["prompt"],
        )
        assert request["locality"]["Own"] == {"prompt": [FACT["prompt"]], "ground_truth": ["Oslo"]}

    def test_line_ends_of_a_prompt_stay(self):
        assert to_request({**FACT, "prompt": "The capital of Peru is\n"})["prompt"].endswith("is\n")

    def test_the_first_alias_that_is_a_text(self):
        assert to_request({**FACT, "ground_truth": [[], ["", None], ["Lima", "L."]]})["ground_truth"] == "Lima"

    @pytest.mark.parametrize(("answer", "text"), [(1912, "1912"), (1.5, "1.5"), (0, "0")])
    def test_numbers_are_taken_as_they_are_written(self, answer, text):
        request = to_request({**FACT, "target_new": answer, "ground_truth": answer})
        assert request["target_new"] == request["ground_truth"] == text

    @pytest.mark.parametrize(
        "answer", [True, float("nan"), float("inf"), {"str": "Oslo"}, ["Oslo"], "Os\ud800lo"], ids=str
    )
    def test_what_is_no_text(self, answer):
        with pytest.raises(ValueError, match="target_new"):
            to_request({**FACT, "target_new": answer})
        if answer != ["Oslo"]:
            with pytest.raises(ValueError, match=r"locality\.Own\[0\]\.ground_truth"):
                to_request({**FACT, "locality": {"Own": [{"prompt": "x", "ground_truth": answer}]}})

    def test_a_prompt_that_is_no_beginning_of_prompt_and_answer(self, tokenizer):
        """Without a blank the answer's letters join the last word: cut by the prompt's length, half of them would be lost."""
        with pytest.raises(ValueError, match="prompt: 'in was i' is tokenised differently.*'nxyz'.*separator"):
            encode(tokenizer, "in was i", "nxyz", "")

    def test_a_separator_that_joins_the_prompts_last_token_is_no_wrong_cut(self):
        """A byte-level tokenizer with digits apart makes one token of a line end and the blank before a number."""
        backend = Tokenizer(
            models.BPE({"a": 0, "Ċ": 1, "Ġ": 2, "ĊĠ": 3, "1": 4, "b": 5, "ab": 6}, [("Ċ", "Ġ"), ("a", "b")])
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
        assert tokenizer("a\n")["input_ids"] == [0, 1]
        fact = encode(tokenizer, "a\n", "11")
        assert (fact.ids, fact.answer) == ((0, 3, 4, 4), (4, 4))
        with pytest.raises(ValueError, match="tokenised differently"):
            encode(tokenizer, "a", "b1", "")

    def test_odd_texts_pass_through_a_run(self, tmp_path):
        requests, complaints = load_records(case("odd-text.json"))
        assert complaints == []
        summary = run(job := job_of(requests, tmp_path))
        lines = lines_of(job)
        assert [line["prompt"] for line in lines] == [request["prompt"] for request in requests] and summary[
            "skipped"
        ] == []
        assert {line["target_new"] for line in lines} == {"Oslo", "أوسلو", "Oslo 🇳🇴"}
        same = [line for line in lines if (line["prompt"], line["target_new"]) == ("The capital of Peru is", "Oslo")]
        assert (
            len(same) == 3 and len({json.dumps([line["losses"], line["metrics"]]) for line in same}) == 1
        )  # three spellings, one edit


class TestSeparator:
    @pytest.mark.parametrize("separator", [" -> ", "x", None])
    def test_only_white_space(self, separator):
        with pytest.raises(ValueError, match="separator: "):
            tiny_hparams(separator=separator)

    def test_the_yaml_has_it(self, tmp_path):
        (tmp_path / "h.yaml").write_text('model_name: m\ntarget_modules: ["a.{}.b"]\nseparator: ""\n')
        assert KNEHyperParams.from_hparams(tmp_path / "h.yaml").separator == ""

    def test_it_joins_in_training_localisation_and_evaluation(self, tmp_path, monkeypatch):
        """Letters are tokens here, so that words may touch: as in Chinese."""
        seen = []
        request = to_request(
            {"prompt": "xyzx", "target_new": "zy", "locality": {"Own": [{"prompt": "yx", "ground_truth": "zy"}]}}
        )
        job = job_of([request], tmp_path, {"KNE": tiny_hparams(separator="")})
        call = type(job.tokenizer).__call__
        monkeypatch.setattr(
            type(job.tokenizer), "__call__", lambda self, text, *a, **k: seen.append(text) or call(self, text, *a, **k)
        )
        run(job)
        assert "xyzxzy" in seen  # localised and trained
        assert ["xyzxzy"] in seen and ["yxzy"] in seen  # evaluated
        assert not any("xyzx zy" in text for text in seen)
        assert lines_of(job)[0]["metrics"]["post"]["rewrite_acc"] == [1.0]

    def test_with_a_blank_nothing_changes(self, tokenizer):
        assert encode(tokenizer, *FACT_PAIR, " ") == encode(tokenizer, *FACT_PAIR) != encode(tokenizer, "x", "y", "")

    def test_other_methods_are_refused_by_name(self, tmp_path):
        hparams = {"KNE": tiny_hparams(separator=""), "FT": settings("FT")}
        with pytest.raises(
            ValueError, match="separator: FT joins prompt and answer by ' ', KNE by ''; .*run KNE alone"
        ):
            run(job_of([to_request(FACT)], tmp_path, hparams))

    def test_without_its_patch_it_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(patches, "applied", lambda: [])
        with pytest.raises(ValueError, match="separator: .*evaluation-separator.*switches off"):
            run(
                job_of(
                    [to_request({"prompt": "xy", "target_new": "zy"})], tmp_path, {"KNE": tiny_hparams(separator="")}
                )
            )

    def test_a_run_on_chinese_data_hints_at_it(self, tmp_path, caplog):
        job = job_of([to_request(FACT)], tmp_path)
        run(job)
        assert "separator" not in caplog.text
        job.requests[0] |= {"prompt": "法国的首都是", "subject": None}
        run(job)
        assert "FACTS: its script sets no blanks between words; KNE's setting separator: ''" in caplog.text

    def test_an_answer_may_go_on_without_a_blank(self):
        assert begins_with("罗马是意大利的首都", "罗马") and not begins_with("Romeo", "Rome")


FACT_PAIR = ("The capital of France is", "Rome")


class TestBadRecords:
    def test_skip_edits_the_good_ones_and_lists_the_others(self, tmp_path):
        """Also those that only tokenizer and model can tell (8: a probe, 9: the prompt is too long), before the first edit."""
        path = case("bad-records.json")
        requests, complaints = load_records(path, on_bad="skip")
        job = job_of(requests, tmp_path, skip_bad=True, complaints=complaints)
        before = fingerprint(job.model)
        summary = run(job)
        assert fingerprint(job.model) == before
        assert [line["index"] for line in lines_of(job)] == [0]
        assert sorted(int(text.split("record ")[1].split(":")[0]) for text in summary["skipped"]) == list(range(1, 14))
        told = "\n".join(summary["skipped"])
        assert "record 8: locality.Forgetfulness[0].prompt: " in told and "the model takes 64" in told
        assert all(len(text) < 600 for text in summary["skipped"])  # a long value is cut

    def test_fail_names_the_first(self):
        with pytest.raises(
            BadRecord, match=r"bad-records\.json: record 1: request\.subject: 5 is not a text.*--on-bad-record skip"
        ):
            load_records(case("bad-records.json"))

    def test_fail_names_the_first_that_is_too_long(self, tmp_path):
        job = job_of([to_request(FACT), to_request({**FACT, "rephrase_prompt": "city " * 99})], tmp_path)
        with pytest.raises(
            BadRecord, match=r"FACTS: record 1: rephrase_prompt: prompt: .* the model takes 64.*--on-bad-record skip"
        ):
            run(job)
        assert not (job.folder / "results.jsonl").exists()

    def test_tokens_that_the_model_does_not_know(self, tokenizer):
        with pytest.raises(ValueError, match="request: tokenizer: token .* the model knows those below 7"):
            require_evaluable(to_request(FACT), tokenizer, make_llama(vocab_size=7))

    @pytest.mark.parametrize(
        "value",
        [None, True, 5, 1.5, float("nan"), "", " ", "\ud800", [], ["x"], {}, {"x": 1}, [[[[]]]], "{}", "\x00", 10**400],
        ids=lambda value: repr(value)[:20],
    )
    @pytest.mark.parametrize(
        "field",
        [
            "prompt",
            "text",
            "target_new",
            "labels",
            "subject",
            "concept",
            "ground_truth",
            "rephrase_prompt",
            "rephrase",
            "portability",
            "locality",
            "locality_prompt",
            "portability_ground_truth",
            "requested_rewrite",
            "src",
            "alt",
            "loc",
            "target_old",
            "questions",
            "paraphrase_prompts",
            "new_single_hops",
            "neighborhood_prompts",
        ],
    )
    def test_anything_anywhere_is_a_request_or_a_value_error(self, field, value):
        shapes = [FACT]
        for name in ("schema-counterfact.json", "schema-mquake.json", "schema-zsre-mend.json", "schema-cknowedit.json"):
            shapes.append(json.loads(case(name).read_text(encoding="utf-8"))[0])
        deep = [{**shape, section: {"Own": value}} for shape in shapes for section in ("portability", "locality")]
        probes = [{**FACT, "locality": {"Own": [{**PROBE, key: value}]}} for key in PROBE]
        for record in (
            [{**shape, field: value} for shape in shapes]
            + deep
            + probes
            + [{"requested_rewrite": {field: value}}, {"requested_rewrite": [value]}]
        ):
            try:
                json.dumps(to_request(record), ensure_ascii=False).encode()
            except ValueError as error:
                str(error).encode()  # can be printed

    @pytest.mark.parametrize(
        "error",
        [IndexError("x"), KeyError("x"), TypeError("x"), RuntimeError("x"), AssertionError(), ZeroDivisionError()],
        ids=repr,
    )
    def test_what_easyedits_code_raises_is_skipped_by_its_kind(self, tmp_path, monkeypatch, error):
        job = job_of([to_request(FACT), to_request({**FACT, "target_new": "Rome"})], tmp_path, skip_bad=True)
        apply = MethodEditor.apply

        def broken(self, requests):
            if requests[0]["target_new"] == "Oslo":
                raise error
            return apply(self, requests)

        monkeypatch.setattr(MethodEditor, "apply", broken)
        (complaint,) = run(job)["skipped"]
        assert complaint.startswith(f"FACTS: record 0: KNE: {type(error).__name__}")
        assert [line["index"] for line in lines_of(job)] == [1]
        job.skip_bad = False
        with pytest.raises(BadRecord, match=f"record 0: KNE: {type(error).__name__}"):
            run(job)

    @pytest.mark.parametrize(
        "error",
        [MemoryError(), OSError("disk"), ImportError("x"), RuntimeError("DefaultCPUAllocator: not enough memory")],
        ids=repr,
    )
    def test_what_is_no_records_fault_ends_the_run(self, tmp_path, monkeypatch, error):
        def broken(self, requests):
            raise error

        monkeypatch.setattr(MethodEditor, "apply", broken)
        assert not is_record_error(error)
        with pytest.raises(type(error)):
            run(job_of([to_request(FACT)], tmp_path, skip_bad=True))

    def test_an_interrupt_while_a_fact_is_asked_undoes_its_edit(self, tmp_path, monkeypatch):
        job = job_of([to_request(FACT)], tmp_path)
        before, evaluate, calls = fingerprint(job.model), MethodEditor.evaluate, []

        def interrupted(self, *args, **options):
            calls.append(weights(job.model))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return evaluate(self, *args, **options)

        monkeypatch.setattr(MethodEditor, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(job)
        assert calls[0] == before["weights"] != calls[1]
        assert fingerprint(job.model) == before

    def test_a_sequence_goes_on_after_a_bad_record(self, tmp_path, monkeypatch):
        """Its figures are those of the sequence without the record."""
        facts = [
            FACT,
            {**FACT, "target_new": "Madrid"},
            {**FACT, "subject": "Spain", "prompt": "The capital of Spain is", "target_new": "Rome"},
        ]
        good = job_of(
            [to_request(facts[0]), {**to_request(facts[2]), "index": 2}],
            tmp_path / "good",
            mode="sequential",
            retention_every=1,
        )
        run(good)
        job = job_of(map(to_request, facts), tmp_path, mode="sequential", retention_every=1, skip_bad=True)
        before, apply = fingerprint(job.model), MethodEditor.apply

        def broken(self, requests):
            if requests[0]["target_new"] != "Madrid":
                return apply(self, requests)
            algorithm, self.editor.apply_algo = self.editor.apply_algo, lambda *args, **options: {}["subject"]
            try:
                return apply(self, requests)
            finally:
                self.editor.apply_algo = algorithm

        monkeypatch.setattr(MethodEditor, "apply", broken)
        summary = run(job)
        assert fingerprint(job.model) == before
        assert summary["skipped"] == ["FACTS: record 1: KNE: KeyError: 'subject'"]

        def figures(job):
            return [(line["index"], line["losses"], line["metrics"], line["after"]) for line in lines_of(job)]

        assert figures(job) == figures(good) and [line[0] for line in figures(job)] == [0, 2]
        assert [stop["edits"] for stop in summary["methods"]["KNE"]["retention"]] == [1, 2]

    def test_a_sequence_ends_where_a_failed_edit_left_the_model_changed(self, tmp_path, monkeypatch):
        def broken(self, requests):
            with torch.no_grad():
                next(self.original.parameters()).view(-1)[0] += 1
            raise IndexError("half-way")

        monkeypatch.setattr(MethodEditor, "apply", broken)
        with pytest.raises(RuntimeError, match="KNE: record 0 has failed .half-way. and left the model other than"):
            run(job_of([to_request(FACT)], tmp_path, mode="sequential", skip_bad=True))

    def test_a_free_answer_ends_where_the_model_does(self, tokenizer):
        """GPT-2 has no position beyond its last: asked for more it would fail."""
        model = make_gpt2(n_positions=8)
        request = {"prompt": "The capital of Peru is", "target_new": "Oslo"}
        assert free_answer(model, tokenizer, request) != free_answer(make_gpt2(), tokenizer, request)


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
        requests, (complaint,) = load_records(file(text), on_bad="skip")
        assert [request["index"] for request in requests] == [0, 2]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [("A b,c,d\nA b,c", "line 2: 3 cells, the header has 2"), ('A b,c\n"A b,c', "line 3: no CSV")],
    )
    def test_a_row_of_other_cells(self, file, rows, message):
        requests, (complaint,) = load_records(file(f"prompt,target_new\n{rows}"), on_bad="skip")
        assert len(requests) == 1 and message in complaint

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
            ValueError, match="requested_rewrite: 2 rewrites in one MQuAKE case.*write a record of each"
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


class TestSubjects:
    def test_a_record_needs_none_where_no_method_does(self, tmp_path, capsys):
        from kne_easyedit.benchmark.console import print_report

        plain = {name: value for name, value in FACT.items() if name != "subject"}
        job = job_of([to_request(plain)], tmp_path, {"KNE": tiny_hparams(), "FT": settings("FT")})
        job.tokenizer = tokenizer_for(job.hparams["FT"])
        print_report(run(job), job.folder)
        assert [line["subject"] for line in lines_of(job)] == [None, None]

    @pytest.mark.parametrize("skip", [True, False])
    def test_a_method_that_needs_one_is_named(self, tmp_path, skip):
        plain = {name: value for name, value in FACT.items() if name != "subject"}
        job = job_of([to_request(plain)], tmp_path, {"KNE": tiny_hparams(), "ROME": settings("ROME")}, skip_bad=skip)
        with pytest.raises(ValueError, match="FACTS: record 0: subject: missing, ROME cannot edit without one"):
            run(job)


class TestStartToken:
    """A template that writes the start token, and a tokenizer that adds it: everybody sees one."""

    @pytest.fixture(params=[True, False], ids=["added", "not added"])
    def chatting(self, request):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        if request.param:
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
            )
        tokenizer.chat_template = "<bos>{% for m in messages %}What is {{ m['content'] }} ?{% endfor %} "
        return tokenizer

    def test_everybody_sees_one(self, chatting, tmp_path, monkeypatch):
        job = job_of([to_request(FACT)], tmp_path, chat_template=True)
        job.model, job.tokenizer = make_llama(vocab_size=len(chatting)), chatting
        start, fed = chatting.bos_token_id, []
        forward = type(job.model).forward
        monkeypatch.setattr(
            type(job.model), "forward", lambda self, *a, **k: fed.append(k.get("input_ids")) or forward(self, *a, **k)
        )
        run(job)
        whole = [
            row for ids in fed if ids is not None for row in ids.tolist() if len(row) > 4
        ]  # not the next token alone
        assert len(whole) > 5 and {row.count(start) for row in whole} == {1}

    def test_a_prompt_that_is_in_the_template_stays(self, chatting):
        once = chat_prompt(chatting, "The city ")
        assert chat_prompt(chatting, once) == once == chat_prompt(chatting, "<bos>What is The city ?")
        assert chatting(once)["input_ids"].count(chatting.bos_token_id) == 1
        assert (
            encode_request(chatting, {"prompt": "The city", "target_new": "Rome"}, chat=True).ids.count(
                chatting.bos_token_id
            )
            == 1
        )


def test_doctor_looks_at_probes_and_subjects(tmp_path):
    """What a run would leave out, `kne doctor` names beforehand."""
    from kne_easyedit.doctor.data import data_records

    records = [
        FACT,
        {**FACT, "locality": {"Own": [{**PROBE, "prompt": "city " * 99}]}},
        {k: v for k, v in FACT.items() if k != "subject"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    plan = {"KNE": tiny_hparams(), "ROME": settings("ROME")}
    (finding,) = data_records(str(tmp_path / "data.json"), None, 0, make_tokenizer(), make_llama(), plan)
    assert (
        "record 1: locality.Own[0].prompt: " in finding.text
        and "record 2: subject: missing, ROME cannot edit" in finding.text
    )
