"""Tiny models and a tiny tokenizer, made in memory: nothing is downloaded, nothing is random between runs."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import sys
import uuid
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kne_easyedit._util.files import cache_home
from kne_easyedit.facts.encoding import encode
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.models import smollm2 as real_model
from kne_easyedit.models.targets import resolve_target

pytest_plugins = ["stored_scores"]

SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = (  # noqa: SIM905  (a list of words reads worse)
    "The the capital language river name mother city of in is was to that through flows spoken What Where ? . "
    "France Spain Peru Italy Rome Paris Madrid Lima Latin Tiber and Marie Ada Oslo"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

ONE_TOKEN = ("The capital of France is", "Rome")
THREE_TOKENS = ("What is the name of the river that flows through Rome ?", "the Tiber .")
SPELLED = ("Ada spoken in", "Ido")  # a word outside the vocabulary: one token a letter
FACTS = (ONE_TOKEN, THREE_TOKENS, SPELLED)

LLAMA_DOWN = "model.layers.{}.mlp.down_proj"
GPTJ_DOWN = "transformer.h.{}.mlp.fc_out"
GPT2_DOWN = "transformer.h.{}.mlp.c_proj"
SIZE = {"hidden": 24, "inner": 40, "layers": 4, "heads": 4}


# It warns when it is first imported, in whichever test that is.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if os.environ.get("EASYEDIT_HOME") and not os.environ.get("KNE_TEST_CHECKOUT"):
    os.environ["KNE_TEST_HOME"] = os.environ.pop("EASYEDIT_HOME")  # under this name pytest-xdist's workers inherit it
CHECKOUT = os.environ.get("EASYEDIT_HOME") or os.environ.get("KNE_TEST_HOME") or None
"""The user's checkout of EasyEdit: test_checkout.py runs on it. This process tests the installed release, for one
process imports one EasyEdit."""

HERE = str(Path(__file__).parent)
if HERE not in os.environ.get("PYTHONPATH", "").split(
    os.pathsep
):  # processes that tests start import conftest and the other helpers, too
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads; a name that is none is then refused at once

THREADS = int(os.environ.get("KNE_TEST_THREADS") or 1)
"""Threads of torch in tests of tiny models: several wait for each other, on a busy machine 50 times as long. `make
test-kernels` uses more on purpose: sums are then split in other places."""

HANGS = 1800
"""Seconds after which a process counts as hanging. No test takes a tenth of that on the slowest machine."""


def with_same_threads() -> dict[str, str]:
    """The environment of a process that computes the same bits as the test that starts it."""
    return {**os.environ, "OMP_NUM_THREADS": str(THREADS)}


# What a test needs

TIERS = ("unit", "easyedit", "model")
"""Markers, one for every test: it needs nothing, EasyEdit, or the real model (and perhaps EasyEdit)."""


@cache
def tier_of(module: Path) -> str:
    """The marker that a module sets (``pytestmark = pytest.mark.…``), else the one that its imports show."""
    text = module.read_text(encoding="utf-8")
    if said := re.search(rf"^pytestmark = pytest\.mark\.({'|'.join(TIERS)})$", text, re.MULTILINE):
        return said[1]
    imports = "\n".join(re.findall(r"^ *(?:from|import) .*", text, re.MULTILINE))
    if "smollm2_path" in imports:
        return "model"
    return "easyedit" if re.search(r"\b(bridge|benchmark|studies|methods)\b", imports) else "unit"


BROAD = (
    "test_families",
    "test_written",
    "test_score_cache_processes",
    "test_properties",
    "test_stability",
    "test_modes",
    "test_interrupts",
)
"""Modules that test the same property on many models, types or processes."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in BROAD:
            item.add_marker("broad")
        if not any(item.get_closest_marker(tier) for tier in TIERS):
            item.add_marker(tier_of(item.path))
    items.sort(key=lambda item: item.get_closest_marker("model") is None)  # the longest do not begin last


@pytest.fixture(autouse=True)
def no_more_than_its_marker_says(request, monkeypatch):
    """`make test-fast` runs without EasyEdit and the real model: a test of it that needs them fails, and says so."""
    needs = next(tier for tier in TIERS if request.node.get_closest_marker(tier))
    if needs != "model":
        converted = "the real model is needed: put `pytestmark = pytest.mark.model` into the module"
        monkeypatch.setattr(real_model, "convert_smollm2", lambda *_: pytest.fail(converted))
    before = "easyeditor" in sys.modules
    yield
    if needs == "unit" and not before and "easyeditor" in sys.modules:
        pytest.fail("EasyEdit was imported: put `pytestmark = pytest.mark.easyedit` into the module")


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """SmolLM2-135M in the user's cache; the workers wait for the one that converts it."""
    cache_home().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_home() / "tests.lock"):
        return real_model.smollm2_path()


@pytest.fixture(scope="session")
def smollm2(real_folder):
    """The model in float32 and its tokenizer, loaded once a worker. Tests must not change it."""
    return AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        real_folder
    )


@pytest.fixture(autouse=True)
def own_cache(request, monkeypatch, tmp_path_factory):
    """Every test has a cache of its own; only the real model's tests share the user's (its conversion is slow)."""
    if not _is_real(request):
        monkeypatch.setenv("KNE_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"))


@pytest.fixture
def sigint():
    """Python's own handler, whatever the runner of the tests has set; afterwards the one before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def few_threads(request):
    """The real model's tests have as many as there are, unless several workers share the cores."""
    threads = torch.get_num_threads()
    if not _is_real(request) or "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


def _is_real(request) -> bool:
    return request.node.get_closest_marker("model") is not None


# The tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words of `WORDS` are one token, all others fall apart into letters; ``~`` is dropped altogether."""
    pieces = [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -8.0) for letter in ("▁", *LETTERS)]
    backend = Tokenizer(models.Unigram([(token, 0.0) for token in SPECIAL] + pieces, unk_id=SPECIAL.index("<unk>")))
    backend.normalizer = normalizers.Sequence([normalizers.Replace("~", ""), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def facts(tokenizer):
    """Facts of different lengths, with answers of different lengths."""
    return [encode(tokenizer, *fact) for fact in FACTS]


# Models


def sharpened(model: nn.Module, dtype: torch.dtype, seed: int) -> nn.Module:
    """Random weights, biases and norms, large enough that probabilities are far from uniform: a bug shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight", "lm_head.weight")):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 2.0 / SIZE["hidden"] ** 0.5)
    return model.to(dtype).eval()


def make_llama(dtype=torch.float32, seed=10, **changes) -> LlamaForCausalLM:
    config = dict(
        vocab_size=len(make_tokenizer()),
        hidden_size=SIZE["hidden"],
        intermediate_size=SIZE["inner"],
        num_hidden_layers=SIZE["layers"],
        num_attention_heads=SIZE["heads"],
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        pad_token_id=0,
        eos_token_id=1,
    )
    return sharpened(LlamaForCausalLM(LlamaConfig(**{**config, **changes})), dtype, seed)


def make_gptj(dtype=torch.float32, seed=289, **changes) -> GPTJForCausalLM:
    config = dict(
        vocab_size=len(make_tokenizer()),
        n_embd=SIZE["hidden"],
        n_inner=SIZE["inner"],
        n_layer=SIZE["layers"],
        n_head=SIZE["heads"],
        n_positions=64,
        rotary_dim=4,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return sharpened(GPTJForCausalLM(GPTJConfig(**{**config, **changes})), dtype, seed)


def make_gpt2(dtype=torch.float32, seed=0, **changes) -> GPT2LMHeadModel:
    config = dict(
        vocab_size=len(make_tokenizer()),
        n_embd=SIZE["hidden"],
        n_inner=SIZE["inner"],
        n_layer=SIZE["layers"],
        n_head=SIZE["heads"],
        n_positions=64,
        attn_implementation="sdpa",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return sharpened(GPT2LMHeadModel(GPT2Config(**{**config, **changes})), dtype, seed)


class Family(NamedTuple):
    """A tiny model and the templates of its modules."""

    model: nn.Module
    down: str
    up: str
    attn_out: str
    query: str


def make_family(name: str, dtype: torch.dtype) -> Family:
    if name == "llama":
        mlp, attention = "model.layers.{}.mlp.", "model.layers.{}.self_attn."
        return Family(make_llama(dtype), f"{mlp}down_proj", f"{mlp}up_proj", f"{attention}o_proj", f"{attention}q_proj")
    mlp, attention = "transformer.h.{}.mlp.", "transformer.h.{}.attn."
    return Family(make_gptj(dtype), f"{mlp}fc_out", f"{mlp}fc_in", f"{attention}out_proj", f"{attention}q_proj")


class NoDetours(TorchFunctionMode):
    """Inside, float32 becomes float64: in norms, softmax, rotary embeddings and logits of any family's own code.

    For float64 models only. The package asks for float32 at least, so that its own code is the same with and without.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(_doubled, args), **{name: _doubled(value) for name, value in (kwargs or {}).items()})


def _doubled(value):
    return torch.float64 if value is torch.float32 else value


@pytest.fixture
def double_precision():
    """Makes the models' own code exact in float64; the package's code stays as it is."""
    with NoDetours():
        yield


@pytest.fixture(params=["llama", "gptj"])
def family(request, double_precision) -> Family:
    """Both families in float64 (Llama with tied embeddings, GPT-J with a head and a head's bias of its own)."""
    return make_family(request.param, torch.float64)


@pytest.fixture(params=["llama", "gptj"])
def family32(request) -> Family:
    """Both families in float32, as transformers has them."""
    return make_family(request.param, torch.float32)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def llama64(double_precision) -> LlamaForCausalLM:
    return make_llama(torch.float64)


def tiny_hparams(template: str = LLAMA_DOWN, **changes) -> KNEHyperParams:
    """Settings under which the tiny models learn a fact within a second."""
    settings = dict(
        model_name="tiny", target_modules=[template], device="cpu", p=0.2, attribution_steps=4, lr=5e-2, stop_loss=0.05
    )
    return KNEHyperParams(**{**settings, **changes})


def all_layers(model: nn.Module, template: str = LLAMA_DOWN):
    return resolve_target(model, template)


# A model's state

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_pre_hooks")


def bits(tensor: torch.Tensor) -> str:
    """Digest of a tensor's type, shape and bits (-0.0 is not 0.0, and a NaN equals itself)."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + data).hexdigest()


def weights(model: nn.Module) -> dict[str, str]:
    """Parameter name -> its bits."""
    return {name: bits(parameter) for name, parameter in model.named_parameters()}


def fingerprint(model: nn.Module) -> dict:
    """All of a model that an edit must preserve or restore. Equal only for the same model object."""
    return {
        "weights": weights(model),
        "buffers": {name: bits(buffer) for name, buffer in model.named_buffers()},
        "parameters": {n: (id(p), p.requires_grad, p.grad is None) for n, p in model.named_parameters()},
        "modules": {n: (id(m), type(m), m.training, *_hooks(m)) for n, m in model.named_modules()},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "flags": (model.config.use_cache, model.config._attn_implementation, "peft_config" in model.__dict__),
    }


def _hooks(module: nn.Module) -> list[int]:
    return [len(getattr(module, kind)) for kind in _HOOKS]


def failing(function, call: int, error: BaseException):
    """``function``, but its ``call``-th call raises ``error``; the attribute ``calls`` counts them."""

    def wrapper(*args, **kwargs):
        wrapper.calls += 1
        if wrapper.calls == call:
            raise error
        return function(*args, **kwargs)

    wrapper.calls = 0
    return wrapper
