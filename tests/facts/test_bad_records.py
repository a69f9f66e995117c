"""Records that cannot be used: named and left out, or the run ends. None is dropped silently."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import fingerprint, make_gpt2, make_llama, weights
from data_files import FACT, PROBE, case, job_of, lines_of

from kne_easyedit.benchmark import run
from kne_easyedit.benchmark.answers import free_answers
from kne_easyedit.benchmark.bad_records import is_record_error
from kne_easyedit.bridge import MethodEditor
from kne_easyedit.facts.records import BadRecord, load_records, require_evaluable, to_request


class TestBadRecords:
    def test_skip_edits_the_good_ones_and_lists_the_others(self, tmp_path):
        """Also those that tokenizer or model refuse (8: a probe, 9: a prompt is too long), before the first edit."""
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
        with pytest.raises(ValueError, match=r"request: tokenizer: token .* the model knows those below 7"):
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
        schemas = ("counterfact", "mquake", "zsre-mend", "cknowedit")
        samples = [json.loads(case(f"schema-{name}.json").read_text(encoding="utf-8"))[0] for name in schemas]
        shapes = [FACT, *samples]
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
            except ValueError as error:  # noqa: PERF203  (every record by itself)
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
        [
            MemoryError(),
            OSError("disk"),
            ImportError("x"),
            RuntimeError("DefaultCPUAllocator: not enough memory"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"),
        ],
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
        with pytest.raises(RuntimeError, match=r"KNE: record 0 has failed .half-way. and left the model other than"):
            run(job_of([to_request(FACT)], tmp_path, mode="sequential", skip_bad=True))

    def test_a_free_answer_ends_where_the_model_does(self, tokenizer):
        """GPT-2 has no position beyond its last: asked for more it would fail."""
        model = make_gpt2(n_positions=8)
        request = {"prompt": "The capital of Peru is", "target_new": "Oslo"}
        short, full = (free_answers(its, tokenizer, request).beginning for its in (model, make_gpt2()))
        assert short != full
