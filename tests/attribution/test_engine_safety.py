"""Attribution preserves the model; it refuses layers that replay differently and values that are not finite."""

import pytest
import torch
from conftest import (
    FACTS,
    GPTJ_DOWN,
    LLAMA_DOWN,
    ONE_TOKEN,
    SIZE,
    SPELLED,
    all_layers,
    failing,
    fingerprint,
    make_gptj,
    make_llama,
    tiny_hparams,
)
from families import make

from kne_easyedit.attribution.engine import attribute, attribute_facts
from kne_easyedit.attribution.quadrature import gauss_legendre, riemann
from kne_easyedit.attribution.replay import Replay, ReplayMismatch, UnsupportedModel
from kne_easyedit.localization.localizer import localize
from kne_easyedit.models.fingerprint import model_digest
from kne_easyedit.models.state import preserve_state
from kne_easyedit.models.targets import resolve_target

STEPS = 4
ROLES = ("down", "up", "attn_out", "query")
Q_PROJ = "model.layers.{}.self_attn.q_proj"


class TestAsFound:
    """Hooks, flags, modules and weights are those from before, whatever happened in between."""

    def test_after_success(self, family32, tokenizer):
        before = fingerprint(family32.model)
        for role in ROLES:
            attribute(family32.model, tokenizer, *SPELLED, getattr(family32, role), 2)
            assert fingerprint(family32.model) == before

    def test_of_a_model_in_training(self, family32, tokenizer):
        model = family32.model
        expected = attribute(model, tokenizer, *SPELLED, family32.down, STEPS)
        unusual(model)
        before = fingerprint(model)
        scores = attribute(model, tokenizer, *SPELLED, family32.down, STEPS)
        assert fingerprint(model) == before
        assert torch.equal(scores, expected), "neither dropout nor checkpointing may play a part"

    @pytest.mark.parametrize("error", [MemoryError("injected"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
    @pytest.mark.parametrize("call", [1, 3, 5])
    def test_after_an_exception_in_a_layer(self, family32, tokenizer, monkeypatch, error, call):
        """Calls of a layer's MLP: the clean pass, the self-check, the search for a constant part, the sweep."""
        model = family32.model
        unusual(model)
        mlp = model.get_submodule(family32.down.format(2).rpartition(".")[0])
        monkeypatch.setattr(mlp, "forward", failing(mlp.forward, call, error))
        before = fingerprint(model)
        with pytest.raises(type(error)):
            attribute(model, tokenizer, *SPELLED, family32.up, STEPS, chunk_rows=4)
        assert mlp.forward.calls == call
        assert fingerprint(model) == before

    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_after_an_exception_in_autograd(self, family32, tokenizer, monkeypatch, call):
        before = fingerprint(family32.model)
        monkeypatch.setattr(torch.autograd, "grad", failing(torch.autograd.grad, call, MemoryError()))
        with pytest.raises(MemoryError):
            attribute(family32.model, tokenizer, *SPELLED, family32.down, STEPS, chunk_rows=4)
        assert fingerprint(family32.model) == before

    @pytest.mark.parametrize("found", [True, False])
    def test_flags_that_a_library_switches_meanwhile(self, llama, found):
        """Gradient checkpointing, for one, switches the model's use_cache off and leaves it so."""
        llama.config.use_cache = found
        before = fingerprint(llama)
        with pytest.raises(KeyboardInterrupt), preserve_state(llama):
            llama.config.use_cache = not found
            llama.train()
            llama.requires_grad_(True)
            raise KeyboardInterrupt
        assert fingerprint(llama) == before

    def test_the_model_still_generates_as_before(self, family32, tokenizer):
        ids = tokenizer(ONE_TOKEN[0], return_tensors="pt")
        before = family32.model.generate(**ids, max_new_tokens=5, do_sample=False)
        attribute(family32.model, tokenizer, *ONE_TOKEN, family32.query, 2)
        assert torch.equal(family32.model.generate(**ids, max_new_tokens=5, do_sample=False), before)


def unusual(model):
    """Training mode with one module in evaluation mode, some parameters frozen, checkpointing on, no cache."""
    model.train()
    model.config.use_cache = False
    for i, module in enumerate(model.modules()):
        module.training = i % 5 != 0
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)


class TestSelfCheck:
    """A layer that does more than attend causally gives wrong scores: there must be none."""

    @staticmethod
    def shift(hidden):
        return hidden + 0.5 * hidden.roll(1, dims=1)

    @staticmethod
    def count(hidden):
        return hidden * (1 + 0.1 * hidden.shape[1])

    @staticmethod
    def state():
        seen = []

        def accumulate(hidden):
            seen.append(0.1)
            return hidden + sum(seen)

        return accumulate

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("mixing", ["shift", "count", "state"])
    def test_a_layer_that_replays_differently_is_refused(self, tokenizer, monkeypatch, dtype, mixing):
        model = make_llama(dtype)
        mix = self.state() if mixing == "state" else getattr(self, mixing)
        mlp = model.model.layers[2].mlp
        own = mlp.forward
        monkeypatch.setattr(mlp, "forward", lambda hidden: own(mix(hidden)))
        before = fingerprint(model)
        with pytest.raises(ReplayMismatch, match="replaying layer 2"):
            attribute(model, tokenizer, *ONE_TOKEN, LLAMA_DOWN, STEPS)
        assert fingerprint(model) == before

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_one_large_dimension_hides_no_error(self, tokenizer, monkeypatch, dtype):
        """As in trained models: hundreds of times the others, and of no weight behind the norms."""
        model = make_llama(dtype)
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 500
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight *= 50 / len(weight) ** 0.5
                    weight[0] = 0
        attribute(model, tokenizer, *ONE_TOKEN, LLAMA_DOWN, STEPS)  # as it is, it is sound
        mlp = model.model.layers[2].mlp
        own = mlp.forward
        monkeypatch.setattr(mlp, "forward", lambda hidden: own(self.shift(self.shift(hidden))))
        with pytest.raises(ReplayMismatch, match="replaying layer 2"):
            attribute(model, tokenizer, *ONE_TOKEN, LLAMA_DOWN, STEPS)

    @pytest.mark.parametrize("layer", range(SIZE["layers"]))
    def test_an_attention_of_its_own_is_refused(self, llama, tokenizer, monkeypatch, layer):
        class Averaging(torch.nn.Module):
            def forward(self, hidden_states, **_):
                return hidden_states.cumsum(1), None

        monkeypatch.setattr(llama.model.layers[layer], "self_attn", Averaging())
        with pytest.raises(UnsupportedModel, match=f"layer {layer} .* prefix cannot be shared"):
            attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, STEPS, engine="sweep")

    def test_unknown_arguments_are_refused(self, llama, tokenizer, monkeypatch):
        layer = llama.model.layers[1]
        monkeypatch.setattr(layer, "forward", self.with_extra(layer.forward))
        own = type(llama.model.layers[0]).__call__
        extra = torch.ones(3)
        monkeypatch.setattr(
            type(layer),
            "__call__",
            lambda self, *a, **k: own(self, *a, **k, **({"extra": extra} if self is layer else {})),
        )
        with pytest.raises(UnsupportedModel, match="unknown argument 'extra'"):
            attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, STEPS, engine="sweep")

    @staticmethod
    def with_extra(forward):
        def wrapper(hidden_states, *args, extra=None, **kwargs):
            return forward(hidden_states, *args, **kwargs)

        return wrapper

    def test_sound_models_pass_in_every_precision(self, tokenizer):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for made, template in ((make_llama, LLAMA_DOWN), (make_gptj, GPTJ_DOWN)):
                assert attribute(made(dtype), tokenizer, *ONE_TOKEN, template, 1).isfinite().all()


class TestPrecision:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
    def test_weights_that_are_not_finite(self, llama, tokenizer, name, value):
        with torch.no_grad():
            llama.get_parameter(name).view(-1)[3] = value
        before = fingerprint(llama)
        with pytest.raises(FloatingPointError, match="finite"):
            attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, STEPS)
        assert fingerprint(llama) == before

    def test_scores_that_are_not_finite_name_the_fact(self, llama, facts, monkeypatch):
        target = all_layers(llama)

        def spoilt(m):
            nodes, weights = riemann(m)
            return nodes, weights * float("nan")

        with pytest.raises(FloatingPointError, match="France is' -> 'Rome' is not finite"):
            attribute_facts(llama, [target], facts, STEPS, quadrature=spoilt)

    @pytest.mark.parametrize(("make", "template"), [(make_llama, LLAMA_DOWN), (make_gptj, GPTJ_DOWN)])
    @pytest.mark.parametrize("fact", FACTS)
    def test_bfloat16_gives_nearly_the_same_scores_in_float32(self, tokenizer, make, template, fact):
        exact = attribute(make(), tokenizer, *fact, template)
        rough = attribute(make(torch.bfloat16), tokenizer, *fact, template)
        assert rough.dtype == torch.float32 and rough.isfinite().all()
        assert torch.corrcoef(torch.stack([exact.flatten(), rough.flatten()]))[0, 1] > 0.99
        assert not torch.equal(exact, rough)


class TestArguments:
    def test_a_quadrature_is_a_name_or_a_function(self, llama, tokenizer):
        def scores(quadrature):
            return attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, 3, quadrature=quadrature)

        assert torch.equal(scores("gauss-legendre"), scores(gauss_legendre))
        assert torch.equal(scores("riemann"), scores(riemann)) and not torch.equal(
            scores(riemann), scores(gauss_legendre)
        )
        for unknown, hint in (("gauss_legendre", "did you mean 'gauss-legendre'"), (3, "must be one of")):
            with pytest.raises(ValueError, match=f"quadrature: {unknown!r} .*{hint}"):
                scores(unknown)

    def test_tokens_that_the_model_has_not(self, llama, tokenizer):
        """A tokenizer of another model: named before anything is computed."""
        llama.resize_token_embeddings(7)
        with pytest.raises(
            ValueError, match=r"tokenizer: token \d+ of .* the model knows those below 7; take the model's"
        ):
            attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, STEPS)
        with pytest.raises(ValueError, match="tokenizer: token"):
            localize(llama, tokenizer, [{"prompt": ONE_TOKEN[0], "target_new": ONE_TOKEN[1]}], tiny_hparams())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"chunk_rows": -5}, "chunk_rows: -5 must be a whole number of at least 1"),
            ({"chunk_rows": "a"}, "chunk_rows: 'a' must be"),
            ({"steps": True}, "attribution_steps: True must be a whole number"),
            ({"layers": ["1"]}, r"layers: \['1'\] must be numbers of layers"),
            ({"layers": [True]}, r"layers: \[True\] must be numbers of layers"),
        ],
    )
    def test_others_are_named(self, llama, tokenizer, arguments, message):
        with pytest.raises(ValueError, match=message):
            attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, **{"steps": STEPS, **arguments})

    def test_no_facts(self, llama):
        with pytest.raises(ValueError, match="facts: there are none"):
            attribute_facts(llama, [resolve_target(llama, LLAMA_DOWN)], [], STEPS)


def test_a_loss_of_the_routers_does_not_matter(tokenizer):
    """Fine-tuned mixtures of experts ask for it in their configuration."""
    model, name = make("gpt-oss", torch.float32), "model.layers.{}.self_attn.o_proj"
    own = attribute(model, tokenizer, *ONE_TOKEN, name, STEPS, engine="sweep")
    model.config.output_router_logits = True
    assert torch.equal(attribute(model, tokenizer, *ONE_TOKEN, name, STEPS, engine="sweep"), own)


def test_an_error_in_the_head_is_one_of_the_replay(llama, tokenizer, monkeypatch):
    """``auto`` goes the slow way then."""
    own = attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, STEPS)

    def fail(*_):
        raise IndexError("no router logits")

    monkeypatch.setattr(Replay, "head", fail)
    with pytest.raises(UnsupportedModel, match=r"do not run one by one .*no router logits"):
        attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, STEPS, engine="sweep")
    found = attribute(llama, tokenizer, *ONE_TOKEN, LLAMA_DOWN, STEPS)
    assert (found - own).abs().max() < 1e-5 * own.abs().max()


def test_scores_of_another_attention_are_not_shared():
    """transformers 4.57 leaves Gemma 2's soft cap out under sdpa, and its configuration does not say so."""
    model = make("gemma2", torch.float32)
    text = model.config.get_text_config()
    assert text.attn_logit_softcapping
    digests = {}
    for implementation in ("eager", "sdpa"):
        text._attn_implementation_internal = implementation
        digests[implementation] = model_digest(model)
    assert digests["eager"] != digests["sdpa"]
    text.attn_logit_softcapping = None
    assert model_digest(model) not in digests.values()
    text._attn_implementation_internal = "eager"
    plain = model_digest(model)
    text._attn_implementation_internal = "sdpa"
    assert model_digest(model) == plain, "without a cap they give the same, and older caches hold"
