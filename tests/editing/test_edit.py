"""apply_kne_to_model: EasyEdit's contract, the edit's success, and every bad input of the core."""

import json

import pytest
import torch
from conftest import (
    GPT2_DOWN,
    GPTJ_DOWN,
    LLAMA_DOWN,
    THREE_TOKENS,
    fingerprint,
    make_gpt2,
    make_gptj,
    make_llama,
    make_tokenizer,
    tiny_hparams,
    weights,
)
from edits import REQUEST, REQUESTS, edited, predicted, request
from tokenizers import processors

from kne_easyedit.editing.edit import apply_kne_to_model, compute_edit
from kne_easyedit.facts.encoding import encode
from kne_easyedit.localization import localizer as localization
from kne_easyedit.localization.ensemble import NeuronEnsemble


class TestContract:
    def test_edits_in_place(self, llama, tokenizer):
        before = weights(llama)
        model, originals = apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams())
        assert model is llama and originals == {}
        assert weights(llama) != before

    def test_a_copy_leaves_the_original_alone(self, llama, tokenizer):
        before = fingerprint(llama)
        model, _ = apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams(), copy=True, return_orig_weights=True)
        assert model is not llama and type(model) is type(llama)
        assert fingerprint(llama) == before
        assert edited(model, tokenizer, REQUEST) and not edited(llama, tokenizer, REQUEST)

    def test_original_weights_are_whole_matrices(self, llama, tokenizer):
        shapes = {name: parameter.shape for name, parameter in llama.named_parameters()}
        before = weights(llama)
        _, originals = apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams(), return_orig_weights=True)
        changed = {name for name, digest in weights(llama).items() if digest != before[name]}
        assert set(originals) == changed != set()
        assert all(value.shape == shapes[name] for name, value in originals.items())

    @pytest.mark.parametrize(
        ("make", "template"), [(make_llama, LLAMA_DOWN), (make_gptj, GPTJ_DOWN), (make_gpt2, GPT2_DOWN)]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_editors_own_restore_is_bit_exact(self, tokenizer, make, template, dtype):
        model = make(dtype)
        before = fingerprint(model)
        _, originals = apply_kne_to_model(
            model, tokenizer, [REQUEST], tiny_hparams(template, p=0.3), return_orig_weights=True
        )
        assert fingerprint(model) != before
        with torch.no_grad():  # as EasyEdit does it
            for name, value in originals.items():
                dict(model.named_parameters())[name][...] = value
        assert fingerprint(model) == before

    @pytest.mark.parametrize(
        ("legacy", "wanted", "keep", "returned"),
        [
            (False, False, False, False),
            (False, False, True, False),
            (False, True, False, True),
            (False, True, True, True),
            (True, False, True, False),
            (True, True, False, False),
            (True, True, True, True),
        ],
    )
    def test_both_meanings_of_keep_original_weight(self, llama, tokenizer, legacy, wanted, keep, returned):
        _, originals = apply_kne_to_model(
            llama, tokenizer, [REQUEST], tiny_hparams(num_steps=1), False, wanted, keep, legacy_contract=legacy
        )
        assert bool(originals) is returned

    def test_other_arguments_of_the_editor_are_taken(self, llama, tokenizer):
        apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams(num_steps=1), train_ds=None, file_path="x")

    def test_only_weights_change(self, family32, tokenizer):
        before = fingerprint(family32.model)
        apply_kne_to_model(family32.model, tokenizer, [REQUEST], tiny_hparams(family32.down))
        after = fingerprint(family32.model)
        assert after.pop("weights") != before.pop("weights")
        assert after == before

    def test_computing_an_edit_changes_nothing(self, llama, tokenizer):
        before = fingerprint(llama)
        edit = compute_edit(llama, tokenizer, [REQUEST], tiny_hparams())
        assert edit.losses[-1] < 0.05
        assert fingerprint(llama) == before


class TestSuccess:
    @pytest.mark.parametrize(
        ("make", "template"), [(make_llama, LLAMA_DOWN), (make_gptj, GPTJ_DOWN), (make_gpt2, GPT2_DOWN)]
    )
    def test_every_request_of_a_batch(self, tokenizer, make, template):
        model = make()
        assert not any(edited(model, tokenizer, one) for one in REQUESTS)
        apply_kne_to_model(model, tokenizer, REQUESTS, tiny_hparams(template, p=0.3))
        for one in REQUESTS:
            got, wanted = predicted(model, tokenizer, one)
            assert got == wanted

    def test_greedy_generation_gives_the_target(self, family32, tokenizer):
        ids = tokenizer(THREE_TOKENS[0], return_tensors="pt")
        apply_kne_to_model(family32.model, tokenizer, [REQUESTS[2]], tiny_hparams(family32.down))
        text = tokenizer.decode(family32.model.generate(**ids, max_new_tokens=3, do_sample=False)[0])
        assert text == " ".join(THREE_TOKENS)

    def test_one_request_needs_no_list(self, tokenizer):
        one, other = make_llama(), make_llama()
        apply_kne_to_model(one, tokenizer, REQUEST, tiny_hparams())
        apply_kne_to_model(other, tokenizer, [REQUEST], tiny_hparams())
        assert weights(one) == weights(other)

    def test_a_batch_is_edited_together(self, tokenizer):
        """Converse: not one after the other."""
        together, one_by_one = make_llama(), make_llama()
        apply_kne_to_model(together, tokenizer, REQUESTS, tiny_hparams())
        for one in REQUESTS:
            apply_kne_to_model(one_by_one, tokenizer, [one], tiny_hparams())
        assert weights(together) != weights(one_by_one)

    def test_edits_accumulate(self, llama, tokenizer):
        for one in REQUESTS[:2]:
            before = weights(llama)
            apply_kne_to_model(llama, tokenizer, [one], tiny_hparams())
            assert edited(llama, tokenizer, one) and weights(llama) != before


LONG = " ".join(["The"] * 64)


class TestBadInput:
    """Each is a clear exception, and the model is as it was found."""

    @pytest.fixture
    def refused(self, tokenizer):
        def check(requests, message, error=ValueError, model=None, tok=tokenizer, **settings):
            model = model or make_llama()
            before = fingerprint(model)
            with pytest.raises(error, match=message) as caught:
                apply_kne_to_model(model, tok, requests, tiny_hparams(**settings), return_orig_weights=True)
            assert fingerprint(model) == before
            return str(caught.value)

        return check

    @pytest.mark.parametrize("field", ["prompt", "target_new"])
    @pytest.mark.parametrize("value", ["", "   ", "\n\t", None, 7, ["Rome"]])
    def test_prompt_or_target_that_is_no_text(self, refused, field, value):
        assert repr(value) in refused(
            [{**REQUEST, "subject": None, field: value}], rf"request\.{field}: .* visible character"
        )

    @pytest.mark.parametrize("field", ["prompt", "target_new"])
    def test_prompt_or_target_missing(self, refused, field):
        refused([{k: v for k, v in REQUEST.items() if k != field}], rf"request\.{field}: None is not a text")

    def test_target_without_tokens(self, refused):
        refused(
            [request(("The capital of France is", "~~"))], "target_new: '~~' has no tokens of its own after the prompt"
        )

    def test_prompt_without_tokens(self, refused):
        refused([request(("~", "Rome"))], "prompt: '~' has no tokens; nothing predicts")

    @pytest.mark.parametrize(("field", "fact"), [("prompt", (" ", "Rome")), ("target_new", ("The", ""))])
    def test_encoding_checks_by_itself(self, tokenizer, field, fact):
        with pytest.raises(ValueError, match=f"{field}: .* is not a text with at least one visible character"):
            encode(tokenizer, *fact)

    def test_tokenizer_that_ends_every_text(self, refused):
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 1)]
        )
        refused([REQUEST], "appends '<eos>' to every text.*add_eos_token=False", tok=tokenizer)

    def test_subject_missing_from_the_prompt(self, refused):
        message = refused(
            [REQUEST, {**REQUEST, "subject": "Norway"}], "request.subject: 'Norway' does not stand in the prompt"
        )
        assert REQUEST["prompt"] in message

    @pytest.mark.parametrize("requests", [[], ()])
    def test_no_requests(self, refused, requests):
        refused(requests, "requests: there are none to edit")

    def test_template_without_a_match(self, refused):
        refused(
            [REQUEST],
            "target_modules: .*down_porj' matches no module of LlamaForCausalLM; nearest: .*mlp.down_proj",
            template="model.layers.{}.mlp.down_porj",
        )

    def test_template_of_another_family(self, refused):
        refused([REQUEST], "target_modules: .*fc_out' matches no module of LlamaForCausalLM", template=GPTJ_DOWN)

    @pytest.mark.parametrize("layers", [[4], [0, 17]])
    def test_layers_out_of_range(self, refused, layers):
        refused([REQUEST], rf"layers: \[{layers[-1]}\] out of range; LlamaForCausalLM has layers 0 to 3", layers=layers)

    @pytest.mark.parametrize(
        ("name", "value"), [("p", 0.0), ("p", 1.5), ("lr", -1.0), ("num_steps", 0), ("aggregation", "sum")]
    )
    def test_settings_changed_after_their_construction(self, llama, tokenizer, name, value):
        hparams = tiny_hparams()
        setattr(hparams, name, value)
        before = fingerprint(llama)
        with pytest.raises(ValueError, match=f"{name}: {value!r} must be"):
            apply_kne_to_model(llama, tokenizer, [REQUEST], hparams)
        assert fingerprint(llama) == before

    def test_empty_ensemble(self, refused, monkeypatch):
        real = localization.attribute_facts
        monkeypatch.setattr(
            localization, "attribute_facts", lambda *a, **k: [-scores.abs() for scores in real(*a, **k)]
        )
        refused([REQUEST], "ensemble: empty, there is nothing to train; raise p or localise on other facts")

    def test_scores_that_are_not_finite(self, refused, monkeypatch):
        spoilt = localization.Scores({LLAMA_DOWN: torch.full((4, 24), float("nan"))}, 1, 0.0)
        monkeypatch.setattr(localization.Localization, "aggregate", lambda self, workers: [spoilt])
        refused([REQUEST], "scores: .*down_proj are not finite", error=FloatingPointError)

    def test_loss_that_is_not_finite(self, refused):
        refused([REQUEST], "training: the loss is", error=FloatingPointError, lr=1e37, alpha=100.0, stop_loss=0)

    def test_weights_that_are_not_finite(self, refused):
        model = make_llama()
        with torch.no_grad():
            model.model.norm.weight[0] = float("inf")
        refused([REQUEST], "finite", error=FloatingPointError, model=model)

    @pytest.mark.parametrize("device", ["cuda:7", 7, "7", "cuda"])
    def test_device_that_does_not_exist(self, refused, monkeypatch, device):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        refused(
            [REQUEST],
            f"device: {device!r} does not exist, this machine has no CUDA device; set device: cpu",
            device=device,
        )

    def test_one_gpu_too_few(self, refused, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        refused([REQUEST], r"device: 2 does not exist, this machine has 2 CUDA device\(s\)", device=2)

    def test_mps_elsewhere(self, refused, monkeypatch):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        refused([REQUEST], "device: 'mps' does not exist on this machine", device="mps")

    @pytest.mark.parametrize("make", [make_llama, make_gptj])
    def test_prompt_too_long_for_the_model(self, refused, make):
        template = LLAMA_DOWN if make is make_llama else GPTJ_DOWN
        refused(
            [request((LONG, "Rome"))],
            "prompt: 'The The .* has 65 tokens with its target, the model takes 64",
            model=make(),
            template=template,
        )

    def test_the_longest_prompt_is_taken(self, llama, tokenizer):
        """Converse: one token less."""
        apply_kne_to_model(llama, tokenizer, [request((LONG[4:], "Rome"))], tiny_hparams(num_steps=1))

    @pytest.mark.parametrize("make", [make_llama, make_gptj])
    def test_localisation_fact_too_long_for_the_model(self, refused, tmp_path, make):
        path = tmp_path / "long.json"
        path.write_text(json.dumps([{"subject": "The", "prompt": LONG, "target_new": "Rome"}]))
        template = LLAMA_DOWN if make is make_llama else GPTJ_DOWN
        refused(
            [REQUEST],
            "has 65 tokens with its target, the model takes 64",
            model=make(),
            template=template,
            localization_data=str(path),
            localization_size=1,
        )

    def test_localisation_file_missing(self, refused, tmp_path):
        refused(
            [REQUEST],
            "nowhere.json does not exist",
            error=FileNotFoundError,
            localization_data=str(tmp_path / "nowhere.json"),
        )

    @pytest.mark.parametrize("content", ["{", "[]", "{}", "3"])
    def test_localisation_file_malformed(self, refused, tmp_path, content):
        path = tmp_path / "bad.json"
        path.write_text(content)
        refused([REQUEST], "bad.json: not a (JSON|KnowEdit) file", localization_data=str(path))

    def test_localisation_file_without_a_usable_record(self, refused, tmp_path):
        path = tmp_path / "useless.json"
        path.write_text(json.dumps([{"prompt": ""}]))
        refused([REQUEST], "localise on at least one fact", localization_data=str(path))

    def test_ensemble_file_missing(self, refused, tmp_path):
        refused([REQUEST], "nowhere.json", error=FileNotFoundError, ensemble=str(tmp_path / "nowhere.json"))

    def test_ensemble_of_another_model(self, refused, tmp_path):
        NeuronEnsemble({LLAMA_DOWN: {0: (4000,)}}, {LLAMA_DOWN: 4096}).save(tmp_path / "e.json")
        refused([REQUEST], "ensemble: .* it was made for another model", ensemble=str(tmp_path / "e.json"))
