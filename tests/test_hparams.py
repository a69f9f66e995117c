"""KNEHyperParams: validated where they are built, read from YAML, and every shipped file is right."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from conftest import LLAMA_DOWN

from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.models.devices import resolve_device

SHIPPED = sorted((Path(__file__).resolve().parents[1] / "hparams" / "KNE").glob("*.yaml"))
MINIMAL = {"model_name": "tiny", "target_modules": [LLAMA_DOWN]}


def build(**changes):
    return KNEHyperParams.from_dict({**MINIMAL, **changes})


def write(tmp_path, text, name="settings.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


class TestShipped:
    def test_all_are_there(self):
        assert {path.stem for path in SHIPPED} >= {
            "smollm2-135m",
            "llama-7b",
            "llama2-7b-chat",
            "llama3-8b",
            "gpt-j-6B",
            "gpt2-xl",
            "mistral-7b",
            "qwen2.5-7b",
        }

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_loads(self, path):
        hparams = KNEHyperParams.from_hparams(path)
        assert hparams.alg_name == "KNE"
        assert KNEHyperParams.from_hparams(path.with_suffix("")) == hparams

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_has_only_what_it_says(self, path):
        """Every value of the file arrives; what the file leaves out is the default."""
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        loaded, default = KNEHyperParams.from_hparams(path).to_dict(), build().to_dict()
        for name, value in loaded.items():
            wanted = content.get(name, default[name])
            assert value == (float(wanted) if isinstance(value, float) else wanted)

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_is_commented(self, path):
        assert "#" in path.read_text(encoding="utf-8")


class TestDefaults:
    def test_are_those_of_the_research_fork_but_for_the_start(self):
        hparams = build()
        assert (hparams.p, hparams.attribution_steps, hparams.aggregation, hparams.localization_size) == (
            0.04,
            20,
            "max",
            200,
        )
        assert (hparams.lr, hparams.num_steps, hparams.stop_loss, hparams.alpha, hparams.weight_decay) == (
            5e-3,
            100,
            0.4,
            1,
            0,
        )
        assert hparams.initialization == "zeros"

    def test_easyedits_own_fields_are_there(self):
        names = {field.name for field in dataclasses.fields(KNEHyperParams)}
        assert names >= {
            "alg_name",
            "model_name",
            "device",
            "model_parallel",
            "max_length",
            "batch_size",
            "fp16",
            "bf16",
        }

    def test_lists_are_not_shared(self):
        build().layers.append(3)
        assert build().layers == []


RANGES = {
    "alg_name": (["ROME", "kne", ""], "must be 'KNE'"),
    "model_name": (["", "  "], "must name a model"),
    "target_modules": ([[]], "must hold at least one template"),
    "layers": ([[-1], [0, -2]], "must be numbers of layers, from 0"),
    "p": ([0.0, -0.1, 1.5, float("nan"), float("inf")], r"must be in \(0, 1\]"),
    "aggregation": (["median", ""], "must be one of"),
    "initialization": (["ones", ""], "must be one of"),
    "score_scale": (["module", ""], "must be one of"),
    "on_failure": (["ignore", ""], "must be one of"),
    "optimizer": (["adam", "sgd", ""], "must be one of"),
    "polyak_fraction": ([0.0, -0.3, 2.0, float("nan"), float("inf")], r"must be in \(0, 2\)"),
    "edit_gain": ([0.9, 0.0, -1.0, float("nan"), float("inf")], "must be at least 1 and finite"),
    "subject_variants": ([-1], "must be 0 or more"),
    "kl_size": ([0], "must be at least 1"),
    "kl_weight": ([-0.1, float("nan"), float("inf")], "must be 0 or more and finite"),
    "neighbour_weight": ([-0.1, float("nan"), float("inf")], "must be 0 or more and finite"),
    "neighbour_relation_size": ([-1], "must be 0 or more"),
    "spare_continuation": ([-1], "must be 0 or more"),
    "continuation_weight": ([-0.1, float("inf")], "must be 0 or more and finite"),
    "neighbour_subject_size": ([-1], "must be 0 or more"),
    "neighbour_tokens": ([0], "must be at least 1"),
    "neighbours_per_step": ([-1], "must be 0 or more"),
    "projection_ridge": ([0.0, -1e-5, 1.5, float("nan"), float("inf")], r"must be in \(0, 1\]"),
    "neighbour_stop": ([0.0, -1.0, float("nan"), float("inf")], "must be positive and finite, or null"),
    "quadrature": (["simpson", ""], "must be one of"),
    "attribution_engine": (["slow", ""], "must be one of"),
    "attribution_steps": ([0, -20], "must be at least 1"),
    "localization_size": ([0, -1], "must be at least 1"),
    "localization_offset": ([-1], "must be 0 or more"),
    "chunk_rows": ([0], "must be at least 1"),
    "num_steps": ([0], "must be at least 1"),
    "max_length": ([0], "must be at least 1"),
    "batch_size": ([0, -1], "must be at least 1"),
    "lr": ([0.0, -5e-3, float("nan"), float("inf")], "must be positive and finite"),
    "alpha": ([0.0, -1.0, float("nan"), float("inf")], "must be positive and finite"),
    "stop_loss": ([-0.1, float("nan"), float("inf")], "must be 0 or more and finite"),
    "weight_decay": ([-0.1, float("nan"), float("inf")], "must be 0 or more and finite"),
    "seed": ([-1, 2**32], r"must be in \[0, 2\*\*32\)"),
    "separator": (["-", " -> "], "must be white space or empty"),
    "max_memory": ([{0: "20GiB"}], "set model_parallel: true"),
    "offload_folder": (["folder"], "set model_parallel: true"),
    "load_in": (["4-bit", "int8", ""], "must be one of"),
    "device": ([-1, "gpu", "cuda:x", "cuda:-1", "cuda:", "cpu:", "0:1", ""], "must be a GPU's number, 'cpu'"),
}
ACCEPTED = {
    "p": [1.0, 1e-6],
    "layers": [[], [0], [3, 1]],
    "aggregation": ["max", "mean"],
    "initialization": ["zeros", "kaiming"],
    "quadrature": ["riemann", "gauss-legendre"],
    "attribution_engine": ["auto", "sweep", "whole"],
    "chunk_rows": [None, 1],
    "optimizer": ["adamw", "polyak"],
    "polyak_fraction": [1.0],
    "stop_loss": [0.0],
    "weight_decay": [0.0, 0.5],
    "seed": [0, 2**32 - 1],
    "device": [0, 3, "0", "cpu", "cuda", "cuda:1", "mps"],
    "num_steps": [1],
    "batch_size": [1, 20],
    "fp16": [True],
    "bf16": [True],
    "use_chat_template": [True],
    "score_scale": ["none", "layer"],
    "on_failure": ["warn", "raise"],
    "kl_data": [None, "embedded"],
    "neighbour_data": [None, "embedded", "some/file.json"],
    "neighbour_weight": [0.0, 10.0],
    "neighbour_relation_size": [0],
    "neighbour_subject_size": [0],
    "neighbours_per_step": [0, 3],
    "neighbour_stop": [None],
    "localization_offset": [0, 200],
    "model_parallel": [True],
    "localization_data": [None, "embedded", "some/file.json"],
    "ensemble": [None, "ensemble.json"],
    "cache_dir": [None, "/tmp/cache"],
    "load_in": [None, "8bit", "4bit"],
    "separator": ["", "\n"],
}
WRONG_TYPES = {
    "model_name": [7, None, ["tiny"]],
    "target_modules": [LLAMA_DOWN, None, 3, {LLAMA_DOWN: 1}],
    "layers": [3, "all", None],
    "p": ["four percent", None, [0.04], True],
    "attribution_steps": [20.0, "20", None, True],
    "aggregation": [1, None],
    "localization_data": [7, ["a.json"]],
    "localization_size": [2.5, "many", None],
    "ensemble": [1],
    "cache_dir": [0],
    "lr": ["fast", None, True],
    "num_steps": [1e2, None],
    "device": [None, 0.5, ["cpu"], True],
    "model_parallel": ["yes", 1, None],
    "fp16": [1, "true"],
    "append_eos": [1, "true", None],
    "append_break": [1, "true", None],
    "until_given": [1, "true", None],
    "input_projection": [1, "true", None],
    "spare_edited": [1, "true", None],
    "spare_continuation": [2.5, "8", None, True],
    "continuation_weight": ["much", None, True],
    "seed": ["42", 1.0],
    "separator": [None, 1],
    "max_memory": ["20GiB", 20, ["20GiB"]],
    "offload_folder": [1],
    "load_in": [4, True],
}
cases = lambda table: [(name, value) for name, values in table.items() for value in values]  # noqa: E731


class TestValidation:
    @pytest.mark.parametrize(
        ("name", "value", "rule"), [(name, value, rule) for name, (values, rule) in RANGES.items() for value in values]
    )
    def test_out_of_range(self, name, value, rule):
        with pytest.raises(ValueError, match=f"^{name}: .*{rule}") as caught:
            build(**{name: value})
        assert repr(value) in str(caught.value)

    @pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
    def test_in_range(self, name, value):
        assert getattr(build(**{name: value}), name) == value

    @pytest.mark.parametrize(("name", "value"), cases(WRONG_TYPES))
    def test_wrong_type(self, name, value):
        with pytest.raises(ValueError, match=f"^{name}: .* is a {type(value).__name__}, expected") as caught:
            build(**{name: value})
        assert repr(value) in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value"), [("layers", [0, "1"]), ("layers", [1.0]), ("target_modules", [LLAMA_DOWN, 3])]
    )
    def test_wrong_type_within_a_list(self, name, value):
        with pytest.raises(ValueError, match=rf"^{name}\[\d\]: .* is a (str|float|int), expected"):
            build(**{name: value})

    @pytest.mark.parametrize("template", ["model.layers.3.mlp.down_proj", "a.{}.{}", "a.x{}.b", "", "{0}.a"])
    def test_wrong_template(self, template):
        with pytest.raises(ValueError, match=r"target_modules: .* is not a template") as caught:
            build(target_modules=[LLAMA_DOWN, template])
        assert repr(template) in str(caught.value)

    def test_a_template_twice(self):
        with pytest.raises(ValueError, match=r"target_modules: .* holds a template twice"):
            build(target_modules=[LLAMA_DOWN, LLAMA_DOWN])

    def test_a_divergence_needs_prompts(self):
        with pytest.raises(
            ValueError, match="neighbour_relation_size: 0 and neighbour_subject_size must not both be 0"
        ):
            build(neighbour_weight=1.0, neighbour_relation_size=0, neighbour_subject_size=0)
        with pytest.raises(
            ValueError, match="neighbour_relation_size: 0 and neighbour_subject_size must not both be 0"
        ):
            build(input_projection=True, neighbour_relation_size=0, neighbour_subject_size=0)
        with pytest.raises(
            ValueError, match=r"initialization: 'kaiming' starts away .* with input_projection take zeros"
        ):
            build(input_projection=True, initialization="kaiming")
        assert build(neighbour_weight=1.0, neighbour_relation_size=0).neighbour_subject_size == 6
        with pytest.raises(ValueError, match=r"neighbour_stop: 0\.1 is read with a neighbour_weight above 0 only"):
            build(neighbour_stop=0.1, input_projection=True)
        assert build(neighbour_stop=0.1, neighbour_weight=1.0).neighbour_stop == 0.1
        with pytest.raises(ValueError, match=r"weight_decay: 0\.1 belongs to adamw; leave it 0 with optimizer: polyak"):
            build(optimizer="polyak", weight_decay=0.1)
        with pytest.raises(ValueError, match="kl_data: None must name a file of prompts"):
            build(kl_weight=1.0)
        assert build(kl_weight=1.0, kl_data="embedded").kl_weight == 1

    def test_two_precisions(self):
        with pytest.raises(ValueError, match="fp16: True and bf16 exclude each other"):
            build(fp16=True, bf16=True)

    def test_a_gain_that_no_loss_allows_is_refused(self):
        with pytest.raises(ValueError, match=r"^edit_gain: 1.5 has no effect with stop_loss: 0.*or edit_gain: 1$"):
            build(edit_gain=1.5, stop_loss=0)

    def test_every_field_is_tried(self):
        assert {*RANGES, *ACCEPTED, *WRONG_TYPES} == {field.name for field in dataclasses.fields(KNEHyperParams)}

    def test_the_constructor_validates_too(self):
        with pytest.raises(ValueError, match=r"^p: 2.0 must be"):
            KNEHyperParams("tiny", [LLAMA_DOWN], p=2.0)


class TestCoercion:
    @pytest.mark.parametrize(("value", "wanted"), [("5e-3", 5e-3), ("1e-4", 1e-4), (1, 1.0), ("0.5", 0.5)])
    def test_numbers(self, value, wanted):
        lr = build(lr=value).lr
        assert lr == wanted and type(lr) is float

    def test_what_is_no_number(self):
        for value, message in ((10**400, "100.* is beyond the range of numbers"), ("1_0", "'1_0' is a str")):
            with pytest.raises(ValueError, match=f"^lr: {message}"):
                build(lr=value)

    def test_tuples_and_paths(self, tmp_path):
        hparams = build(layers=(1, 2), target_modules=(LLAMA_DOWN,), cache_dir=tmp_path)
        assert (
            hparams.layers == [1, 2] and hparams.target_modules == [LLAMA_DOWN] and hparams.cache_dir == str(tmp_path)
        )

    def test_a_name_that_carries_a_model_is_kept(self):
        """EasyEdit unpacks a str subclass as (model, tokenizer): it must not become a plain str."""

        class Carrier(str):
            pass

        name = Carrier("tiny")
        assert build(model_name=name).model_name is name


class TestNames:
    @pytest.mark.parametrize(
        ("key", "near"),
        [
            ("learning_steps", "attribution_steps"),
            ("num_step", "num_steps"),
            ("stoploss", "stop_loss"),
            ("target_module", "target_modules"),
            ("initialisation", "initialization"),
        ],
    )
    def test_unknown_with_the_nearest(self, key, near):
        with pytest.raises(ValueError, match=f"unknown setting '{key}'") as caught:
            build(**{key: 1})
        assert repr(near) in str(caught.value)

    @pytest.mark.parametrize("key", ["zzzzzzz", 3, None])
    def test_unknown_without_a_near_one(self, key):
        with pytest.raises(ValueError, match=f"unknown setting {key!r}; known are model_name, target_modules, .*bf16"):
            KNEHyperParams.from_dict({**MINIMAL, key: 1})

    @pytest.mark.parametrize("name", MINIMAL)
    def test_missing(self, name):
        with pytest.raises(ValueError, match=f"missing setting '{name}': it has no default"):
            KNEHyperParams.from_dict({k: v for k, v in MINIMAL.items() if k != name})


class TestFile:
    def test_text_numbers_of_yaml(self, tmp_path):
        """YAML 1.1 reads 5e-3 as a text: it needs a dot to be a number."""
        path = write(tmp_path, f"model_name: tiny\ntarget_modules: [{LLAMA_DOWN!r}]\nlr: 5e-3\nalpha: 1\n")
        assert yaml.safe_load(path.read_text())["lr"] == "5e-3"
        hparams = KNEHyperParams.from_hparams(path)
        assert (hparams.lr, hparams.alpha) == (5e-3, 1.0)

    @pytest.mark.parametrize("name", ["settings", "qwen2.5-7b", "v1.0"])
    def test_suffix_may_be_left_out(self, tmp_path, name):
        path = write(tmp_path, yaml.safe_dump(MINIMAL), f"{name}.yaml")
        assert KNEHyperParams.from_hparams(str(tmp_path / name)) == KNEHyperParams.from_hparams(path) == build()

    def test_yml(self, tmp_path):
        assert KNEHyperParams.from_hparams(write(tmp_path, yaml.safe_dump(MINIMAL), "s.yml")) == build()

    def test_round_trip(self, tmp_path):
        hparams = build(layers=[1, 2], p=0.01, device="cuda:1", localization_data="embedded", seed=7, bf16=True)
        assert KNEHyperParams.from_dict(hparams.to_dict()) == hparams != build()
        assert KNEHyperParams.from_hparams(write(tmp_path, yaml.safe_dump(hparams.to_dict()))) == hparams

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere.yaml does not exist; shipped ones are under"):
            KNEHyperParams.from_hparams(tmp_path / "nowhere")

    @pytest.mark.parametrize("text", ["", "- a\n- b\n", "3\n", "just a text\n"])
    def test_not_a_mapping(self, tmp_path, text):
        with pytest.raises(ValueError, match=r"settings.yaml: holds no settings"):
            KNEHyperParams.from_hparams(write(tmp_path, text))

    @pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\tx: 1"])
    def test_not_yaml(self, tmp_path, text):
        with pytest.raises(ValueError, match=r"settings.yaml: not a YAML file"):
            KNEHyperParams.from_hparams(write(tmp_path, text))

    def test_a_file_that_is_no_text(self, tmp_path):
        path = tmp_path / "settings.yaml"
        path.write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(ValueError, match=r"settings.yaml: not a YAML file"):
            KNEHyperParams.from_hparams(path)

    @pytest.mark.parametrize(("line", "message"), [("p: 4", "p: 4.0 must be"), ("typo: 1", "unknown setting 'typo'")])
    def test_errors_name_the_file(self, tmp_path, line, message):
        with pytest.raises(ValueError, match=f"settings.yaml: {message}"):
            KNEHyperParams.from_hparams(write(tmp_path, f"{yaml.safe_dump(MINIMAL)}{line}\n"))


class TestDevice:
    @pytest.mark.parametrize(
        ("device", "wanted"), [("cpu", "cpu"), (1, "cuda:1"), ("1", "cuda:1"), ("cuda:0", "cuda:0"), ("cuda", "cuda")]
    )
    def test_resolved(self, monkeypatch, device, wanted):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert resolve_device(device) == torch.device(wanted)
