"""Data of users: own categories, odd answers, separators, missing subjects, start tokens, from file to results."""

from __future__ import annotations

import json

import pytest
from conftest import make_llama, make_tokenizer, tiny_hparams
from data_files import FACT, FACT_PAIR, PROBE, case, job_of, lines_of, writer
from methods import settings, tokenizer_for
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kne_easyedit.benchmark import run
from kne_easyedit.benchmark.answers import begins_with
from kne_easyedit.bridge import patches
from kne_easyedit.facts.encoding import chat_prompt, encode, encode_request
from kne_easyedit.facts.records import (
    load_records,
    load_requests,
    to_request,
    with_chat_template,
    without_chat_template,
)
from kne_easyedit.hparams import KNEHyperParams


@pytest.fixture
def file(tmp_path):
    return writer(tmp_path)


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
        """Without a blank the answer's letters join the last word: cut at the prompt's length, half would be lost."""
        with pytest.raises(ValueError, match=r"prompt: 'in was i' is tokenised differently.*'nxyz'.*separator"):
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
            ValueError, match=r"separator: FT joins prompt and answer by ' ', KNE by ''; .*run KNE alone"
        ):
            run(job_of([to_request(FACT)], tmp_path, hparams))

    def test_without_its_patch_it_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(patches, "applied", list)
        with pytest.raises(ValueError, match=r"separator: .*evaluation-separator.*switches off"):
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

    def test_what_is_said_in_a_template_is_found_again(self, chatting):
        request = to_request(FACT)
        wrapped = with_chat_template(request, chatting)
        assert wrapped["prompt"] != request["prompt"]
        assert (
            without_chat_template(wrapped, chatting)
            == without_chat_template(request, chatting)
            == {
                "portability": {},
                "locality": {},
                **request,
            }
        )

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
