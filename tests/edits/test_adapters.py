"""Edits saved as LoRA adapters: served by PEFT alone they equal the edit in place."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import GPT2_DOWN, LLAMA_DOWN, fingerprint, make_gpt2, make_gptj, make_llama, weights
from edits import ROWS, edit_of, full_deltas, thing_of
from peft import LoraConfig, PeftModel
from rounding import A_MODEL, roundings
from safetensors.torch import load_file

from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.editing.row_edit import Answer, RowEdit, write_rows
from kne_easyedit.edits import AnswersLost, read_adapter, save_adapter
from kne_easyedit.edits.low_rank import SERVED_RANKS, served_rank
from kne_easyedit.facts.encoding import encode

CASES = [(make_llama, LLAMA_DOWN), (make_gptj, "transformer.h.{}.mlp.fc_out"), (make_gpt2, GPT2_DOWN)]
IDS = torch.tensor([[3, 9, 4, 12, 7, 20]])
FORMS = ["portable", "exact"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def in_place(make, *edits):
    model = make()
    for edit in edits:
        write_rows(model, edit, check=False)
    return logits(model)


@pytest.mark.parametrize(("given", "revision"), [(None, "f" * 40), ("a/b", "f" * 40), ("mirror/c", None)])
def test_a_commit_belongs_to_the_repository_that_the_edit_names(tmp_path, given, revision):
    edit = thing_of(make_llama())
    named = replace(edit, base=replace(edit.base, name="a/b", revision="f" * 40))
    save_adapter(named, tmp_path / "a", base_name=given)
    config, card = config_of(tmp_path / "a"), (tmp_path / "a" / "README.md").read_text()
    assert (config["base_model_name_or_path"], config["revision"]) == (given or "a/b", revision)
    assert ("f" * 40 in card) == (revision is not None)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


class TestServedByPeft:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("make", "template"), CASES)
    def test_equals_the_edit_in_place(self, make, template, form, tmp_path):
        """Unmerged and merged; before, and with the adapter off, the model says something else."""
        edit = edit_of(make(), template)
        save_adapter(edit, tmp_path / "a", form=form, model=make())
        expected = in_place(make, edit)
        served = PeftModel.from_pretrained(make(), tmp_path / "a").eval()
        assert roundings(logits(served), expected) < A_MODEL
        with served.disable_adapter():
            assert torch.equal(logits(served), logits(make()))
            assert roundings(logits(served), expected) > 1000 * A_MODEL
        merged = served.merge_and_unload()
        assert roundings(logits(merged), expected) < A_MODEL

    @pytest.mark.parametrize("form", FORMS)
    def test_several_edits_are_their_sum(self, form, tmp_path):
        """Common rows, and modules that only one of them has."""
        first, second = edit_of(make_llama()), edit_of(make_llama(), rows={0: (2, 4), 1: (7,)})
        save_adapter([first, second], tmp_path / "both", form=form, model=make_llama())
        served = PeftModel.from_pretrained(make_llama(), tmp_path / "both")
        assert roundings(logits(served), in_place(make_llama, first, second)) < A_MODEL
        assert roundings(logits(served), in_place(make_llama, first)) > 1000 * A_MODEL

    def test_without_kne_easyedit(self, tmp_path):
        """In a process that cannot import this package, and through transformers' own loader, too."""
        edit = edit_of(make_llama())
        make_llama().save_pretrained(tmp_path / "base")
        save_adapter(edit, tmp_path / "a", model=make_llama(), base_name=str(tmp_path / "base"))
        code = """
import sys
sys.modules["kne_easyedit"] = None  # importing it fails
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
folder, base, out = sys.argv[1:]
ids = torch.tensor([[3, 9, 4, 12, 7, 20]])
model = AutoModelForCausalLM.from_pretrained(base)
model.load_adapter(folder)
with torch.no_grad():
    found = [AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits, model(input_ids=ids).logits]
torch.save(found, out)
try:
    import kne_easyedit
except ImportError:
    print("not importable")
"""
        run = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "a", tmp_path / "base", tmp_path / "out"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0 and "not importable" in run.stdout, run.stderr
        for found in torch.load(tmp_path / "out"):
            assert roundings(found, in_place(make_llama, edit)) < A_MODEL

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("make", "template"), CASES)
    def test_our_reader_gives_the_change_of_the_weights(self, make, template, form, tmp_path):
        model, edit = make(), edit_of(make(), template)
        save_adapter(edit, tmp_path / "a", form=form, model=model)
        transposed = make is make_gpt2
        expected = full_deltas(model, edit, transposed)
        _, modules = read_adapter(tmp_path / "a")
        assert {f"{name}.weight" for name in modules} == set(expected)
        for name, module in modules.items():
            found = module.delta.t() if transposed else module.delta
            assert roundings(found, expected[f"{name}.weight"]) < 8


class TestPortable:
    """What vLLM, SGLang and llama.cpp ask for: docs/serving.md."""

    def test_one_rank_and_no_scale(self, tmp_path):
        edit = edit_of(make_llama())
        report = save_adapter(edit, tmp_path / "a", model=make_llama())
        config, tensors = config_of(tmp_path / "a"), load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert report.rank == config["r"] == config["lora_alpha"] == 8
        assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
        assert config["bias"] == "none" and config["modules_to_save"] is None and not config["use_dora"]
        assert {len(t) if "lora_A" in name else t.shape[1] for name, t in tensors.items()} == {8}
        name, (chosen, delta) = next(iter(edit.deltas.items()))
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert torch.equal((b @ a)[list(chosen)], delta)  # the scale is 1
        assert not a[len(chosen) :].any() and not b[:, len(chosen) :].any()

    def test_modules_without_rows_are_left_out(self, tmp_path):
        """Also of the configuration: a bare `down_proj` would give every layer an adapter."""
        edit = edit_of(make_llama())
        edit.deltas[LLAMA_DOWN.format(1)] = (), torch.zeros(0, 40)
        save_adapter(edit, tmp_path / "a", model=make_llama())
        assert config_of(tmp_path / "a")["target_modules"] == [LLAMA_DOWN.format(layer) for layer in ROWS]
        served = PeftModel.from_pretrained(make_llama(), tmp_path / "a")
        layers = {name.removeprefix("base_model.model.") for name, m in served.named_modules() if hasattr(m, "lora_A")}
        assert layers == {LLAMA_DOWN.format(layer) for layer in ROWS}

    @pytest.mark.parametrize(
        ("rows", "max_rank", "rank"),
        [
            (1, None, 1),
            (2, None, 8),
            (239, None, 256),
            (512, None, 512),
            (239, 32, 32),
            (20, 24, 16),  # 24 is no rank of vLLM
            (655, 512, 512),
            (3, 600, 8),
        ],
    )
    def test_the_rank_is_one_that_vllm_accepts(self, rows, max_rank, rank):
        assert served_rank(rows, max_rank) == rank and rank in SERVED_RANKS

    @pytest.mark.parametrize("max_rank", [None, 600])
    def test_beyond_512_is_refused_with_the_way_out(self, max_rank):
        with pytest.raises(ValueError, match=r"513 changed rows.*max_rank=512.*smaller p.*merge"):
            served_rank(513, max_rank)

    def test_says_the_rank(self, tmp_path):
        report = save_adapter(edit_of(make_llama()), tmp_path / "a", max_rank=2, model=make_llama())
        assert "Rank 1" in report.notes[0] and "max_rank 2 is not a rank that vLLM accepts" in report.notes[0]

    def test_says_what_sglang_leaves_out(self, tmp_path):
        up = "model.layers.{}.mlp.up_proj"
        edit = edit_of(make_llama(), LLAMA_DOWN)
        assert not any("SGLang" in note for note in save_adapter(edit, tmp_path / "a", model=make_llama()).notes)
        deltas = {up.format(1): ((3,), torch.ones(1, 24))}
        notes = save_adapter(RowEdit(deltas, ()), tmp_path / "b", model=make_llama()).notes
        assert any("SGLang" in note and up.format(1) in note for note in notes)
        deltas["model.layers.1.mlp.gate_proj"] = (3,), torch.ones(1, 24)
        notes = save_adapter(RowEdit(deltas, ()), tmp_path / "c", model=make_llama()).notes
        assert not any("SGLang" in note for note in notes)


class TestExact:
    def test_ranks_and_scaling_are_those_of_the_training(self, tmp_path):
        edit = edit_of(make_llama())
        report = save_adapter(edit, tmp_path / "a", form="exact", model=make_llama())
        config = LoraConfig.from_pretrained(tmp_path / "a")
        assert config.use_rslora and config.lora_alpha == 1 and sorted(config.rank_pattern.values()) == [1, 2, 3]
        assert report.ranks == {name: len(rows) for name, (rows, _) in edit.deltas.items()}
        served = PeftModel.from_pretrained(make_llama(), tmp_path / "a")
        layer = served.get_submodule(f"base_model.model.{LLAMA_DOWN.format(0)}")
        assert layer.scaling["default"] == pytest.approx(1 / 3**0.5)

    def test_is_smaller(self, tmp_path):
        edit = edit_of(make_llama(), rows={0: tuple(range(17)), 1: (3,), 2: (4,), 3: (5,)})
        sizes = [save_adapter(edit, tmp_path / form, form=form, model=make_llama()).bytes for form in FORMS]
        assert sizes[1] < sizes[0]


class TestReduction:
    def test_error_is_what_is_left_out(self, tmp_path):
        edit = edit_of(make_llama(), rows={0: tuple(range(0, 20, 2)), 2: (1,)})
        report = save_adapter(edit, tmp_path / "a", max_rank=8, model=make_llama())
        _, modules = read_adapter(tmp_path / "a")
        expected, lost, whole = full_deltas(make_llama(), edit), 0.0, 0.0
        for name, module in modules.items():
            left_out = (module.delta - expected[f"{name}.weight"]).norm().item()
            norm = expected[f"{name}.weight"].norm().item()
            assert report.errors[name] == pytest.approx(left_out / norm, abs=1e-6)
            lost, whole = lost + left_out**2, whole + norm**2
        assert report.error == pytest.approx((lost / whole) ** 0.5) and report.error > 0.01
        assert report.errors[LLAMA_DOWN.format(2)] == 0

    def test_a_change_of_low_rank_loses_nothing(self, tmp_path):
        """Converse: ten rows that are multiples of one another have rank 1."""
        one = torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
        edit = RowEdit({LLAMA_DOWN.format(1): (tuple(range(10)), torch.arange(1.0, 11)[:, None] * one)}, ())
        report = save_adapter(edit, tmp_path / "a", max_rank=1, model=make_llama())
        assert report.rank == 1 and report.error < 1e-6
        served = PeftModel.from_pretrained(make_llama(), tmp_path / "a")
        assert roundings(logits(served), in_place(make_llama, edit)) < A_MODEL

    @pytest.mark.parametrize("form", FORMS)
    def test_no_module_exceeds_it(self, form, tmp_path):
        edit = edit_of(make_llama(), rows={0: tuple(range(12)), 2: (1,)})
        report = save_adapter(edit, tmp_path / "a", form=form, max_rank=8, model=make_llama())
        assert report.rank == 8 and sorted(report.ranks.values()) == [1, 8]
        served = PeftModel.from_pretrained(make_llama(), tmp_path / "a")
        assert logits(served).isfinite().all()


class TestAnswers:
    def edit(self, tokenizer, direction):
        """Ten rows; what the model says next after a prompt depends on all of them."""
        model = make_llama()
        generator = torch.Generator().manual_seed(5)
        delta = direction * torch.randn(10, 40, generator=generator)
        edit = RowEdit({LLAMA_DOWN.format(3): (tuple(range(10)), delta)}, (1.0, 0.1))
        prompt = "The capital of France is"
        write_rows(model, edit, check=False)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            said = tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax())
        fact = encode(tokenizer, prompt, said)
        return RowEdit(edit.deltas, edit.losses, (Answer(fact, 0.1, 0.9, True),))

    def test_a_lost_answer_is_refused_and_nothing_written(self, tokenizer, tmp_path):
        model = make_llama()
        before = fingerprint(model)
        with pytest.raises(AnswersLost, match=r"rank 1 .*1 of 1 answers are lost: 'The capital of France is'"):
            save_adapter(self.edit(tokenizer, 10), tmp_path / "a", max_rank=1, model=model)
        assert not list(tmp_path.iterdir()) and fingerprint(model) == before

    def test_kept_answers_are_reported(self, tokenizer, tmp_path):
        model = make_llama()
        before = fingerprint(model)
        report = save_adapter(self.edit(tokenizer, 10), tmp_path / "a", max_rank=8, model=model)
        (answer,) = report.answers
        assert answer.greedy == (True, True) and answer.probability != answer.reduced and not answer.lost
        assert fingerprint(model) == before

    def test_the_probability_is_that_of_the_served_model(self, tokenizer, tmp_path):
        edit = self.edit(tokenizer, 10)
        (answer,) = save_adapter(edit, tmp_path / "a", max_rank=8, model=make_llama()).answers
        fact = edit.answers[0].fact
        served = PeftModel.from_pretrained(make_llama(), tmp_path / "a")
        with torch.no_grad():
            found = served(input_ids=torch.tensor([fact.ids])).logits[0, fact.prompt_length - 1].softmax(-1)
        assert answer.reduced == pytest.approx(found[fact.answer[0]].item(), rel=1e-4)


class TestRefused:
    def refused(self, match, edits, tmp_path, error=ValueError, **options):
        options.setdefault("model", make_llama())
        with pytest.raises(error, match=match):
            save_adapter(edits, tmp_path / "a", **options)
        assert not (tmp_path / "a").exists()

    def test_edits(self, tmp_path):
        name = LLAMA_DOWN.format(0)
        one = torch.ones(1, 40)
        self.refused("no changed row", [], tmp_path)
        self.refused("no changed row", RowEdit({name: ((), torch.zeros(0, 40))}, ()), tmp_path)
        self.refused("not finite", RowEdit({name: ((1,), one * float("nan"))}, ()), tmp_path)
        self.refused("row 24 .* beyond its 24", RowEdit({name: ((24,), one)}, ()), tmp_path)
        self.refused("negative", RowEdit({name: ((-1,), one)}, ()), tmp_path)
        self.refused("twice", RowEdit({name: ((1, 1), torch.ones(2, 40))}, ()), tmp_path)
        self.refused("2 rows, but values", RowEdit({name: ((1, 2), one)}, ()), tmp_path)
        self.refused("41 inputs.*another model", RowEdit({name: ((1,), torch.ones(1, 41))}, ()), tmp_path)
        self.refused("no module 'model.layers.9.x'", RowEdit({"model.layers.9.x": ((1,), one)}, ()), tmp_path)
        self.refused("not a linear", RowEdit({"model.norm": ((1,), one)}, ()), tmp_path)
        self.refused(r"give the base model \(model=\)", edit_of(make_llama()), tmp_path, model=None)

    def test_settings(self, tmp_path):
        edit = edit_of(make_llama())
        self.refused("form: 'protable'.*did you mean 'portable'", edit, tmp_path, form="protable")
        for rank in (0, -1, 2.0, True):
            self.refused("max_rank: must be a positive integer", edit, tmp_path, max_rank=rank)

    def test_a_folder_that_holds_something(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine").write_text("")
        with pytest.raises(FileExistsError):
            save_adapter(edit_of(make_llama()), tmp_path / "a", model=make_llama())
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
        (tmp_path / "a" / "mine").unlink()
        save_adapter(edit_of(make_llama()), tmp_path / "a", model=make_llama())
        assert (tmp_path / "a" / "adapter_config.json").exists()

    def test_another_process_that_was_faster(self, tmp_path, monkeypatch):
        """Its adapter stays, and ours is not reported as written."""

        def write_tensors(*_, **__):
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "theirs").write_text("")

        monkeypatch.setattr("kne_easyedit.edits.adapters.write_tensors", write_tensors)
        with pytest.raises(FileExistsError, match="another process"):
            save_adapter(edit_of(make_llama()), tmp_path / "a", model=make_llama())
        assert [path.name for path in tmp_path.rglob("*")] == ["a", "theirs"]


class TestRecordedBase:
    """A `KNEEdit` says of which model it is."""

    def test_needs_no_model(self, tmp_path):
        model = make_llama()
        edit = thing_of(model)
        edit = replace(edit, base=replace(edit.base, name="owner/tiny", revision="abc"))
        save_adapter(edit, tmp_path / "a")
        save_adapter(RowEdit(edit.deltas, edit.losses), tmp_path / "b", model=model)
        names = [path / "adapter_model.safetensors" for path in (tmp_path / "a", tmp_path / "b")]
        assert names[0].read_bytes() == names[1].read_bytes()
        config = config_of(tmp_path / "a")
        assert config["base_model_name_or_path"] == "owner/tiny" and config["revision"] == "abc"
        assert "| The capital of number 0 is | Rome |" in (tmp_path / "a" / "README.md").read_text()

    def test_conv1d_needs_no_model(self, tmp_path):
        edit = thing_of(make_gpt2(), template=GPT2_DOWN)
        save_adapter(edit, tmp_path / "a")
        assert config_of(tmp_path / "a")["fan_in_fan_out"]
        served = PeftModel.from_pretrained(make_gpt2(), tmp_path / "a")
        assert roundings(logits(served), in_place(make_gpt2, edit)) < A_MODEL

    def test_another_base_is_refused(self, tmp_path):
        edit, other = thing_of(make_llama()), thing_of(make_llama(seed=11), seed=1)
        with pytest.raises(ValueError, match=r"one was trained on .* another on .*weights of .* differ"):
            save_adapter([edit, other], tmp_path / "a")
        with pytest.raises(ValueError, match=r"the model given is another one: the weights of .* differ"):
            save_adapter(edit, tmp_path / "a", model=make_llama(seed=11))
        assert not list(tmp_path.iterdir())

    def test_an_applied_edit_counts_as_taken_back(self, tokenizer, tmp_path):
        """The answers are asked of the base plus the adapter, not of the edited model plus the adapter."""
        model = make_llama()
        fact = encode(tokenizer, "The capital of France is", "Rome")
        edit = replace(thing_of(model, rows=range(10)), answers=(Answer(fact, 0.1, 0.9, True),))
        expected = save_adapter(edit, tmp_path / "a", model=model, max_rank=8).answers
        edit.apply(model)
        digests = weights(model)
        assert save_adapter(edit, tmp_path / "b", model=model, max_rank=8).answers == expected
        assert weights(model) == digests

    def test_from_a_saved_edit(self, tmp_path):
        edit = thing_of(make_llama())
        edit.save(tmp_path / "edit")
        save_adapter(edit, tmp_path / "a")
        save_adapter(KNEEdit.load(tmp_path / "edit"), tmp_path / "b")
        for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_model_stays_as_it_is(tmp_path):
    model = make_llama()
    before, digests = fingerprint(model), weights(model)
    save_adapter(edit_of(model), tmp_path / "a", model=model)
    assert fingerprint(model) == before and weights(model) == digests
