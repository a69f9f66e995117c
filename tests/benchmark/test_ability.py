"""General ability: a small task in the harness's own format, offline, on the edited model that is in memory."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy
import pytest
import torch
from conftest import make_llama, make_tokenizer, tiny_hparams, weights
from pytest import approx
from runs import job_fixture, lines_of, quick_fixture, record  # noqa: F401  (fixtures)

from kne_easyedit import cli
from kne_easyedit.benchmark import run
from kne_easyedit.benchmark.ability import ability, require_tasks
from kne_easyedit.benchmark.asking import probabilities
from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.general import Examination
from kne_easyedit.benchmark.markdown_report import report_text
from kne_easyedit.facts.encoding import encode

DOCUMENTS = [
    ("The capital of France is", ["Paris", "Rome", "Lima"], 1),
    ("The river that flows through Rome is", ["Oslo", "Tiber"], 1),
    ("Ada was spoken to in", ["Madrid", "Spain"], 0),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
metadata:
  version: 1
"""


@pytest.fixture(name="task")
def task_fixture(tmp_path, monkeypatch) -> str:
    """The file of a task."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: make test-ability runs this")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": q, "choices": choices, "label": label} for q, choices, label in DOCUMENTS]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "towns.yaml").write_text(TASK.format(name="towns", file=tmp_path / "documents.jsonl"))
    return str(tmp_path / "towns.yaml")


def expected(model, tokenizer) -> float:
    """The accuracy by hand: the most probable choice after the question."""
    right = 0
    for question, choices, label in DOCUMENTS:
        found = probabilities(model, [encode(tokenizer, question, choice) for choice in choices])
        right += max(range(len(choices)), key=found.__getitem__) == label
    return right / len(DOCUMENTS)


def test_the_score_is_that_by_hand_and_nothing_is_changed(task):
    for seed in (10, 11, 12):
        model, tokenizer = make_llama(seed=seed), make_tokenizer()
        kept, vocabulary = weights(model), len(tokenizer)
        random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
        states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        scores = ability(model, tokenizer, [task])
        assert scores["towns/acc"]["value"] == approx(expected(model, tokenizer))
        assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
        assert weights(model) == kept
        assert len(tokenizer) == vocabulary
    assert ability(model, tokenizer, [task], limit=1)["towns/acc"]["value"] in (0, 1)


@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_a_run_asks_before_and_after(mode, task, job, quick):
    job.mode, job.neighbours, job.batch_size, job.ability = mode, 0, 2 if mode == "batch" else 1, [task]
    seen = []
    of = Examination.of

    def keeping(self, model, tokenizer):
        seen.append((expected(model, tokenizer), of(self, model, tokenizer)["ability"]["towns/acc"]["value"]))
        return of(self, model, tokenizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Examination, "of", keeping)
        own = run(job)["methods"]["KNE"]
    assert len(seen) == 2 and all(by_hand == approx(found) for by_hand, found in seen)
    assert [own["ability_before"]["towns/acc"], own["ability"]["towns/acc"]] == approx([its for its, _ in seen])
    assert all(line["ability_before"]["towns/acc"]["value"] == approx(seen[0][0]) for line in lines_of(job))
    text = report_text(collect([job.folder]), "Report", {})
    assert "## General ability" in text and "| towns/acc | " in text
    assert json.loads((job.folder / "manifest.json").read_text())["general"]["ability"] == [task]


def test_kne_edit_prints_both(task, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained(tmp_path / "tiny-model")
    make_tokenizer().save_pretrained(tmp_path / "tiny-model")
    Path("kne.yaml").write_text(json.dumps(tiny_hparams(model_name="tiny-model").to_dict()))
    Path("text.txt").write_text("The capital of France is Paris .")
    fact = ("edit", "--prompt", "The capital of France is", "--target", "Rome", "--hparams", "kne.yaml")
    asked = ("--neighbours", "0", "--ability", task, "--ability-limit", "2", "--perplexity", "text.txt")
    assert cli.main([*fact, *asked, "--out", "rome"]) == 0
    printed = capsys.readouterr().out
    assert "beside the facts:" in printed and "towns/acc" in printed and "perplexity" in printed


def test_without_the_harness_the_extra_is_named_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kne_easyedit.benchmark.ability.find_spec", lambda _: None)
    arguments = [
        "edit",
        "--prompt",
        "a",
        "--target",
        "b",
        "--out",
        "out",
        "--ability",
        "hellaswag",
        "--model",
        "no/such",
    ]
    assert cli.main(arguments) == 1
    assert (
        "ability: hellaswag needs lm-evaluation-harness: pip install 'kne_easyedit[ability]'" in capsys.readouterr().err
    )
    assert not Path("out").exists()
    with pytest.raises(ValueError, match="ability: 'piqa' is named twice"):
        require_tasks(["piqa", "piqa"])


def test_tasks_that_cannot_be_asked_are_named(task, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ability: .*nowhere\.yaml does not exist"):
        require_tasks([str(tmp_path / "nowhere.yaml")])
    with pytest.raises(ValueError, match=r"no task 'hellaswog'; did you mean .*hellaswag"):
        require_tasks(["hellaswog"])
    require_tasks([task])
    Path(task).write_text(TASK.format(name="towns", file=tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match=r"ability: .*towns\.yaml: .*gone\.jsonl"):
        ability(make_llama(), make_tokenizer(), [task])
