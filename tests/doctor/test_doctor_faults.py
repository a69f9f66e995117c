"""Each kind of fault of a planned run is named, with a way out."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import make_llama, tiny_hparams
from doctor_plan import lines, planned  # noqa: F401 (the fixture "plan")

from kne_easyedit import bridge, cli
from kne_easyedit.bridge import patches
from kne_easyedit.doctor import data, memory, model, surroundings
from kne_easyedit.doctor.findings import FAILURE, OK
from kne_easyedit.doctor.structure import structure_of

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
    "layers of FT that are no list": ("FT-L", "layers", 1, "layers: 1 is not a list", "layers"),
    "template of FT that is none": ("FT-L", "rewrite_module_tmp", 5, "rewrite_module_tmp: 5 is not a template", ""),
    "device": ("KNE", "device", 7, "device: 7 does not exist", "set device: cpu"),
    "no device": ("KNE", "device", "meta:1", "device: 'meta:1' must be", "'cpu'"),
    "two models": (
        "KNE",
        "model_name",
        "./another",
        "model_name: the files name different models: ./another",
        "one run has one model",
    ),
    "two methods": ("FT-L", "alg_name", "RME", "alg_name is 'RME', expected 'FT'", ""),
    "setting": ("KNE", "p", 2, "p: 2.0 must be in (0, 1]", ""),
    "localisation data": (
        "KNE",
        "localization_data",
        "none.json",
        "localization_data: data file none.json does not exist",
        "KnowEdit",
    ),
    "separators": (
        "KNE",
        "separator",
        "",
        "separator: FT-L joins prompt and answer by ' ', KNE by ''",
        "run KNE alone",
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


def test_records_without_neighbours_are_counted(tmp_path):
    """Three relations that many subjects are asked; a request without a subject has no neighbours."""
    path = tmp_path / "facts.json"
    prompts = ("The capital of {} is", "The river of {} is", "The language of {} is")
    facts = [
        {"prompt": prompt.format(subject), "subject": subject, "target_new": "Latin"}
        for subject in ("France", "Spain", "Peru", "Italy", "Oslo", "Lima", "Paris", "Madrid")
        for prompt in prompts
    ]
    path.write_text(json.dumps(facts))
    hparams = tiny_hparams(neighbour_weight=1.0, neighbour_data=str(path), neighbour_relation_size=1)
    request, alone = {**facts[0], "target_new": "Rome"}, {"prompt": "Who ?", "target_new": "Ada"}
    (found,) = data.neighbours(hparams, [request])
    assert (found.name, found.status) == ("neighbour_data", OK) and found.text.startswith("3.0 a record on average")
    (found,) = data.neighbours(hparams, [request, alone])
    assert found.status == "warning" and "1.5 a record on average" in found.text and "1 records have none" in found.text
    hparams.neighbour_data = "none.json"
    (found,) = data.neighbours(hparams, facts)
    assert found.status == FAILURE and "data file none.json does not exist" in found.text
    hparams.neighbour_weight = 0.0
    assert list(data.neighbours(hparams, facts)) == []


def test_one_run_has_one_device_by_any_name(monkeypatch):
    def said(first, second):
        return [
            (finding.status, finding.text)
            for finding in model.devices({"KNE": tiny_hparams(device=first), "FT": tiny_hparams(device=second)})
        ]

    assert said("cpu", "cpu:0") == [(OK, "cpu, model in float32")]
    monkeypatch.setattr(model, "resolve_device", torch.device)
    assert said("cpu", "cuda:1") == [(FAILURE, "device: the files name different ones: cpu for KNE; cuda:1 for FT")]


@pytest.mark.parametrize(
    ("setting", "value", "way_out"), [("batch_size", 3, "set it to 1"), ("use_chat_template", True, "ask for it there")]
)
def test_what_only_a_certain_run_obeys_is_a_warning(plan, capsys, setting, value, way_out):
    """`kne run` refuses it before the model is loaded, unless it is asked for such a run."""
    plan.settings["KNE"][setting] = value
    plan.check("--no-trial")
    out = capsys.readouterr().out
    assert any(
        f"settings: a run of single edits in plain prompts refuses these: {setting}" in its
        for its in lines(out, "warning")
    )
    assert way_out in out
    files = [str(plan.folder / method / "tiny.yaml") for method in ("KNE", "FT-L")]
    data = str(plan.folder / "records.json")
    plan.model.rename(plan.folder / "gone")
    assert cli.main(["run", "--methods", "KNE,FT-L", "--hparams", *files, "--data", data, "--out", "out"]) == 1
    assert f"{setting}: KNE's hparams" in capsys.readouterr().err


def test_types_that_differ_are_a_warning(plan, capsys):
    plan.settings["KNE"]["bf16"] = True
    assert plan.check("--no-trial") == 0
    assert (
        "warning  type: fp16, bf16: the files ask for different types (KNE bfloat16, FT-L float32)"
        in capsys.readouterr().out
    )


def test_settings_that_ask_for_two_types_are_a_failure():
    """The model could not be loaded."""
    found = list(model.devices({"FT": SimpleNamespace(alg_name="FT", device="cpu", fp16=True, bf16=True)}))
    assert [(finding.name, finding.status) for finding in found] == [("type of FT", FAILURE)]
    assert "exclude each other" in found[0].text


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
    for content in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"):
        (plan.model / "model.safetensors.index.json").write_text(content)
        assert plan.check("--no-trial") == 1
        out = capsys.readouterr().out
        assert "model.safetensors.index.json: " in out and "get the whole model" in out


@pytest.mark.parametrize(
    ("key", "value"), [("num_attention_heads", 0), ("hidden_size", "24"), ("hidden_size", -24), ("hidden_size", [])]
)
def test_a_configuration_at_fault_leaves_the_other_checks(key, value, plan, capsys):
    config = json.loads((plan.model / "config.json").read_text())
    (plan.model / "config.json").write_text(json.dumps({**config, key: value}))
    assert plan.check("--no-trial") == 1
    out = capsys.readouterr().out
    assert f"FAILURE  model: model_name: {plan.model}: " in out and "modules, tokenizer, memory: left out" in out
    with pytest.raises(ValueError, match=f"model_name: '{plan.model}' cannot be read: "):
        structure_of(str(plan.model))


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
    usage = data.shutil.disk_usage(plan.folder)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert plan.check() == 1
    assert "FAILURE  cache: " in (out := capsys.readouterr().out) and "free some space" in out
    (plan.folder / "cache/scores").mkdir(parents=True, exist_ok=True)
    (plan.folder / "cache/scores/some").write_text("")  # perhaps all of them
    plan.check("--no-trial")
    assert "warning  cache: " in (out := capsys.readouterr().out) and "less if some scores are there already" in out


def test_memory_that_does_not_suffice(plan, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**16)
    assert plan.check() == 1
    out = capsys.readouterr().out
    assert "FAILURE  memory of KNE: " in out and "0.1 MiB free on cpu (while" in out and ": weights 0.1 MiB" in out
    assert "set bf16 or fp16" in out
    assert "trial: left out" in out


def test_a_sequence_of_edits_that_is_spared_needs_more(plan, capsys, monkeypatch):
    """Only of the last of them is there too little: a warning, for edits that are taken back need no more."""
    spare = {"input_projection": True, "spare_edited": True, "neighbour_relation_size": 1, "neighbour_subject_size": 1}
    plan.settings["KNE"] |= spare
    assert plan.check("--no-trial", methods=["KNE"]) == 0
    (line,) = (line for line in lines(capsys.readouterr().out, "ok") if "memory of KNE" in line)
    first, last = (float(line.split(f" MiB {which}")[0].split()[-1]) for which in ("needed", "for the last of 4 edits"))
    assert first < last
    monkeypatch.setattr(memory, "free_memory", lambda device: int((first + last) / 2 * 2**20))
    assert plan.check("--no-trial", methods=["KNE"]) == 0
    out = capsys.readouterr().out
    assert lines(out, "warning  memory of KNE") and "set spare_edited: false" in out
    plan.records = plan.records[:1]
    assert plan.check("--no-trial", methods=["KNE"]) == 0
    assert "for the last of" not in capsys.readouterr().out


def test_a_gpu_takes_the_model_through_the_machines_memory(monkeypatch, tokenizer):
    free = {"cuda": 2**30, "cpu": 2**10}
    monkeypatch.setattr(memory, "free_memory", lambda device: free[device.type])
    found = list(memory.memory({"KNE": tiny_hparams(device=0)}, make_llama(), torch.device("cuda", 0), tokenizer, []))
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


def test_the_facts_of_localisation_are_those_that_the_run_will_take():
    """Behind the offset, too: one that lies outside the file must fail here and not after an hour."""
    hparams = tiny_hparams(localization_data="embedded", localization_size=1, localization_offset=2)
    (found,) = data.localization_facts(hparams, None, None)
    assert found.status == OK
    hparams.localization_offset = 100_000
    (found,) = data.localization_facts(hparams, None, None)
    assert (found.status, "offset" in found.text) == (FAILURE, True)


def test_a_fact_to_localise_on_that_the_model_cannot_take(plan, capsys):
    """It is named by its number, here and by the run."""
    records = [*plan.records, {**plan.records[0], "prompt": plan.records[0]["prompt"] * 20}]
    (plan.folder / "facts.json").write_text(json.dumps(records))
    plan.settings["KNE"] |= {"localization_data": str(plan.folder / "facts.json"), "localization_size": 9}
    assert plan.check("--no-trial", methods=("KNE",)) == 1
    assert any(
        "record 4 of " in line and "the model takes 64" in line for line in lines(capsys.readouterr().out, "FAILURE")
    )
    files = ("--hparams", str(plan.folder / "KNE/tiny.yaml"), "--data", str(plan.folder / "records.json"))
    assert cli.main(["run", "--methods", "KNE", *files, "--out", "out"]) == 1
    assert "record 4: prompt: " in capsys.readouterr().err
