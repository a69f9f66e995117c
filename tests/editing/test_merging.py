"""Edits merged into a model's files: equal to edits in memory, everything else as it was, nothing half-written."""

import json
import logging
import pickle
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import GPT2_DOWN, GPTJ_DOWN, LLAMA_DOWN, make_gpt2, make_gptj, make_llama, make_tokenizer, weights
from crashes import killed_at, killed_in_write
from edits import edit_of, thing_of
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from kne_easyedit.editing import merging
from kne_easyedit.editing.applying import set_edits
from kne_easyedit.editing.merging import merge_edits
from kne_easyedit.editing.row_edit import write_rows
from kne_easyedit.edits.hub import edit_card

CASES = [(make_llama, LLAMA_DOWN), (make_gptj, GPTJ_DOWN), (make_gpt2, GPT2_DOWN)]


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def base(tmp_path, llama):
    return saved(llama, tmp_path / "base", max_shard_size="20KB")


def test_a_configuration_in_an_older_form_is_of_the_same_base(tmp_path):
    """As Qwen2.5-VL's was written first: the text model's settings are not in ``text_config``."""
    text = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": len(make_tokenizer()), "hidden_act": "silu"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    written = {"model_type": "qwen2_5_vl", **text, "vision_config": vision, "tie_word_embeddings": False}
    written["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 2, 2]}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(written))).eval()
    base = saved(model, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(written))
    edit = thing_of(model, template="model.language_model.layers.{}.mlp.down_proj", layers=(0, 1))
    edit.merge_into(base, tmp_path / "out")
    found = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    edit.apply(model)
    assert weights(found) == weights(model)


def test_a_model_that_the_library_does_not_know(tmp_path, base, llama):
    """Its configuration is taken as it is written: other settings are another base, the same ones are not."""
    config = json.loads((base / "config.json").read_text())
    edit = thing_of(llama)
    foreign = replace(edit, base=replace(edit.base, config={**edit.base.config, "model_type": "foreign"}))
    (base / "config.json").write_text(json.dumps({**config, "model_type": "foreign"}))
    merge_edits([foreign], base, tmp_path / "out")
    (base / "config.json").write_text(json.dumps({**config, "model_type": "foreign", "hidden_size": 25}))
    with pytest.raises(ValueError, match="its hidden_size is 24, here it is 25"):
        merge_edits([foreign], base, tmp_path / "other")


class TestMerged:
    @pytest.mark.parametrize(("make", "template"), CASES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shards", ["1GB", "20KB"])
    def test_merged_is_applied_is_reloaded(self, tmp_path, make, template, dtype, shards):
        model = make(dtype)
        edits = [thing_of(model, seed, template=template, rows=(seed, 5, 9)) for seed in range(3)]
        base = saved(model, tmp_path / "base", max_shard_size=shards)
        before = contents(base)
        merge_edits(edits, base, tmp_path / "out")
        assert contents(base) == before, "the base is never touched"
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        assert weights(found) != weights(model)
        set_edits(model, edits)
        assert weights(found) == weights(model)
        assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(make_tokenizer())

    def test_only_touched_modules_change(self, tmp_path, base, llama):
        thing_of(llama).merge_into(base, tmp_path / "out")
        changed = set()
        for path in sorted(base.glob("*.safetensors")):
            before, after = load_file(path), load_file(tmp_path / "out" / path.name)
            assert before.keys() == after.keys()
            changed |= {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {f"{LLAMA_DOWN.format(layer)}.weight" for layer in (0, 2)}
        same = {name for name, data in contents(base).items() if contents(tmp_path / "out")[name] == data}
        assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= same

    def test_one_matrix_at_a_time(self, tmp_path, base, llama, monkeypatch):
        """Modules that no edit touches are never read."""
        read, real = [], merging.read_tensor
        monkeypatch.setattr(merging, "read_tensor", lambda file, place: read.append(place.shape) or real(file, place))
        thing_of(llama).merge_into(base, tmp_path / "out")
        assert set(read) == {(24, 40)} and len(read) == 4  # two modules, checked and then written

    def test_the_card_names_the_edits(self, tmp_path, base, llama):
        one, two = thing_of(llama, 1), thing_of(llama, 2)
        merge_edits([one, two], base, tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "2 edits merged" in card and "library_name: transformers" in card
        for edit in (one, two):
            assert f"| {edit.requests[0]['prompt']} | Rome | 0.100 | {edit.digest[:12]} |" in card

    @pytest.mark.parametrize("revision", ["", "0123abc"])
    def test_the_card_names_a_base_of_the_hub_and_what_an_edit_lacks(self, tmp_path, base, llama, revision):
        """A name like ``outputs/merged`` is of the hub only if a commit of the hub is known."""
        first = thing_of(llama)
        other = thing_of(llama, 1, trained_on=(first.digest,))
        named = replace(other, base=replace(other.base, name="outputs/merged", revision=revision))
        for edits, out in (([named], "alone"), ([first, named], "both")):
            merge_edits(edits, base, tmp_path / out)
        alone, both = ((tmp_path / out / "README.md").read_text() for out in ("alone", "both"))
        assert ("base_model: outputs/merged" in alone) is bool(revision)
        assert f"Trained on top of 1 edit that is not in here ({first.digest[:12]})" in alone
        assert "Trained on top" not in both

    @pytest.mark.parametrize(("name", "on_hub"), [("owner/tiny", True), ("-merged/tiny", False), ("_x/tiny", False)])
    def test_every_card_takes_the_same_names_for_the_hubs(self, tmp_path, base, llama, name, on_hub):
        edit = thing_of(llama)
        edit = replace(edit, base=replace(edit.base, name=name, revision="0123abc"))
        edit.merge_into(base, tmp_path / "out")
        for card in ((tmp_path / "out" / "README.md").read_text(), edit_card(edit)):
            head = yaml.safe_load(card.split("---\n")[1])
            assert head.get("base_model") == (name if on_hub else None)
            assert head["tags"] == ["knowledge-editing", "kne"]

    def test_text_stays_text_in_the_card(self, tmp_path, base, llama):
        asked = {"prompt": "<b> | [x](http://y)\n---\n# The", "target_new": "a|b"}
        replace(thing_of(llama), requests=(asked,)).merge_into(base, tmp_path / "out")
        (row,) = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if "http" in line]
        assert "<b>" not in row and r"\|" in row and r"\[x\]" in row

    def test_files_of_weights_are_not_carried_over(self, tmp_path, base, llama):
        (base / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": 1}))
        (base / "consolidated.safetensors").write_bytes(b"")
        others = {
            "a.pkl",
            "rust_model.ot",
            "flax.npz",
            "tf_model.h5.index.json",
            "pytorch_model.bin.index.json",
            ".x.json",
        }
        for name in others:
            (base / name).write_bytes(b"")
        wanted = {"vocab.txt", "LICENSE", "tokenizer.model", "modeling_own.py", "chat_template.jinja"}
        for name in wanted:
            (base / name).write_text("The")
        thing_of(llama).merge_into(base, tmp_path / "out")
        found = contents(tmp_path / "out").keys()
        assert not {"pytorch_model.bin", "consolidated.safetensors", *others} & found and wanted <= found

    def test_an_index_of_other_files_is_not_carried_over(self, tmp_path):
        model = make_llama()
        base = saved(model, tmp_path / "base")
        (base / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')
        thing_of(model).merge_into(base, tmp_path / "out")
        assert "model.safetensors.index.json" not in contents(tmp_path / "out")
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def test_files_with_other_prefixes(self, tmp_path):
        """GPT-2's own file names ``h.0.mlp`` what the model names ``transformer.h.0.mlp``."""
        model = make_gpt2()
        base = saved(model, tmp_path / "base")
        path = base / "model.safetensors"
        save_file(
            {name.removeprefix("transformer."): one for name, one in load_file(path).items()}, path, {"format": "pt"}
        )
        edit = thing_of(model, template=GPT2_DOWN)
        edit.merge_into(base, tmp_path / "out")
        edit.apply(model)
        name = GPT2_DOWN.format(2)
        found = load_file(tmp_path / "out" / "model.safetensors")[f"{name.removeprefix('transformer.')}.weight"]
        assert torch.equal(found, model.get_submodule(name).weight)

    def test_files_of_another_number_type(self, tmp_path):
        """Files in bfloat16 of a model that is edited in float32: rows are rounded to theirs."""
        model = make_llama(torch.bfloat16)
        base = saved(model, tmp_path / "base")
        wide = model.float()
        edit = thing_of(wide)
        edit.merge_into(base, tmp_path / "out")
        edit.apply(wide)
        name = f"{LLAMA_DOWN.format(0)}.weight"
        found = load_file(tmp_path / "out" / "model.safetensors")[name]
        assert found.dtype is torch.bfloat16 and torch.equal(found, wide.get_parameter(name).bfloat16())

    def test_another_process_is_faster(self, tmp_path, base, llama, monkeypatch):
        one, two, real = thing_of(llama, 1), thing_of(llama, 2), merging.write_tensor

        def then_another(*given):
            monkeypatch.undo()
            one.merge_into(base, tmp_path / "out")
            real(*given)

        monkeypatch.setattr(merging, "write_tensor", then_another)
        with pytest.raises(FileExistsError, match="choose another folder"):
            two.merge_into(base, tmp_path / "out")
        assert one.digest[:12] in (tmp_path / "out" / "README.md").read_text()

    @pytest.mark.parametrize(("killed", "least"), [(killed_at, 20), (killed_in_write, 3)])
    def test_killed_at_any_moment_it_is_whole_or_not_there(self, tmp_path, base, llama, killed, least):
        edit, operation, died, there, before = thing_of(llama), 0, [True], False, contents(base)
        while died:
            out = tmp_path / f"{operation}" / "out"
            with killed(operation) as died:
                edit.merge_into(base, out)
            there = out.exists()
            assert contents(base) == before
            if there:
                assert (out / "README.md").is_file() and len(contents(out)) == len(before) + 1
            operation += 1
        assert there and operation >= least


class TestRefused:
    @pytest.fixture
    def refused(self, tmp_path, base, llama):
        def check(message, edits=None, error=ValueError, force=False):
            before = contents(base)
            edits = [thing_of(llama)] if edits is None else edits
            with pytest.raises(error, match=message) as caught:
                merge_edits(edits, base, tmp_path / "out", force=force)
            assert contents(base) == before
            assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
            return str(caught.value)

        return check

    def test_other_weights(self, tmp_path, refused, base, caplog):
        edit = thing_of(make_llama(seed=11))
        refused("another base: the weights of model.layers.0.mlp.down_proj .* differ", [edit])
        with caplog.at_level(logging.WARNING):
            merge_edits([edit], base, tmp_path / "forced", force=True)
        assert "merged into another base" in caplog.text
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "forced", dtype=torch.float32)
        model = make_llama()
        edit.apply(model, force=True)
        assert weights(found) == weights(model)

    def test_an_edited_base(self, refused, base, llama):
        edit = thing_of(llama)
        write_rows(llama, edit_of(llama))
        llama.save_pretrained(base, max_shard_size="20KB")
        refused("differ: another revision or a fine-tuned copy", [edit])

    def test_another_shape(self, refused):
        for force in (False, True):
            edit = thing_of(make_llama(intermediate_size=48))
            refused("intermediate_size is 48, here it is 40" if not force else "has no weight of", [edit], force=force)

    def test_another_family(self, refused):
        refused("its model_type is 'gpt2', here it is 'llama'", [thing_of(make_gpt2(), template=GPT2_DOWN)])

    def test_quantised(self, refused, base):
        config = json.loads((base / "config.json").read_text())
        quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
        message = refused(r"is quantised \(bitsandbytes\)")
        assert "merge into the unquantised base, or save the edit as an adapter" in message

    def test_pickles_only(self, refused, base):
        for path in base.glob("*.safetensors"):
            path.unlink()
        (base / "model.safetensors.index.json").unlink()
        (base / "pytorch_model.bin").write_bytes(pickle.dumps({}))
        refused("only safetensors are read", error=FileNotFoundError)

    @pytest.mark.parametrize("name", ["../other.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", 7])
    def test_shards_that_leave_the_folder(self, refused, base, name):
        index = base / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        refused("is not the name of a safetensors file beside it")

    def test_shards_that_are_missing_or_truncated(self, refused, base):
        first = sorted(base.glob("*.safetensors"))[0]
        first.write_bytes(first.read_bytes()[:-4])
        refused("no complete safetensors file")
        first.unlink()
        refused(f"weight_map: {first.name} is missing")

    def test_no_edits_and_edits_twice(self, refused, llama):
        refused("there are none to merge", [])
        refused("occurs twice", [thing_of(llama), thing_of(llama)])

    def test_no_model(self, tmp_path, llama):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            thing_of(llama).merge_into(tmp_path / "nowhere", tmp_path / "out")

    def test_a_folder_that_holds_something(self, tmp_path, base, llama):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "letter.txt").write_text("Dear")
        with pytest.raises(FileExistsError, match="exists already"):
            thing_of(llama).merge_into(base, tmp_path / "out")
        with pytest.raises(FileExistsError, match="exists already"):
            thing_of(llama).merge_into(base, base)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]
