"""Models that accelerate offloads to memory and disk: bit for bit as on one device, and no file is written."""

from __future__ import annotations

import gc
import hashlib
import weakref
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils import OffloadedWeightsLoader
from conftest import (
    GPT2_DOWN,
    GPTJ_DOWN,
    LLAMA_DOWN,
    ONE_TOKEN,
    all_layers,
    failing,
    make_gpt2,
    make_gptj,
    make_llama,
    tiny_hparams,
)
from torch import nn

from kne_easyedit.attribution.engine import attribute_facts
from kne_easyedit.editing.edit import apply_kne_to_model, compute_edit
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.editing.row_edit import restore
from kne_easyedit.edits.store import EditStore
from kne_easyedit.localization.named import MAGNITUDE, named_ensemble
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.fingerprint import model_digest
from kne_easyedit.models.offload import offloaded
from kne_easyedit.models.state import preserve_state
from kne_easyedit.models.weights import Weight, stored_tensor, weight_of

REQUEST = {"prompt": ONE_TOKEN[0], "target_new": ONE_TOKEN[1]}
OTHER = {"prompt": "The capital of Peru is", "target_new": "Madrid"}
NAME = LLAMA_DOWN.format(1)


def layers_on(model: nn.Module, *devices: str) -> dict[str, str]:
    """A device map: the layers in turn, all else on the first device."""
    stack = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    parts = {name: devices[0] for name, module in model.named_modules() if not [*module.children()]}
    outside = {name: device for name, device in parts.items() if not name.startswith(f"{stack}.")}
    count = len(model.get_submodule(stack))
    return {**outside, **{f"{stack}.{i}": devices[i % len(devices)] for i in range(count)}}


def loaded(model: nn.Module, folder: Path, **placement) -> nn.Module:
    if not (folder / "model").exists():
        model.save_pretrained(folder / "model")
    attention = model.config._attn_implementation
    return type(model).from_pretrained(folder / "model", attn_implementation=attention, **placement).eval()


PLACEMENTS = {
    "memory": lambda model, folder: cpu_offload(model),
    "disk": lambda model, folder: disk_offload(model, folder / "offload"),
    "some on disk": lambda model, folder: dispatch_model(
        model, layers_on(model, "cpu", "disk"), offload_dir=folder / "offload"
    ),
    "the model's files": lambda model, folder: loaded(model, folder, device_map=layers_on(model, "cpu", "disk")),
    "one device, with hooks": lambda model, folder: dispatch_model(model, layers_on(model, "cpu"), force_hooks=True),
}
"""Where the weights are -> what puts those of a model there. Each computes on the CPU."""


class Pair(NamedTuple):
    """The same model on one device, and placed."""

    whole: nn.Module
    placed: nn.Module
    folder: Path


@pytest.fixture
def pair_of(tmp_path):
    def make(placement: str, family=make_llama) -> Pair:
        whole = loaded(family(), tmp_path) if placement == "the model's files" else family()
        # accelerate's cpu_offload shares what the model's weights are: they must not be those of `whole`.
        return Pair(whole, PLACEMENTS[placement](family(), tmp_path), tmp_path)

    return make


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Each file below a folder -> when it was written, and its content's digest."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def logits(model: nn.Module, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokenizer(ONE_TOKEN[0])["input_ids"]])).logits


def loaded_now(model: nn.Module) -> list[str]:
    """Parameters that are offloaded, and in the module all the same."""
    return [name for name, one in model.named_parameters() if offloaded(model, name) and not one.is_meta]


SOME = ["disk", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("memory", "the model's files"))]
FAMILIES = {"llama": (make_llama, LLAMA_DOWN), "gpt2": (make_gpt2, GPT2_DOWN), "gptj": (make_gptj, GPTJ_DOWN)}


@pytest.mark.parametrize(
    ("family", "placement"),
    [
        ("llama", "the model's files"),
        ("gpt2", "disk"),
        *(pytest.param("llama", kind, marks=pytest.mark.slow) for kind in PLACEMENTS if kind != "the model's files"),
        pytest.param("gptj", "disk", marks=pytest.mark.slow),
    ],
)
def test_as_on_one_device(family, placement, pair_of, tokenizer, facts):
    """Scores, edit, logits and restore are those of one device, bit for bit."""
    make, template = FAMILIES[family]
    whole, placed, folder = pair_of(placement, make)
    before = model_digest(whole)
    assert model_digest(placed) == before
    assert placement == "one device, with hooks" or any(parameter.is_meta for parameter in placed.parameters())

    scores = [attribute_facts(model, [all_layers(model, template)], facts, 3)[0] for model in (whole, placed)]
    assert torch.equal(*scores)
    assert scores[0].abs().max() > 1e-4

    there, was = files(folder), logits(whole, tokenizer)
    settings = tiny_hparams(template, cache_dir=None)
    edits: list[KNEEdit] = []
    wanted = {"return_orig_weights": True, "on_trained": edits.append}
    originals = [apply_kne_to_model(model, tokenizer, [REQUEST], settings, **wanted)[1] for model in (whole, placed)]
    assert edits[0] == edits[1] and edits[0].losses == edits[1].losses
    assert edits[0].base == edits[1].base or placement == "the model's files"
    assert torch.equal(logits(placed, tokenizer), logits(whole, tokenizer))
    assert not torch.equal(logits(placed, tokenizer), was)
    assert model_digest(placed) == model_digest(whole) != before
    assert files(folder) == there, "an edit writes no file: killed now, the model is what it was"

    restore(placed, originals[1])
    assert model_digest(placed) == before
    assert torch.equal(logits(placed, tokenizer), was)
    assert not loaded_now(placed)
    assert all(parameter.requires_grad for parameter in placed.parameters())


@pytest.mark.parametrize("placement", ["memory", "the model's files"])
def test_whole_passes_as_on_one_device(placement, pair_of, facts):
    whole, placed, _ = pair_of(placement)
    scores = [attribute_facts(model, [all_layers(model)], facts[:1], 2, engine="whole")[0] for model in (whole, placed)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("placement", SOME)
def test_edits_are_applied_and_taken_back_in_any_order(placement, pair_of, tokenizer, tmp_path):
    whole, placed, folder = pair_of(placement)
    base = model_digest(placed)
    one, two = (compute_edit(placed, tokenizer, [request], tiny_hparams()) for request in (REQUEST, OTHER))
    assert one.shared_rows(two)
    store = EditStore(tmp_path.parent / f"{tmp_path.name} store")
    ids = [store.add(edit) for edit in (one, two)]
    there = files(folder)
    with store.applied(placed), store.applied(whole):
        both = model_digest(placed)
        assert both == model_digest(whole) != base
    assert model_digest(placed) == base
    store.apply(placed)
    assert model_digest(placed) == both
    one.take_back(placed)
    two.apply(whole)
    assert model_digest(placed) == model_digest(whole) != both
    store.off(ids[0])
    store.off(ids[1])
    store.apply(placed)
    assert model_digest(placed) == base
    assert files(folder).items() >= there.items()
    maps = [getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in placed.modules()]
    assert not [one for one in maps if type(one).__name__ == "_Overlaid"], "nothing is laid over what is taken back"


@pytest.mark.parametrize("placement", SOME)
@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_an_error_while_rows_are_written(placement, error, pair_of, tokenizer, monkeypatch):
    _, placed, folder = pair_of(placement)
    edit = compute_edit(placed, tokenizer, [REQUEST], tiny_hparams())
    before, there = model_digest(placed), files(folder)
    real, seen = Weight.__setitem__, []

    def write(weight, *args):
        seen.append(model_digest(placed) != before)
        if len(seen) == 3:
            raise error
        real(weight, *args)

    monkeypatch.setattr(Weight, "__setitem__", write)
    with pytest.raises(type(error)):
        edit.apply(placed)
    assert seen[:3] == [False, True, True], "some rows were written before the exception"
    assert model_digest(placed) == before
    assert files(folder) == there
    assert not loaded_now(placed)


def test_another_base_is_refused(pair_of, tokenizer):
    """Converse of the fingerprint: what is on disk is compared, not taken for granted."""
    _, placed, _ = pair_of("disk")
    edit = compute_edit(make_llama(seed=3), tokenizer, [REQUEST], tiny_hparams())
    before = model_digest(placed)
    with pytest.raises(ValueError, match=r"the weights of .* differ"):
        edit.apply(placed)
    assert model_digest(placed) == before


@pytest.mark.slow
def test_rows_changed_by_something_else_are_noticed(pair_of, tokenizer):
    _, placed, _ = pair_of("disk")
    edit = compute_edit(placed, tokenizer, [REQUEST], tiny_hparams())
    edit.apply(placed)
    name, chosen = next((name, chosen) for name, chosen in edit.rows.items())
    weight_of(placed, name)[torch.tensor(chosen[:1])] = torch.ones(1, weight_of(placed, name).shape[1])
    with pytest.raises(ValueError, match="changed by something else"):
        edit.take_back(placed)


def test_a_shared_weight_is_refused(tokenizer, tmp_path):
    model = make_llama()
    model.get_submodule(LLAMA_DOWN.format(2)).weight = model.get_submodule(NAME).weight
    cpu_offload(model)
    with pytest.raises(ValueError, match=rf"{NAME} cannot be edited: its weight is shared with .*layers.2"):
        apply_kne_to_model(model, tokenizer, [REQUEST], tiny_hparams())


def test_a_block_that_is_loaded_as_a_whole_is_refused(tokenizer):
    """Its weights are used without a call of the layer, beside which the rows are trained."""
    model = cpu_offload(make_llama(), preload_module_classes=["LlamaMLP"])
    assert model_digest(model) == model_digest(make_llama())
    with pytest.raises(ValueError, match=r"down_proj cannot be edited: .*whole block.*preload_module_classes"):
        apply_kne_to_model(model, tokenizer, [REQUEST], tiny_hparams())


@pytest.mark.slow
def test_a_copy_is_edited_alone(pair_of, tokenizer):
    _, placed, _ = pair_of("disk")
    before = model_digest(placed)
    copy, _ = apply_kne_to_model(placed, tokenizer, [REQUEST], tiny_hparams(), copy=True)
    assert model_digest(placed) == before != model_digest(copy)
    again = deepcopy(copy)
    assert model_digest(again) == model_digest(copy)


@pytest.mark.slow
def test_saved_with_its_edit(pair_of, tokenizer, tmp_path):
    """`save_pretrained` writes what the edited model computes with."""
    whole, placed, _ = pair_of("the model's files")
    for model in (whole, placed):
        apply_kne_to_model(model, tokenizer, [REQUEST], tiny_hparams())
        model.save_pretrained(tmp_path / f"saved {id(model)}")
    contents = [(tmp_path / f"saved {id(model)}" / "model.safetensors") for model in (whole, placed)]
    from safetensors.torch import load_file

    one, other = map(load_file, contents)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestBackward:
    """A model that is larger than its device: its weights must not all be kept there for the backward pass."""

    def gradient(self, model, tokenizer, alive):
        ids = torch.tensor([tokenizer(ONE_TOKEN[0])["input_ids"]])
        name = "model.embed_tokens.weight"
        x = stored_tensor(model, name, model.get_parameter(name))[ids].requires_grad_()
        loss = model(inputs_embeds=x, use_cache=False).logits[0, -1, 3]
        alive.append(sum(one() is not None for one in self.read))
        return torch.autograd.grad(loss, x)[0]

    @pytest.fixture(autouse=True)
    def counted(self, monkeypatch):
        self.read = []
        real = OffloadedWeightsLoader.__getitem__

        def read(loader, key):
            tensor = real(loader, key)
            if "proj" in key:
                self.read.append(weakref.ref(tensor.untyped_storage()))
            return tensor

        monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", read)
        gc.collect()

    def test_weights_are_read_again(self, pair_of, tokenizer):
        whole, placed, _ = pair_of("disk")
        alive: list[int] = []
        with preserve_state(placed), preserve_state(whole):
            found = self.gradient(placed, tokenizer, alive)
        assert alive == [0] and len(self.read) == 2 * 4 * 7, "7 products a layer, in both passes"
        with preserve_state(whole):
            assert torch.equal(found, self.gradient(whole, tokenizer, []))

    def test_without_it_all_are_kept(self, pair_of, tokenizer):
        """Converse."""
        _, placed, _ = pair_of("disk")
        placed.requires_grad_(False)
        alive: list[int] = []
        self.gradient(placed, tokenizer, alive)
        assert alive == [4 * 7]


def test_nothing_stays_loaded_after_an_error_in_a_pass(pair_of, tokenizer, facts):
    """accelerate itself leaves the module loaded in which the error came."""
    _, placed, _ = pair_of("disk")
    module = placed.get_submodule(NAME)
    own, module._old_forward = module._old_forward, failing(None, 1, OSError("injected"))
    with pytest.raises(OSError, match="injected"), preserve_state(placed):
        logits(placed, tokenizer)
    module._old_forward = own
    assert not loaded_now(placed)
    assert torch.isfinite(logits(placed, tokenizer)).all()


def test_device_of_an_offloaded_model(pair_of):
    whole, placed, _ = pair_of("memory")
    assert device_of(placed) == device_of(whole) == torch.device("cpu")


@pytest.mark.parametrize("placement", ["memory", "disk"])
def test_rows_by_their_weights_are_those_of_the_whole_model(pair_of, placement):
    whole, placed, _ = pair_of(placement)
    hparams = tiny_hparams(ensemble=MAGNITUDE, p=0.25)
    found = named_ensemble(placed, hparams)
    assert found == named_ensemble(whole, hparams) and found.size > 0
    assert not loaded_now(placed)
