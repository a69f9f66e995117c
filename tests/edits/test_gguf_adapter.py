"""An adapter in llama.cpp's layout, over tiny base files written here.

That llama.cpp itself answers with the edit was tried with scripts/serve_gguf.py (docs/serving.md)."""

import numpy as np
import pytest
import torch
from conftest import GPT2_DOWN, LLAMA_DOWN, SIZE, make_gpt2, make_llama
from edits import ROWS, edit_of

from kne_easyedit.edits import adapter_to_gguf, read_adapter, save_adapter

gguf = pytest.importorskip("gguf", reason="the package gguf (extra smollm2) converts adapters for llama.cpp")

QUERY, KEY = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj"


def interleaved(weight, heads):
    """The definition: within a head, unit i of the first half and unit i of the second become neighbours."""
    size = len(weight) // heads
    rows = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[rows]


def write_base(path, architecture, weights, heads=SIZE["heads"], key_heads=2):
    """A GGUF file with the matrices of a model and what is read of its metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(SIZE["layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    for name, weight in weights.items():
        writer.add_tensor(name, np.ascontiguousarray(weight, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def matrix(model, name, conv1d=False):
    weight = model.get_submodule(name).weight.detach().numpy()
    return weight.T if conv1d else weight


@pytest.fixture
def llama_base(tmp_path):
    model, weights = make_llama(), {}
    for i in range(SIZE["layers"]):
        weights[f"blk.{i}.ffn_down.weight"] = matrix(model, LLAMA_DOWN.format(i))
        weights[f"blk.{i}.attn_q.weight"] = interleaved(matrix(model, QUERY.format(i)), SIZE["heads"])
        weights[f"blk.{i}.attn_k.weight"] = interleaved(matrix(model, KEY.format(i)), 2)
    return write_base(tmp_path / "base.gguf", "llama", weights)


def read_gguf(path):
    """As llama.cpp does: the metadata, and name -> alpha / rank of its own * B A."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    alpha = reader.get_field("adapter.lora.alpha").contents()
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    assert reader.get_field("general.architecture").contents() in ("llama", "gpt2", "qwen2")
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_a", "lora_b"}
    found = {}
    for name, b in tensors.items():
        if name.endswith(".lora_b"):
            a = tensors[name.replace(".lora_b", ".lora_a")]
            found[name.removesuffix(".lora_b")] = alpha / b.shape[1] * (b.astype(np.float64) @ a.astype(np.float64))
    return found


@pytest.mark.parametrize("form", ["portable", "exact"])
def test_the_change_of_each_weight_is_that_of_the_adapter(form, llama_base, tmp_path):
    edit = edit_of(make_llama())
    save_adapter(edit, tmp_path / "a", form=form, model=make_llama())
    names = adapter_to_gguf(tmp_path / "a", llama_base, tmp_path / "a.gguf")
    assert names == {LLAMA_DOWN.format(i): f"blk.{i}.ffn_down.weight" for i in ROWS}
    found = read_gguf(tmp_path / "a.gguf")
    _, modules = read_adapter(tmp_path / "a")
    assert set(found) == set(names.values())
    for name, module in modules.items():
        np.testing.assert_allclose(found[names[name]], module.delta.numpy(), atol=1e-6)


@pytest.mark.parametrize(("template", "heads", "ours"), [(QUERY, 4, "attn_q"), (KEY, 2, "attn_k")])
def test_rows_of_queries_and_keys_are_in_the_order_of_the_base(template, heads, ours, llama_base, tmp_path):
    """base + change, both in llama.cpp's order, is the edited weight in that order."""
    model = make_llama()
    name = template.format(1)
    rows = (0, 3, 5, 11)
    delta = torch.randn(4, SIZE["hidden"], generator=torch.Generator().manual_seed(2))
    from kne_easyedit.editing.row_edit import RowEdit

    save_adapter(RowEdit({name: (rows, delta)}, ()), tmp_path / "a", model=model)
    adapter_to_gguf(tmp_path / "a", llama_base, tmp_path / "a.gguf")
    found = read_gguf(tmp_path / "a.gguf")[f"blk.1.{ours}.weight"]
    changed = np.zeros_like(matrix(model, name))
    changed[list(rows)] = delta.numpy()
    np.testing.assert_allclose(found, interleaved(changed, heads), atol=1e-6)
    assert np.abs(found - changed).max() > 0.1  # another order than transformers'


def test_other_architectures_keep_the_order(tmp_path):
    """Qwen2's rotary embeddings turn halves in llama.cpp, too: its converter reorders nothing."""
    from kne_easyedit.editing.row_edit import RowEdit

    model, delta = make_llama(), torch.ones(1, SIZE["hidden"])
    weights = {f"blk.{i}.attn_q.weight": matrix(model, QUERY.format(i)) for i in range(SIZE["layers"])}
    base = write_base(tmp_path / "base.gguf", "qwen2", weights)
    save_adapter(RowEdit({QUERY.format(1): ((1,), delta)}, ()), tmp_path / "a", model=model)
    adapter_to_gguf(tmp_path / "a", base, tmp_path / "a.gguf")
    found = read_gguf(tmp_path / "a.gguf")["blk.1.attn_q.weight"]
    assert np.flatnonzero(found.any(1)).tolist() == [1]


def test_gpt2_is_not_transposed(tmp_path):
    """Conv1D stores ``(in, out)``; the base file has ``(out, in)``, and so has the product of ``B`` and ``A``."""
    model = make_gpt2()
    weights = {f"blk.{i}.ffn_down.weight": matrix(model, GPT2_DOWN.format(i), True) for i in range(SIZE["layers"])}
    base = write_base(tmp_path / "base.gguf", "gpt2", weights)
    edit = edit_of(model, GPT2_DOWN)
    save_adapter(edit, tmp_path / "a", model=model)
    adapter_to_gguf(tmp_path / "a", base, tmp_path / "a.gguf")
    found = read_gguf(tmp_path / "a.gguf")
    for layer, rows in ROWS.items():
        change = found[f"blk.{layer}.ffn_down.weight"]
        assert change.shape == (SIZE["hidden"], SIZE["inner"])
        np.testing.assert_allclose(change[list(rows)], edit.deltas[GPT2_DOWN.format(layer)][1], atol=1e-6)


def test_half_precision(llama_base, tmp_path):
    save_adapter(edit_of(make_llama()), tmp_path / "a", model=make_llama())
    sizes = []
    for dtype in ("float32", "float16"):
        adapter_to_gguf(tmp_path / "a", llama_base, tmp_path / f"{dtype}.gguf", dtype)
        sizes.append((tmp_path / f"{dtype}.gguf").stat().st_size)
    assert sizes[1] < 0.7 * sizes[0]
    for name, change in read_gguf(tmp_path / "float32.gguf").items():
        np.testing.assert_allclose(read_gguf(tmp_path / "float16.gguf")[name], change, rtol=1e-3, atol=1e-6)


class TestRefused:
    def refused(self, match, adapter, base, tmp_path):
        with pytest.raises(ValueError, match=match):
            adapter_to_gguf(adapter, base, tmp_path / "out.gguf")
        assert not list(tmp_path.glob("*out.gguf*"))

    def test_bases(self, tmp_path, llama_base):
        save_adapter(edit_of(make_llama()), tmp_path / "a", model=make_llama())
        (tmp_path / "text.gguf").write_text("no model")
        self.refused("no complete GGUF file", tmp_path / "a", tmp_path / "text.gguf", tmp_path)
        (tmp_path / "short.gguf").write_bytes(llama_base.read_bytes()[:200])
        self.refused("no complete GGUF file", tmp_path / "a", tmp_path / "short.gguf", tmp_path)
        other = write_base(tmp_path / "other.gguf", "rwkv7", {})
        self.refused("'rwkv7'.*convert_lora_to_gguf", tmp_path / "a", other, tmp_path)
        small = {f"blk.{i}.ffn_down.weight": np.zeros((24, 41)) for i in range(4)}
        other = write_base(tmp_path / "small.gguf", "llama", small)
        self.refused(r"is \(24, 40\), in .* it is \(24, 41\)", tmp_path / "a", other, tmp_path)
        other = write_base(tmp_path / "none.gguf", "llama", {"token_embd.weight": np.zeros((2, 2))})
        self.refused("has no module 'model.layers.0.mlp.down_proj'", tmp_path / "a", other, tmp_path)

    def test_type(self, tmp_path, llama_base):
        save_adapter(edit_of(make_llama()), tmp_path / "a", model=make_llama())
        with pytest.raises(ValueError, match="dtype: must be one of float32, float16"):
            adapter_to_gguf(tmp_path / "a", llama_base, tmp_path / "out.gguf", "int8")
        (tmp_path / "out.gguf").write_bytes(b"a model")
        with pytest.raises(FileExistsError, match=r"out.gguf: exists"):
            adapter_to_gguf(tmp_path / "a", llama_base, tmp_path / "out.gguf")
        assert (tmp_path / "out.gguf").read_bytes() == b"a model"
