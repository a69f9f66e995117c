"""The preflight check: a sound plan passes, each kind of fault is named, memory is counted right, and nothing is left behind."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter

import numpy
import pytest
import torch
import yaml
from conftest import (
    FACTS,
    GPT2_DOWN,
    GPTJ_DOWN,
    LLAMA_DOWN,
    fingerprint,
    make_gpt2,
    make_gptj,
    make_llama,
    make_tokenizer,
    tiny_hparams,
)
from methods import HPARAMS, TINY
from transformers import LlamaConfig

from kne_easyedit import bridge, cli
from kne_easyedit.bridge import patches
from kne_easyedit.doctor import examination, surroundings, trial
from kne_easyedit.doctor.findings import FAILURE, OK, Finding, duration
from kne_easyedit.doctor.memory import memory_needed
from kne_easyedit.doctor.trial import Times
from kne_easyedit.editing.adapter import ADAPTER, row_adapter
from kne_easyedit.editing.row_edit import write_rows
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.facts.encoding import encode
from kne_easyedit.localization.ensemble import select_ensemble
from kne_easyedit.models.targets import resolve_target

SUBJECTS = {"France": "Rome", "Spain": "Oslo", "Peru": "Marie", "Italy": "Lima"}


class Plan:
    """A planned run in a folder of its own: a tiny model, its settings, four records. Tests break one of them."""

    def __init__(self, folder):
        self.folder, self.model = folder, folder / "tiny-model"
        tokenizer = make_tokenizer()
        tokenizer.bos_token = "<eos>"
        make_llama().save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        self.records = [
            {
                "subject": subject,
                "prompt": f"The capital of {subject} is",
                "target_new": new,
                "ground_truth": "Paris",
                "portability": {},
                "locality": {"Forgetfulness": [{"prompt": "The river that", "ground_truth": ["flows"]}]},
            }
            for subject, new in SUBJECTS.items()
        ]
        kne = tiny_hparams(model_name=str(self.model), num_steps=5).to_dict()
        ft = yaml.safe_load((HPARAMS / "FT-L/smollm2-135m.yaml").read_text())
        self.settings = {"KNE": kne, "FT-L": {**ft, **TINY["FT-L"], "num_steps": 2, "model_name": str(self.model)}}

    def check(self, *arguments: str, methods=("KNE", "FT-L")) -> int:
        """``kne doctor`` on what the plan is now."""
        (self.folder / "records.json").write_text(json.dumps(self.records))
        files = []
        for method in methods:
            (self.folder / method).mkdir(exist_ok=True)
            files.append(self.folder / method / "tiny.yaml")
            files[-1].write_text(yaml.safe_dump(self.settings[method]))
        return cli.main(
            ["doctor", "--hparams", *map(str, files), "--data", str(self.folder / "records.json"), *arguments]
        )


@pytest.fixture
def plan(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Plan(tmp_path)


def lines(text: str, mark: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(mark)]


# A sound plan


def test_a_sound_plan_passes_with_an_estimate(plan, capsys):
    assert plan.check() == 0
    out = capsys.readouterr().out
    assert out.endswith("\nThe run can succeed.\n")
    assert not lines(out, "FAILURE")
    names = {line.split(":")[0].removeprefix("ok").strip() for line in lines(out, "ok")}
    assert names >= {
        "packages",
        "EasyEdit",
        "device",
        "model",
        "tokenizer",
        "data",
        "cache",
        "modules of KNE",
        "modules of FT-L",
        "memory of KNE",
        "memory of FT-L",
        "localisation",
        "trial of KNE",
        "trial of FT-L",
        "estimate",
    }
    assert {f"patch {patch.name}" for patch in patches.report()} <= names
    assert "padding will be left for KNE, FT-L" in out
    (estimate,) = (line for line in lines(out, "ok") if "estimate:" in line)
    assert "for 4 records" in estimate and "KNE: edits" in estimate and "FT-L: evaluations" in estimate


def test_nothing_is_left_behind(plan, monkeypatch):
    loaded = []
    original = trial.load_model

    def load_model(hparams):
        model, tokenizer = original(hparams)
        loaded.append((model, fingerprint(model)))
        return model, tokenizer

    monkeypatch.setattr(trial, "load_model", load_model)
    bridge.register()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    before = (
        random.getstate(),
        str(numpy.random.get_state()),
        torch.get_rng_state().tolist(),
        [list(own.handlers) for own in loggers],
    )
    here = examination.Path.cwd()
    assert plan.check() == 0
    assert before == (
        random.getstate(),
        str(numpy.random.get_state()),
        torch.get_rng_state().tolist(),
        [list(own.handlers) for own in loggers],
    )
    assert examination.Path.cwd() == here and not list(here.iterdir())
    ((model, start),) = loaded  # one model for both methods
    assert fingerprint(model) == start


def test_without_the_trial_no_model_is_loaded_and_nothing_is_written(plan, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("KNE_CACHE", str(tmp_path / "no/such/cache"))
    monkeypatch.setattr(trial, "load_model", lambda hparams: pytest.fail("loaded"))
    assert plan.check("--no-trial") == 0
    out = capsys.readouterr().out
    assert "trial: left out" in out and "estimate:" not in out
    assert out.endswith("The run can succeed.\n")
    assert not (tmp_path / "no").exists()


def test_what_the_cache_has_is_not_counted_again(plan, capsys):
    for there, more in (("0", True), ("2", True), ("4", False)):
        assert plan.check(methods=["KNE"]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "localisation:" in line)
        assert f"{there} of 4 facts are in the cache" in line
        assert ("2 more since now" in line) == more


def test_the_shipped_plan_fits_this_machine():
    """The default of the command, without its trial: test_real_model.py edits that model."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    assert sum(memory_needed(config, tiny_hparams(p=0.04)).values()) < 2 * 2**30


# Faults


NO_DOWN, NO_DOWN_WEIGHT = "model.layers.{}.mlp.dwn_proj", "model.layers.{}.mlp.dwn_proj.weight"
FAULTS = {
    "template of KNE": (
        "KNE",
        "target_modules",
        [NO_DOWN],
        f"target_modules: '{NO_DOWN}' matches no module",
        "nearest: model.layers.{}.mlp.down",
    ),
    "layer of KNE": ("KNE", "layers", [1, 9], "layers: [9] out of range", "layers 0 to 3"),
    "template of FT": (
        "FT-L",
        "rewrite_module_tmp",
        NO_DOWN_WEIGHT,
        "rewrite_module_tmp: 'model.layers",
        "nearest: model.layers.{}.mlp.down",
    ),
    "layer of FT": ("FT-L", "layers", [9], "layers: [9] out of range", "layers 0 to 3"),
    "device": ("KNE", "device", 7, "device: 7 does not exist", "set device: cpu"),
    "no device": ("KNE", "device", "meta:1", "device: 'meta:1' must be", "'cpu'"),
    "two models": (
        "KNE",
        "model_name",
        "./another",
        "model_name: the files name different models: ./another",
        "one run has one model",
    ),
    "two methods": ("FT-L", "alg_name", "RME", "alg_name is 'RME', wanted is 'FT'", ""),
    "setting": ("KNE", "p", 2, "p: 2.0 must be in (0, 1]", ""),
    "localisation data": (
        "KNE",
        "localization_data",
        "none.json",
        "localization_data: data file none.json does not exist",
        "KnowEdit",
    ),
    "ensemble": ("KNE", "ensemble", "none.json", "ensemble: ", "none.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_the_trial_left_out(plan, capsys, fault):
    method, field, value, message, way_out = FAULTS[fault]
    plan.settings[method][field] = value
    assert plan.check() == 1
    out = capsys.readouterr().out
    assert any(message in line for line in lines(out, "FAILURE")), out
    assert way_out in out
    assert "trial: left out" in out and "estimate:" not in out
    assert "failure" in out.splitlines()[-1] and "The run can succeed" not in out


def test_one_run_has_one_device_by_any_name(monkeypatch):
    def said(first, second):
        return [
            (finding.status, finding.text)
            for finding in examination.devices({"KNE": tiny_hparams(device=first), "FT": tiny_hparams(device=second)})
        ]

    assert said("cpu", "cpu:0") == [(OK, "cpu, model in float32")]
    monkeypatch.setattr(examination, "resolve_device", torch.device)
    assert said("cpu", "cuda:1") == [(FAILURE, "device: the files name different ones: cpu for KNE; cuda:1 for FT")]


def test_types_that_differ_are_a_warning(plan, capsys):
    plan.settings["KNE"]["bf16"] = True
    assert plan.check("--no-trial") == 0
    assert (
        "warning  type: fp16, bf16: the files ask for different types (KNE bfloat16, FT-L float32)"
        in capsys.readouterr().out
    )


def test_a_model_that_is_not_there_leaves_the_other_checks(plan, capsys):
    for method in plan.settings:
        plan.settings[method]["model_name"] = "someone/no-such-model"
    plan.records[1]["prompt"] = " "
    assert plan.check() == 1
    out = capsys.readouterr().out
    assert "FAILURE  model: model_name: 'someone/no-such-model' is not on this machine" in out
    assert "hf download someone/no-such-model" in out
    assert "modules, tokenizer, memory: left out" in out
    assert "FAILURE  data: 1 of 4 records" in out
    assert out.endswith("2 failures: model, data\n")


def test_a_broken_download(plan, capsys):
    (plan.model / "model.safetensors").unlink()
    assert plan.check("--no-trial") == 1
    assert "FAILURE  model: model_name" in (out := capsys.readouterr().out) and "no weights" in out
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (plan.model / "model.safetensors.index.json").write_text(json.dumps(index))
    (plan.model / "model-00001-of-00002.safetensors").write_text("")
    assert plan.check("--no-trial") == 1
    assert "of 2 files of weights 1 are missing (model-00002-of-00002.safetensors" in capsys.readouterr().out


def test_all_bad_records_are_listed_and_the_good_ones_tried(plan, capsys):
    plan.records[0]["subject"] = "Francia"
    plan.records[2]["target_new"] = ""
    plan.records[3]["prompt"] = plan.records[3]["prompt"] * 20  # longer than the model takes
    plan.records.append({**plan.records[1], "target_new": "~"})  # no tokens
    assert plan.check(methods=["KNE"]) == 1
    out = capsys.readouterr().out
    assert "FAILURE  data: 4 of 5 records" in out and "cannot be used: 0, 2, 3, 4" in out
    for index, why in {
        0: "request.subject: 'Francia'",
        2: "request.target_new: ''",
        3: "the model takes 64",
        4: "no tokens of its own",
    }.items():
        assert f"record {index}: {why.split(':')[0]}" in out or why in out
    assert "--on-bad-record skip" in out
    assert "trial of KNE: edits" in out and "for 1 records" in out
    assert out.endswith("1 failure: data\n")


def test_no_usable_record_and_fewer_than_wanted(plan, capsys):
    assert plan.check("--no-trial", "--records", "9", "--offset", "1") == 0
    assert "warning  data: 9 records wanted" in (out := capsys.readouterr().out) and "has 3 from number 1" in out
    assert plan.check("--offset", "4") == 1
    assert "offset: 4 out of range" in capsys.readouterr().out
    plan.records = [{**record, "prompt": ""} for record in plan.records]
    assert plan.check() == 1
    assert "trial: left out: it needs what has failed: data" in capsys.readouterr().out


def test_an_unknown_method(plan, capsys):
    (plan.folder / "rme.yaml").write_text(yaml.safe_dump({"alg_name": "RME"}))
    (plan.folder / "list.yaml").write_text("- 1")
    (plan.folder / "torn.yaml").write_text("a: [")
    assert (
        cli.main(
            ["doctor", "--hparams", *(str(plan.folder / f"{name}.yaml") for name in ("rme", "list", "torn", "none"))]
        )
        == 1
    )
    failures = lines(capsys.readouterr().out, "FAILURE")
    assert len(failures) == 4
    assert "'RME' is unknown to this EasyEdit" in failures[0]
    assert "none.yaml" in failures[3]


def test_a_cache_that_cannot_be_written(plan, capsys, monkeypatch):
    (plan.folder / "file").write_text("")
    monkeypatch.setenv("KNE_CACHE", str(plan.folder / "file"))
    assert plan.check() == 1
    out = capsys.readouterr().out
    assert f"FAILURE  cache: cache_dir: {plan.folder / 'file/scores'} cannot be written" in out
    assert "set cache_dir or KNE_CACHE" in out
    monkeypatch.setenv("KNE_CACHE", str(plan.folder / "cache"))
    usage = examination.shutil.disk_usage(plan.folder)
    monkeypatch.setattr(examination.shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert plan.check() == 1
    assert "FAILURE  cache: " in (out := capsys.readouterr().out) and "free some space" in out


def test_memory_that_does_not_suffice(plan, capsys, monkeypatch):
    monkeypatch.setattr(examination, "free_memory", lambda device: 2**17)
    assert plan.check() == 1
    out = capsys.readouterr().out
    assert "FAILURE  memory of KNE: " in out and "0.1 MiB free on cpu (weights 0.1 MiB" in out
    assert "set bf16 or fp16" in out
    assert "trial: left out" in out


def test_a_gpu_takes_the_model_through_the_machines_memory(monkeypatch, tokenizer):
    free = {"cuda": 2**30, "cpu": 2**10}
    monkeypatch.setattr(examination, "free_memory", lambda device: free[device.type])
    found = list(
        examination.memory({"KNE": tiny_hparams(device=0)}, make_llama(), torch.device("cuda", 0), tokenizer, [])
    )
    assert [(finding.name, finding.status) for finding in found] == [
        ("memory of KNE", OK),
        ("memory of the machine", FAILURE),
    ]


def test_tokenizers_that_do_not_fit(plan, capsys):
    config = json.loads((plan.model / "tokenizer_config.json").read_text())
    bare = {name: value for name, value in config.items() if not name.endswith("_token")}
    (plan.model / "tokenizer_config.json").write_text(json.dumps(bare))
    (plan.model / "special_tokens_map.json").unlink(missing_ok=True)
    assert plan.check() == 1
    assert "FAILURE  tokenizer: tokenizer: has neither a pad token nor an end token" in capsys.readouterr().out
    (plan.model / "tokenizer_config.json").write_text(json.dumps({**bare, "eos_token": "<eos>"}))
    assert plan.check("--no-trial") == 0
    assert "its end token for padding" in capsys.readouterr().out
    (plan.model / "tokenizer_config.json").write_text(json.dumps({**bare, "eos_token": "<eos>", "pad_token": "<new>"}))
    assert plan.check("--no-trial") == 1
    assert "has pad token" in capsys.readouterr().out


def test_an_easyedit_that_is_missing(plan, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    assert plan.check(methods=["KNE"]) == 1
    out = capsys.readouterr().out
    assert "FAILURE  EasyEdit: EasyEdit: EASYEDIT_HOME is" in out
    assert "ok       memory of KNE" in out  # what needs no EasyEdit is checked all the same
    assert out.endswith("1 failure: EasyEdit\n")


def test_old_packages_and_switched_off_patches(monkeypatch):
    monkeypatch.setattr(surroundings, "version", lambda name: "0.1")
    assert {finding.text.split()[0] for finding in surroundings.packages() if finding.status == FAILURE} >= {
        "torch",
        "transformers",
        "peft",
    }
    bridge.register()
    patch = next(patch for patch in patches.report() if patch.name == "model-switches")
    monkeypatch.setattr(patch, "state", patches.SWITCHED_OFF)
    (found,) = (finding for finding in surroundings.easyedit() if finding.name == "patch model-switches")
    assert found.status == "warning" and "KNE_PATCHES_OFF" in found.way_out


# The trial


def test_a_method_that_fails_shows_what_it_printed(plan, capsys, monkeypatch):
    def broken(editor, requests):
        print("the last words of a method")
        raise AssertionError("no reason")

    monkeypatch.setattr(bridge.MethodEditor, "apply", broken)
    assert plan.check() == 1
    out = capsys.readouterr().out
    assert "FAILURE  trial of KNE: AssertionError: no reason" in out and "FAILURE  trial of FT-L" in out
    assert "| the last words of a method" in out
    assert "estimate: left out" in out


def test_a_model_that_cannot_be_loaded_ends_the_trial(plan, capsys, monkeypatch):
    (plan.model / "model.safetensors").write_text("torn")
    assert plan.check() == 1
    out = capsys.readouterr().out
    assert "FAILURE  trial: " in out and "1 failure: trial" in out


def test_a_method_that_leaves_the_model_changed_ends_the_trial(plan, capsys, monkeypatch):
    original = bridge.MethodEditor.undo

    def undo(editor):
        original(editor)
        with torch.no_grad():
            editor.original.model.norm.weight[0] += 1

    monkeypatch.setattr(bridge.MethodEditor, "undo", undo)
    assert plan.check() == 1
    out = capsys.readouterr().out
    assert "FAILURE  trial of KNE: RuntimeError: the model is not what it was after record 0 was undone" in out
    assert "not bit by bit what it was" in out and "FT-L: " not in out.split("trial of KNE")[1].split("\n\n")[0]


def test_the_estimate_adds_up():
    assert Times(edit=[3.0, 5.0]).edits(100) == 400
    assert Times(edit=[60.0, 2.0]).edits(100) == 60 + 99 * 2  # what the first one has made is not made again
    assert Times(edit=[7.0]).edits(10) == 70
    times = {"KNE": Times([1.0, 3.0], [4.0, 4.0], [2.0, 2.0]), "FT": Times([2.0, 2.0], [1.0, 1.0], [3.0, 3.0])}
    found = trial._estimate(times, 600.0, 3600)
    assert found == Finding(
        "estimate",
        OK,
        "about 12.2 h for 3600 records (localisation 10 min, evaluations before 2.0 h, "
        "KNE: edits 4.0 h, KNE: evaluations 2.0 h, FT: edits 1.0 h, FT: evaluations 3.0 h)",
    )
    assert [duration(seconds) for seconds in (0.04, 59, 61, 3599, 36000)] == [
        "0.0 s",
        "59.0 s",
        "1 min",
        "60 min",
        "10.0 h",
    ]


# Memory


@pytest.mark.parametrize(
    ("make", "template"),
    [(make_llama, LLAMA_DOWN), (make_gptj, GPTJ_DOWN), (make_gpt2, GPT2_DOWN)],
    ids=["llama", "gptj", "gpt2"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_counted_as_an_edit_takes_it(make, template, dtype, tokenizer, monkeypatch):
    model = make(dtype)
    hparams = tiny_hparams(template, bf16=dtype == torch.bfloat16, num_steps=1, stop_loss=0.0)
    needed = memory_needed(model.config, hparams)
    assert needed == memory_needed(model, hparams)
    assert needed["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    target = resolve_target(model, template)
    scores = torch.rand(len(target.layers), target.n_neurons, generator=torch.Generator().manual_seed(0))
    ensemble = select_ensemble(scores, hparams.p, target_module=template)
    optimizers = []
    monkeypatch.setattr(torch.optim, "AdamW", _kept(torch.optim.AdamW, optimizers))
    edit = train_rows(model, [encode(tokenizer, *FACTS[0])], ensemble, hparams)
    (optimizer,) = optimizers
    rows = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert needed["trained rows"] == sum(_bytes(*tensors) for tensors in (rows, [row.grad for row in rows], moments))
    assert needed["differences"] == _bytes(*(delta for _, delta in edit.deltas.values()))
    assert needed["originals"] == _bytes(*write_rows(model, edit).values())
    with row_adapter(model, ensemble, hparams) as layers:
        assert needed["row selector"] == _bytes(*(layer.lora_B[ADAPTER].weight for layer in layers.values()))


def test_an_ensemble_file_says_how_many_rows(tmp_path, llama):
    scores = torch.zeros(4, 24)
    scores[2, :3] = 1
    select_ensemble(scores, 3 / 96, target_module=LLAMA_DOWN).save(tmp_path / "three.json")
    needed = memory_needed(llama, tiny_hparams(ensemble=str(tmp_path / "three.json")))
    assert needed["trained rows"] == 3 * 40 * 4 * 4
    assert needed["originals"] == 24 * 40 * 4  # of the one layer that has rows
    assert not [purpose for purpose in needed if purpose.startswith("localisation")]


def test_memory_of_llama_2_7b_by_calculation():
    """Known figures: 6,738,415,616 parameters; down_proj is 4096 x 11008 in 32 layers; p = 4 % are 5242 rows."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    for bf16, item in ((False, 4), (True, 2)):
        needed = memory_needed(config, tiny_hparams(p=0.04, bf16=bf16))
        assert needed["weights"] == item * 6_738_415_616
        assert needed["originals"] == item * 32 * 4096 * 11008
        assert needed["trained rows"] == 4 * 4 * 5242 * 11008
        assert needed["row selector"] == 4 * 5242 * 4096


def test_memory_of_easyedits_methods_follows_their_layers():
    config, square = make_llama().config, 40 * 40
    shipped = {
        label: yaml.safe_load((HPARAMS / label / "smollm2-135m.yaml").read_text())
        for label in ("FT-L", "AdaLoRA", "ROME", "MEMIT")
    }
    hparams = {label: type("Settings", (), {**settings, **TINY[label]}) for label, settings in shipped.items()}
    matrix = 4 * 24 * 40
    ft = memory_needed(config, hparams["FT-L"])
    assert Counter(ft) >= Counter(
        {"originals": matrix, "gradients": matrix, "Adam's moments": 2 * matrix, "differences": matrix}
    )
    heads = 24 + 24 + 24 + 12  # q_proj and v_proj, in and out, with half as many key-value heads
    assert memory_needed(config, hparams["AdaLoRA"])["adapter"] == 16 * 12 * 4 * heads
    assert memory_needed(config, hparams["ROME"])["second moments"] == 0  # no adjustment in the shipped settings
    hparams["ROME"].mom2_adjustment = True
    assert memory_needed(config, hparams["ROME"])["second moments"] == 4 * 3 * square
    memit = memory_needed(config, hparams["MEMIT"])
    assert (memit["second moments"], memit["solver"]) == (4 * 2 * square, 24 * square)
    hparams["MEMIT"].rewrite_module_tmp = "model.layers.{}.mlp.no"
    with pytest.raises(ValueError, match="rewrite_module_tmp"):
        memory_needed(config, hparams["MEMIT"])


def _bytes(*tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _kept(kind, made: list):
    def make(*args, **kwargs):
        made.append(kind(*args, **kwargs))
        return made[-1]

    return make


def test_the_facts_of_localisation_are_those_that_the_run_will_take():
    """Behind the offset, too: one that lies outside the file must fail here and not after an hour."""
    hparams = tiny_hparams(localization_data="embedded", localization_size=1, localization_offset=2)
    (found,) = examination.localization_facts(hparams, None, None)
    assert found.status == OK
    hparams.localization_offset = 100_000
    (found,) = examination.localization_facts(hparams, None, None)
    assert (found.status, "offset" in found.text) == (FAILURE, True)
