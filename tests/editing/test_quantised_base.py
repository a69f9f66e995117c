"""8-bit and 4-bit bases: localised and trained as they are, kept as an adapter beside; nothing is written into them.

With a stand-in for bitsandbytes, which pretends to be of that library and computes like it, and with the library itself
where it is installed."""

import importlib.util

import pytest
import torch
from conftest import LLAMA_DOWN, fingerprint, make_llama, tiny_hparams
from edits import MANY, REQUEST, edited, ensemble_of, thing_of
from peft import PeftModel
from rounding import difference
from torch import nn
from torch.nn import functional

from kne_easyedit.editing.edit import apply_kne_to_model, compute_edit
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.editing.projection import projections_for
from kne_easyedit.editing.row_edit import write_rows
from kne_easyedit.edits import save_adapter
from kne_easyedit.localization import localizer as localization
from kne_easyedit.models.base import base_of
from kne_easyedit.models.fingerprint import model_digest
from kne_easyedit.models.state import preserve_state
from kne_easyedit.models.targets import count_parameters

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
KINDS = [
    "stand-in",
    *(
        pytest.param(kind, marks=pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed"))
        for kind in ("4-bit", "8-bit")
    ),
]


class EightBit(nn.Linear):
    """Whole numbers and a scale for each row, as in bitsandbytes' ``Linear8bitLt``."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("SCB", scale, persistent=True)

    def forward(self, x):
        return functional.linear(x, (self.weight * self.SCB).to(x.dtype))


EightBit.__name__, EightBit.__module__ = "Linear8bitLt", "bitsandbytes.nn.modules"


def packed(kind, linear):
    if kind == "stand-in":
        return EightBit(linear)
    import bitsandbytes

    options = (linear.in_features, linear.out_features, False)
    if kind == "4-bit":
        made = bitsandbytes.nn.Linear4bit(*options, compute_dtype=torch.float32, quant_type="nf4")
    else:
        made = bitsandbytes.nn.Linear8bitLt(*options, has_fp16_weights=False)
    made.load_state_dict({"weight": linear.weight.detach().clone()})
    return made.to("cpu")


def plain():
    return make_llama(hidden_size=64, intermediate_size=128)  # bitsandbytes packs 32 rows at a time


def quantised(kind="stand-in"):
    """All linear layers of the decoder layers are packed, embeddings and head are not."""
    model = plain()
    for layer in model.model.layers:
        for part, name in [(layer.mlp, n) for n in ("gate_proj", "up_proj", "down_proj")] + [
            (layer.self_attn, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")
        ]:
            setattr(part, name, packed(kind, getattr(part, name)))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_kept_as_an_adapter(kind, tokenizer, tmp_path):
    """Localised, trained, saved, and served by PEFT over the same quantised base."""
    model = quantised(kind)
    assert not edited(model, tokenizer, REQUEST)
    before = fingerprint(model)["parameters"], model_digest(model)
    edit = compute_edit(model, tokenizer, REQUEST, tiny_hparams(p=0.5))
    assert edit.answers[0].greedy and edit.losses[-1] < edit.losses[0] / 10
    assert (fingerprint(model)["parameters"], model_digest(model)) == before
    save_adapter(edit, tmp_path / "a", model=model)
    served = PeftModel.from_pretrained(quantised(kind), tmp_path / "a").eval()
    assert edited(served, tokenizer, REQUEST)
    with served.disable_adapter():
        assert not edited(served, tokenizer, REQUEST)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_it(kind, tokenizer):
    """Also after passes without gradients, for which 4-bit weights are packed where the CPU multiplies bfloat16: of
    these there is no gradient at all."""
    model, name = quantised(kind), LLAMA_DOWN.format(1)
    edited(model, tokenizer, REQUEST)
    module, original = model.get_submodule(name), plain().get_submodule(name).weight
    with preserve_state(model):
        weight = module(torch.eye(128)).t()  # as it is stored
        assert 0 < difference(weight, original)[1] < 0.2
        x = torch.randn(3, 128, requires_grad=True)
        mixed = torch.randn(3, 64)
        (found,) = torch.autograd.grad((module(x) * mixed).sum(), x)
    assert difference(found, mixed @ weight)[1] < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_into_it(kind, tokenizer, monkeypatch):
    """EasyEdit's function refuses before it localises; a finished edit is refused, too."""
    model = quantised(kind)
    before = model_digest(model)
    edit = compute_edit(model, tokenizer, REQUEST, tiny_hparams(num_steps=1), ensemble_of(LLAMA_DOWN, width=64))
    monkeypatch.setattr(localization, "attribute_facts", None)
    bits = "4-bit" if kind == "4-bit" else "8-bit"
    refused = rf"{bits} \(bitsandbytes\).*unquantised.*keep it beside, as an adapter"
    for ensemble in (None, ensemble_of(LLAMA_DOWN, rows=MANY, width=64)):
        with pytest.raises(ValueError, match=refused):
            apply_kne_to_model(model, tokenizer, REQUEST, tiny_hparams(), ensemble=ensemble)
    with pytest.raises(ValueError, match=rf"merging would round what is added.*{refused[-20:]}"):
        write_rows(model, edit)
    with pytest.raises(ValueError, match=refused):
        edit.apply(model)
    assert model_digest(model) == before


def test_its_fingerprint(tmp_path):
    """Shapes are those of the products, whatever is stored; the edit is saved and loaded like any other."""
    model = quantised()
    edit = thing_of(model, layers=(1,))
    module = edit.base.modules[LLAMA_DOWN.format(1)]
    assert module.shape == (64, 128) and module.dtype == "int8"
    edit.save(tmp_path / "edit")
    assert KNEEdit.load(tmp_path / "edit") == edit
    assert edit.base.conflict(base_of(quantised(), list(edit.base.modules))) is None


@pytest.mark.parametrize("kind", KINDS)
def test_its_fingerprint_is_of_the_scales_as_well(kind):
    """And the same after passes that pack its weights, which round the scales of 4 bits: these do not count."""
    model, name = quantised(kind), LLAMA_DOWN.format(1)
    base, digest = base_of(model, [name]), model_digest(model)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert base_of(model, [name]) == base == base_of(quantised(kind), [name])
    assert model_digest(model) == digest == model_digest(quantised(kind))
    module = model.get_submodule(name)
    module.state_dict()  # unpacks it
    with torch.no_grad():
        (module.weight.data if kind == "4-bit" else scale_of(module)).view(-1)[0] += 1
    assert "quantised copy" in base.conflict(base_of(model, [name]))
    assert model_digest(model) != digest


def scale_of(module):
    return module.state_dict()["SCB"]


@pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
def test_the_shape_of_four_bits():
    model = quantised("4-bit")
    module = base_of(model, [LLAMA_DOWN.format(1)]).modules[LLAMA_DOWN.format(1)]
    assert model.get_submodule(LLAMA_DOWN.format(1)).weight.shape == (4096, 1)  # two numbers in a byte
    assert module.shape == (64, 128) and module.dtype == "uint8"


def test_scores_belong_to_the_scales_as_well():
    """The same whole numbers with another scale are another model."""
    model, other = quantised(), quantised()
    assert model_digest(model) == model_digest(other)
    other.get_submodule(LLAMA_DOWN.format(0)).SCB.mul_(1.5)
    assert model_digest(model) != model_digest(other)


def test_other_libraries_stay_refused(tokenizer):
    """Only bitsandbytes was tried."""
    model = quantised()

    class Foreign(EightBit):
        pass

    Foreign.__name__, Foreign.__module__ = "WQLinear", "awq.modules"
    Foreign.__bases__ = (nn.Linear,)
    model.model.layers[1].mlp.down_proj.__class__ = Foreign
    with pytest.raises(ValueError, match=r"quantised \(AWQ\)"):
        compute_edit(model, tokenizer, REQUEST, tiny_hparams())


class FourBit(EightBit):
    """As bitsandbytes' ``Linear4bit`` keeps it: two numbers a byte, in one column."""

    def __init__(self, linear):
        super().__init__(linear)
        self.whole = self.weight.detach()
        low, high = (self.weight.flatten()[start::2].to(torch.uint8) & 15 for start in (0, 1))
        self.weight = nn.Parameter((low | high << 4)[:, None], requires_grad=False)

    def forward(self, x):
        return functional.linear(x, (self.whole * self.SCB).to(x.dtype))


FourBit.__name__, FourBit.__module__ = "Linear4bit", "bitsandbytes.nn.modules"


def test_neighbours_are_spared_over_packed_weights_too(tokenizer):
    """The packed matrix has another shape than what it stands for: as many inputs are closed, as large is the share."""
    ensemble, found, shares = ensemble_of(LLAMA_DOWN, rows=MANY, width=64), [], []
    for kind in (EightBit, FourBit):
        model = plain()
        for layer in model.model.layers:
            layer.mlp.down_proj = kind(layer.mlp.down_proj)
        names = [LLAMA_DOWN.format(layer) for layer in range(4)]
        settings = {"input_projection": True, "neighbour_data": "embedded", "neighbour_relation_size": 4}
        with preserve_state(model):
            projections = projections_for(model, tokenizer, [REQUEST], tiny_hparams(**settings), names)
        found.append({name: len(one.basis) for name, one in projections.items()})
        shares.append(ensemble.parameter_share(model) * count_parameters(model))
    assert found[0] == found[1] and set(found[0]) == set(names) and min(found[0].values()) > 4
    assert shares[0] == pytest.approx(shares[1])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_count_as_the_numbers_that_they_stand_for(kind):
    assert count_parameters(quantised(kind)) == count_parameters(plain())
