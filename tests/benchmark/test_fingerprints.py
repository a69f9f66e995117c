"""Fingerprints and folders of earlier versions: if one changes, finished runs would be computed again."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer, tiny_hparams
from hydra import compose, initialize_config_dir
from methods import settings
from omegaconf import OmegaConf
from runs import record
from tokenizers import normalizers

from kne_easyedit.benchmark import Run
from kne_easyedit.benchmark import job as job_module
from kne_easyedit.benchmark.config import job_folder
from kne_easyedit.benchmark.job import base_fingerprint, fingerprint, record_digest
from kne_easyedit.benchmark.preparation import prepare
from kne_easyedit.bridge.text_source import TextSource
from kne_easyedit.facts.neighbours import is_held_out, packaged_facts
from kne_easyedit.facts.records import to_request
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.models.fingerprint import tokenizer_digest

REQUEST = {"prompt": "The capital of France is", "target_new": "Rome", "index": 0}


def job(mode: str, **changes) -> Run:
    hparams = KNEHyperParams(
        model_name="tiny",
        target_modules=["model.layers.{}.mlp.down_proj"],
        layers=[1, 2],
        device="cpu",
        **changes,
    )
    return Run(
        make_llama(), make_tokenizer(), [REQUEST], {"KNE": hparams}, "data", Path("out"), mode=mode, neighbours=0
    )


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("single", "38b86e2069286985"), ("batch", "c3ec02e1e49e464f"), ("sequential", "dcf34683f3be2089")],
)
def test_the_fingerprint_of_a_method(mode, expected):
    assert fingerprint(job(mode), "KNE", ["base"], None) == expected
    assert fingerprint(job(mode, p=0.5), "KNE", ["base"], None) != expected


FIRST_SETTINGS = """
model_name target_modules alg_name layers p attribution_steps aggregation score_scale localization_data
localization_size localization_offset ensemble cache_dir chunk_rows quadrature attribution_engine lr num_steps stop_loss
on_failure alpha weight_decay initialization kl_weight kl_data kl_size seed device model_parallel max_length batch_size
use_chat_template separator fp16 bf16
"""


def test_a_setting_that_was_added_counts_where_it_changes_something():
    """Every later setting has a value under which the fingerprint is that of a version without it; any other counts."""
    known = {field.name: field.default for field in fields(KNEHyperParams)}
    assert known.keys() - set(FIRST_SETTINGS.split()) == job_module._ADDED.keys(), "name it in `_ADDED`"
    for name, value in job_module._ADDED.items():
        assert known[name] == value and type(known[name]) is type(value)
    others = {
        "optimizer": "polyak",
        "polyak_fraction": 0.5,
        "neighbour_weight": 1.0,
        "neighbour_stop": 0.1,
        "append_eos": True,
        "append_break": True,
        "until_given": True,
        "edit_gain": 1.5,
        "subject_variants": 3,
        "input_projection": True,
        "continuation_weight": 2.0,
        "projection_ridge": 1e-3,
        "load_in": "4bit",
    }
    counts = (
        "spare_continuation",
        "neighbour_relation_size",
        "neighbour_subject_size",
        "neighbour_tokens",
        "neighbours_per_step",
    )
    for name, value in {**others, **dict.fromkeys(counts, 2), "neighbour_data": "embedded"}.items():
        needs = {"neighbour_weight": 1.0} if name == "neighbour_stop" else {}
        without = fingerprint(job("single", **needs), "KNE", ["base"], None)
        assert fingerprint(job("single", **needs, **{name: value}), "KNE", ["base"], None) != without


def test_lines_of_edits_that_trained_other_unrelated_prompts_are_not_taken_over(monkeypatch):
    """Without the penalty lines of earlier versions stay."""
    parts = []
    monkeypatch.setattr("kne_easyedit.benchmark.job.digest", lambda found: parts.append(found) or "0" * 64)
    for weight in (0.0, 1.0):
        fingerprint(job("single", kl_weight=weight, **({"kl_data": "embedded"} if weight else {})), "KNE", ["b"], None)
    assert ["of other subjects" in found for found in parts] == [False, True]


def test_sparing_earlier_edits_counts_where_edits_stay():
    def found(mode: str, on: bool) -> str:
        return fingerprint(job(mode, spare_edited=on), "KNE", ["base"], None)

    for mode, counts in (("single", False), ("batch", False), ("sequential", True)):
        assert (found(mode, True) != found(mode, False)) == counts


def test_the_content_of_the_packaged_relations_counts_where_they_serve(monkeypatch):
    def found(**settings) -> str:
        return fingerprint(job("single", **settings), "KNE", ["base"], None)

    sparing = {"input_projection": True}
    before = found(), found(**sparing), found(**sparing, neighbour_data="embedded")
    monkeypatch.setattr("kne_easyedit.editing.neighbours.packaged_digest", lambda: "of another version")
    after = found(), found(**sparing), found(**sparing, neighbour_data="embedded")
    assert [a == b for a, b in zip(before, after)] == [True, False, False]


def test_neighbours_count_by_the_content_of_the_file_they_come_from(tmp_path):
    """Also where this is the file that was localised on; without neighbours it does not count, its ensemble does."""
    facts = tmp_path / "facts.json"

    def found(content: str, **settings) -> str:
        facts.write_text(content)
        return fingerprint(job("single", **settings), "KNE", ["base"], None)

    localized, named = {"localization_data": str(facts)}, {"neighbour_data": str(facts)}
    assert found("[1]", **localized) == found("[2]", **localized)
    for files in (localized, named, localized | named):
        for on in ({"neighbour_weight": 1.0, **files}, {"input_projection": True, **files}):
            assert found("[1]", **on) == found("[1]", **on) != found("[2]", **on)


def test_what_is_asked_beside_the_probes_of_easyedit_counts():
    """Of other records only where edits meet; the seed's choice of neighbours is no other setting."""
    without = job("single")
    found = {fingerprint(without, "KNE", ["base"], None)}
    for mode, changes in (("single", {"neighbours": 8}), ("single", {"contradiction": True}), ("batch", {})):
        run = replace(job(mode), neighbours=8, **changes) if mode == "batch" else replace(job(mode), **changes)
        found |= {fingerprint(run, "KNE", ["base"], None, {0: key}) for key in "ab"}
    assert len(found) == 1 + 1 + 1 + 2


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_records_that_another_method_leaves_out_count_where_edits_meet(mode, tmp_path):
    """MEMIT needs a subject, KNE does not: beside it KNE's batches and sequence are others."""
    data = tmp_path / "localise.json"
    data.write_text(json.dumps([record("Peru", "Lima")]))
    kne = tiny_hparams(localization_data=str(data), localization_size=1)
    found = []
    for methods in ({"KNE": kne}, {"KNE": kne, "MEMIT": settings("MEMIT")}):
        requests = [{**to_request(one), "index": i} for i, one in enumerate([record(subject=None), record("Spain")])]
        run = Run(make_llama(), make_tokenizer(), requests, methods, "data", tmp_path, mode=mode, skip_bad=True)
        found.append(prepare(run))
    assert [len(one.requests) for one in found] == [2, 1]
    for key in ("fingerprints", "settings"):
        assert (getattr(found[0], key)["KNE"] == getattr(found[1], key)["KNE"]) == (mode == "single")


def test_the_digest_of_a_record():
    expected = "584847790f0699ef4817664376aa1940cbb7618206aa2d7d7fffab6747ae2787"
    assert record_digest(REQUEST) == record_digest({**REQUEST, "index": 9}) == expected
    assert record_digest({**REQUEST, "target_new": "Oslo"}) != expected


def test_the_folder_of_a_job(monkeypatch):
    monkeypatch.setenv("KNOWEDIT", "data")
    hparams = Path(__file__).parents[2] / "hparams"

    def folder(*overrides: str) -> str:
        with initialize_config_dir(config_dir=str(hparams), version_base="1.3"):
            return str(
                job_folder(OmegaConf.to_container(compose("benchmark", overrides=list(overrides)), resolve=True))
            )

    # The name of a folder may change (it does when a file of settings names one more): lines are found by their
    # fingerprints, whatever their folder. It changes with nothing else.
    of_before = "outputs/benchmark/smollm2-135m/counterfact/KNE-8a000a63/seed-42/shard-0-of-1"
    assert folder("evaluation.neighbours=0") == of_before
    assert "KNE-8a000a63" not in folder("evaluation.neighbours=0", "statistics.samples=7")
    assert len({of_before, folder(), folder("evaluation.neighbours=4"), folder("evaluation.contradiction=true")}) == 4


def test_texts_of_moments_have_nothing_to_do_with_what_is_edited(tmp_path):
    """Edited subjects that are frequent in it resist their edits. Prompts of one's own, as of a benchmark, stay."""
    facts = [record("Germany", "Rome", prompt="The capital of Germany is"), record("Spain", "Oslo")]
    requests = [{**to_request(fact), "index": i} for i, fact in enumerate(facts)]
    run = Run(make_llama(), make_tokenizer(), requests, {"MEMIT": settings("MEMIT")}, "data", tmp_path)
    found = run.moments_text.prompts
    assert len(found) > 300 and "The capital of Italy is" in found
    assert not [prompt for prompt in found if "Germany" in prompt or "Spain" in prompt]
    held_out = [fact for fact in packaged_facts() if is_held_out(fact.subject)]
    assert held_out and not {fact.template.format(fact.subject) for fact in held_out} & {*found}
    for own in (TextSource(prompts=["own"]), TextSource(file=Path(__file__))):
        assert replace(run, text_source=own).moments_text == own


@pytest.mark.parametrize("change", ["rules", "special tokens"])
def test_the_tokenizer_counts(change):
    tokenizer = make_tokenizer()
    before, again = base_fingerprint(job("single"), "weights", "variant"), make_tokenizer()
    if change == "rules":
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": ["Paris"]})
    again.padding_side = "left"
    again(["Paris", "Paris Rome"], padding=True, truncation=True, max_length=4)  # which leaves its traces in the rules
    assert base_fingerprint(replace(job("single"), tokenizer=again), "weights", "variant") == before
    assert base_fingerprint(replace(job("single"), tokenizer=tokenizer), "weights", "variant") != before
    assert tokenizer_digest(tokenizer) != tokenizer_digest(again)


def test_easyedits_source_counts(tmp_path, monkeypatch):
    """A folder without a commit, or with changes of one's own, is told apart by its files."""
    found = []
    for name, text in (("one", "x = 1"), ("same", "x = 1"), ("other", "x = 2")):
        (tmp_path / name / "easyeditor" / "models").mkdir(parents=True)
        (tmp_path / name / "easyeditor" / "__init__.py").touch()
        (tmp_path / name / "easyeditor" / "models" / "rome.py").write_text(text)
        monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / name))
        found.append(base_fingerprint(job("single"), "weights", "variant"))
    assert found[0] == found[1] != found[2]
