"""What cannot take a row exactly is refused by name before anything is localised, and what can is taken."""

import warnings

import peft
import pytest
import torch
from conftest import GPT2_DOWN, LLAMA_DOWN, ONE_TOKEN, SIZE, fingerprint, make_gpt2, make_llama, tiny_hparams
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune

from kne_easyedit.attribution.engine import attribute
from kne_easyedit.doctor.modules import modules
from kne_easyedit.editing.adapter import row_adapter
from kne_easyedit.editing.edit import apply_kne_to_model
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.localization import localizer as localization
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.editable import require_editable
from kne_easyedit.models.state import preserve_state
from kne_easyedit.models.targets import resolve_target

REQUEST = {"prompt": ONE_TOKEN[0], "target_new": ONE_TOKEN[1]}
NAME = LLAMA_DOWN.format(1)
INNER = SIZE["inner"]


def put(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def replaced(make):
    """What spoils a model by another module in the place of one."""
    return lambda model, old: put(model, NAME, make(old))


def stand_in(name, bases=(nn.Linear,), module=__name__):
    return type(name, bases, {"__module__": module})


def eight_bit(old):
    """As bitsandbytes has it: a subclass of Linear whose weight is a subclass of Parameter that holds int8."""
    new = stand_in("Linear8bitLt")(old.in_features, old.out_features, bias=False)
    whole = (old.weight.detach() * 127 / old.weight.abs().max()).to(torch.int8)
    new.weight = whole.as_subclass(stand_in("Int8Params", (nn.Parameter,)))
    return new


def four_bit(old):
    new = stand_in("Linear4bit")(old.in_features, old.out_features, bias=False)
    packed = torch.zeros(old.weight.numel() // 2, 1, dtype=torch.uint8)
    new.weight = packed.as_subclass(stand_in("Params4bit", (nn.Parameter,)))
    return new


def without_linear(name, module="gptqmodel.nn_modules"):
    """As GPTQ, AWQ and HQQ have it: no Linear, packed buffers."""

    def make(old):
        new = stand_in(name, (nn.Module,), module)()
        new.register_buffer("qweight", torch.zeros(old.in_features // 8, old.out_features, dtype=torch.int32))
        return new

    return make


def of_torch(old):
    return torch.ao.nn.quantized.dynamic.Linear(old.in_features, old.out_features)


def subclass(name, module):
    """A Linear with a weight of a tensor subclass, as torchao has it."""

    def spoil(model, old):
        old._parameters["weight"] = old.weight.detach().as_subclass(stand_in(name, (nn.Parameter,), module))

    return spoil


def spread(model, old):
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    old.weight = nn.Parameter(distribute_tensor(old.weight.detach(), init_device_mesh("cpu", (1,))))


def typed(dtype):
    def spoil(model, old):
        old.weight = nn.Parameter(old.weight.detach().to(dtype), requires_grad=False)

    return spoil


def buffer(model, old):
    weight = old.weight.detach()
    del old.weight
    old.register_buffer("weight", weight)


def sharded(model, old):
    """As FSDP and ZeRO leave a weight outside a pass: a parameter without its content."""
    old.weight = nn.Parameter(torch.empty(0))


def shared(model, old):
    model.get_submodule(LLAMA_DOWN.format(2)).weight = old.weight


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Written(nn.Linear):
    """Falcon's way to write it."""

    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


def of_class(cls):
    def make(old):
        new = cls(old.in_features, old.out_features, bias=old.bias is not None)
        new.load_state_dict(old.state_dict())
        return new

    return make


SPOILT = {
    "8-bit": (replaced(eight_bit), r"8-bit \(bitsandbytes\).*unquantised, without load_in_8bit"),
    "4-bit": (replaced(four_bit), r"4-bit \(bitsandbytes\).*unquantised, without load_in_4bit"),
    "gptq": (replaced(without_linear("TorchQuantLinear")), r"quantised \(GPTQ\).*unquantised"),
    "awq": (replaced(without_linear("WQLinear_GEMM", "awq.modules")), r"quantised \(AWQ\).*unquantised"),
    "hqq": (replaced(without_linear("HQQLinear", "hqq.core")), r"quantised \(HQQ\).*unquantised"),
    "torch.ao": (replaced(of_torch), r"quantised \(torch.ao\).*unquantised"),
    "torchao": (subclass("AffineQuantizedTensor", "torchao.dtypes"), r"quantised \(torchao\).*unquantised"),
    "subclass": (subclass("OwnTensor", "somewhere"), "a OwnTensor, no plain torch.nn.Parameter.*unquantised and whole"),
    "int8": (typed(torch.int8), "of type int8; load the model in float32, bfloat16 or float16"),
    "float8": (typed(torch.float8_e4m3fn), "of type float8_e4m3fn; load the model in float32"),
    "prune": (
        lambda model, old: prune.l1_unstructured(old, "weight", 0.5),
        r"pruned \(torch.nn.utils.prune\).*prune.remove",
    ),
    "weight_norm": (lambda model, old: nn.utils.weight_norm(old), "under weight_norm; .*remove_weight_norm"),
    "weight_norm, new": (
        lambda model, old: parametrizations.weight_norm(old),
        "parametrised: WeightNorm.*remove_parametrizations",
    ),
    "spectral_norm": (lambda model, old: nn.utils.spectral_norm(old), "under spectral_norm; .*remove_spectral_norm"),
    "parametrize": (
        lambda model, old: parametrize.register_parametrization(old, "weight", nn.Identity()),
        "parametrised: Identity",
    ),
    "buffer": (buffer, "no parameter but a buffer; make it a plain torch.nn.Parameter"),
    "meta": (lambda model, old: old.to("meta"), r"not loaded \(on the meta device\); load the model's weights"),
    "sharded": (sharded, r"stored as \(0,\) .*load the whole model"),
    "shared": (shared, "shared with model.layers.2.mlp.down_proj.weight, which an edit would change, too; untie them"),
    "own forward": (replaced(of_class(Scaled)), r"Scaled computes with: its output is not x W\^T \+ b"),
}


@pytest.fixture
def untouched(monkeypatch):
    """Nothing may be localised, let alone trained."""
    monkeypatch.setattr(localization, "attribute_facts", None)
    monkeypatch.setattr(localization, "ScoreCache", None)


def spoilt(kind):
    model = make_llama()
    spoil, message = SPOILT[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spoil(model, model.get_submodule(NAME))
    return model, message


@pytest.mark.parametrize("kind", SPOILT)
def test_refused_before_localisation(kind, tokenizer, untouched):
    model, message = spoilt(kind)
    with pytest.raises(ValueError, match=rf"target_modules: {NAME} .*{message}"):
        apply_kne_to_model(model, tokenizer, [REQUEST], tiny_hparams())


@pytest.mark.parametrize("kind", ["8-bit", "prune", "shared", "own forward"])
@pytest.mark.parametrize("way", ["given", "file", "training"])
def test_refused_with_an_ensemble_of_ones_own(kind, way, tokenizer, facts, tmp_path):
    model, message = spoilt(kind)
    ensemble = NeuronEnsemble({LLAMA_DOWN: {1: (0, 3)}}, {LLAMA_DOWN: SIZE["hidden"]})
    ensemble.save(tmp_path / "ensemble.json")
    with pytest.raises(ValueError, match=rf"target_modules: {NAME} cannot be edited: .*{message}"):
        if way == "given":
            apply_kne_to_model(model, tokenizer, [REQUEST], tiny_hparams(), ensemble=ensemble)
        elif way == "file":
            apply_kne_to_model(model, tokenizer, [REQUEST], tiny_hparams(ensemble=str(tmp_path / "ensemble.json")))
        else:
            train_rows(model, facts, ensemble, tiny_hparams())


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_refused_spread_over_processes(tokenizer, untouched, alone):
    model = make_llama()
    spread(model, model.get_submodule(NAME))
    with pytest.raises(
        ValueError, match=rf"LlamaForCausalLM is spread over processes: {NAME}.weight is a DTensor.*into one process"
    ):
        apply_kne_to_model(model, tokenizer, [REQUEST], tiny_hparams())


WRAPPED = {
    "FSDP": (
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        r"spread over processes \(FSDP\).*into one process",
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_refused_as_a_whole(kind, tokenizer, untouched, request):
    """Before a template is looked for: in a wrapper every module has another name."""
    if kind == "FSDP":
        request.getfixturevalue("alone")
    wrap, message = WRAPPED[kind]
    model = wrap(make_llama())
    with pytest.raises(ValueError, match=f"model: {type(model).__name__} is {message}"):
        apply_kne_to_model(model, tokenizer, [REQUEST], tiny_hparams())


def test_other_layers_do_not_matter(llama, tokenizer):
    """Converse: only what may be written to is asked."""
    prune.l1_unstructured(llama.get_submodule(NAME), "weight", 0.5)
    before = llama.get_submodule(LLAMA_DOWN.format(2)).weight.clone()
    apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams(layers=[2]))
    assert not torch.equal(llama.get_submodule(LLAMA_DOWN.format(2)).weight, before)


WAYS_OUT = {
    "prune": (
        lambda module: prune.random_unstructured(module, "weight", 0.5),
        lambda module: prune.remove(module, "weight"),
    ),
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "parametrize": (parametrizations.weight_norm, lambda module: parametrize.remove_parametrizations(module, "weight")),
}


@pytest.mark.parametrize("kind", WAYS_OUT)
def test_the_way_out_is_one(kind, llama):
    """Converse: what the message says makes the module editable."""
    spoil, mend = WAYS_OUT[kind]
    module = llama.get_submodule(NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spoil(module)
    with pytest.raises(ValueError, match=NAME):
        require_editable(llama, {NAME: module})
    mend(module)
    require_editable(llama, {NAME: llama.get_submodule(NAME)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make, template", [(make_llama, LLAMA_DOWN), (make_gpt2, GPT2_DOWN)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("written", [True, False])
def test_plain_products_are_taken(dtype, make, template, written):
    """Converse: whoever writes the product, and in whatever type."""
    model = make(dtype)
    target = resolve_target(model, template)
    if written and make is make_llama:
        for name, module in zip(target.names, target.modules):
            put(model, name, of_class(Written)(module).to(dtype))
        target = resolve_target(model, template)
    require_editable(model, dict(zip(target.names, target.modules)))


def test_a_model_on_several_devices_is_taken(llama, tokenizer):
    """accelerate puts a forward of its own into every module of it, but the weights stay where they are."""
    from accelerate import dispatch_model

    model = dispatch_model(llama, {"": "cpu"}, main_device="cpu", force_hooks=True)
    target = resolve_target(model, LLAMA_DOWN)
    require_editable(model, dict(zip(target.names, target.modules)))


@pytest.mark.parametrize("kind", ["prune", "shared", "own forward"])
def test_attribution_needs_outputs_only(kind, tokenizer):
    model, _ = spoilt(kind)
    assert attribute(model, tokenizer, *ONE_TOKEN, LLAMA_DOWN, 2).isfinite().all()


class TestAdapters:
    def test_an_unmerged_one_is_refused_before_localisation(self, llama, tokenizer, untouched):
        llama.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
        before = fingerprint(llama)
        message = "LlamaForCausalLM carries a PEFT adapter; merge or unload it.*at model.layers.0.self_attn.q_proj"
        with pytest.raises(ValueError, match=message):
            apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams())
        assert fingerprint(llama) == before

    def test_so_is_a_copy_of_a_whole_module(self, llama, tokenizer, untouched):
        """PEFT's ``modules_to_save``: the copy hides the base weight, which an edit would change."""
        model = peft.get_peft_model(
            llama, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"])
        ).base_model.model
        with pytest.raises(ValueError, match="carries a PEFT adapter"):
            apply_kne_to_model(model, tokenizer, [REQUEST], tiny_hparams())

    def test_names_that_end_like_a_targets_are_left_alone(self, llama, facts):
        """A second tower whose names end like those of the first: PEFT takes names for endings."""
        llama.second = nn.Module()
        llama.second.model = make_llama(seed=3).model
        nested = f"second.{LLAMA_DOWN}"
        before, modules = fingerprint(llama), dict(llama.named_modules())
        rows = {LLAMA_DOWN: {0: (1,), 1: (2, 3)}, nested: {1: (4, 5, 6), 2: (7,)}}
        ensemble = NeuronEnsemble(rows, {LLAMA_DOWN: SIZE["hidden"], nested: SIZE["hidden"]})
        for some in (ensemble, NeuronEnsemble({LLAMA_DOWN: rows[LLAMA_DOWN]}, ensemble.widths)):
            chosen = {
                t.format(layer): len(found) for t, layers in some.neurons.items() for layer, found in layers.items()
            }
            with preserve_state(llama), row_adapter(llama, some, tiny_hparams()) as layers:
                adapted = {
                    name: m.r["kne"] for name, m in llama.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
                }
                assert adapted == chosen == {name: layer.r["kne"] for name, layer in layers.items()}
            assert fingerprint(llama) == before
            assert dict(llama.named_modules()) == modules


class TestDoctor:
    """`kne doctor` has no weights to look at, but the configuration."""

    @pytest.mark.parametrize(
        ("stored", "status"),
        [
            (None, "ok"),
            ({"quant_method": "gptq", "bits": 4}, "warning"),
            ({"quant_method": "mxfp4", "dequantize": True}, "ok"),
        ],
    )
    def test_quantised_files_are_named(self, llama, stored, status):
        llama.config.quantization_config = stored
        (finding,) = modules({"KNE": tiny_hparams()}, llama)
        assert finding.status.lower() == status
        assert status == "ok" or (
            "files are quantised (gptq)" in finding.text and finding.way_out == "load the model unquantised"
        )
