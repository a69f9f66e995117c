"""What apply_kne_to_model localises on, how often, and for how long a loaded model keeps its ensemble."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from conftest import LLAMA_DOWN, make_tokenizer, tiny_hparams
from edits import REQUEST, REQUESTS, edited

from kne_easyedit.editing.edit import apply_kne_to_model, compute_edit
from kne_easyedit.localization import localizer as localization
from kne_easyedit.localization.ensemble import NeuronEnsemble, select_ensemble
from kne_easyedit.localization.localizer import find_ensemble, forget, localize

DATA = [
    {"subject": "Spain", "prompt": "The capital of Spain is", "target_new": "Lima", "ground_truth": ["Madrid"]},
    {"subject": "Peru", "prompt": "The language of Peru is", "target_new": "Latin", "ground_truth": ["Spanish"]},
    {"subject": "Italy", "prompt": "The capital city of Italy was", "target_new": "Oslo", "ground_truth": ["Rome"]},
]


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "knowedit.json"
    path.write_text(json.dumps(DATA))
    return str(path)


@pytest.fixture
def computed(monkeypatch):
    """The facts whose attribution was computed, one entry a computation."""
    prompts = []
    real = localization.attribute_facts

    def counting(model, target, facts, *args, **kwargs):
        prompts.extend(fact.prompt for fact in facts)
        return real(model, target, facts, *args, **kwargs)

    monkeypatch.setattr(localization, "attribute_facts", counting)
    return prompts


class TestLocalisation:
    def test_on_the_requests(self, llama, tokenizer, computed):
        for one in REQUESTS:
            apply_kne_to_model(llama, tokenizer, [one], tiny_hparams(num_steps=1))
        assert computed == [one["prompt"] for one in REQUESTS]

    def test_on_the_requests_depends_on_them(self, llama, tokenizer):
        one, other = (localize(llama, tokenizer, [r], tiny_hparams()) for r in REQUESTS[:2])
        assert one.neurons != other.neurons
        assert one.facts == 1

    def test_on_a_file_is_done_once_for_many_edits(self, llama, tokenizer, computed, data_file):
        hparams = tiny_hparams(localization_data=data_file, localization_size=3)
        found = set()
        for one in REQUESTS:
            _, originals = apply_kne_to_model(llama, tokenizer, [one], hparams, return_orig_weights=True)
            found.add(tuple(sorted(originals)))
        assert computed == [record["prompt"] for record in DATA]
        assert len(found) == 1

    def test_through_sequential_edits_the_neurons_stay(self, llama, tokenizer, data_file):
        """The weights change, but the neurons are those of the model as it came; `forget` ends that."""
        hparams = tiny_hparams(localization_data=data_file, localization_size=3)
        first = find_ensemble(llama, tokenizer, [], hparams)
        apply_kne_to_model(llama, tokenizer, REQUESTS, hparams)
        assert find_ensemble(llama, tokenizer, [], hparams) is first
        forget(llama)
        again = find_ensemble(llama, tokenizer, [], hparams)
        assert again.neurons != first.neurons

    def test_to_forget_means_to_localise_on_the_weights_as_they_are(self, llama, tokenizer, computed, data_file):
        hparams = tiny_hparams(localization_data=data_file, localization_size=3)
        apply_kne_to_model(llama, tokenizer, [REQUEST], hparams)
        forget(llama)
        apply_kne_to_model(llama, tokenizer, [REQUEST], hparams)
        assert computed == [record["prompt"] for record in DATA] * 2

    def test_to_forget_what_was_never_found_is_harmless(self, llama):
        forget(llama)

    @pytest.mark.parametrize(
        "changes", [{"p": 0.5}, {"layers": [1, 2]}, {"aggregation": "mean"}, {"localization_size": 1}], ids=str
    )
    def test_other_settings_give_another_ensemble(self, llama, tokenizer, data_file, changes):
        settings = dict(localization_data=data_file, localization_size=3)
        one = find_ensemble(llama, tokenizer, [], tiny_hparams(**settings))
        other = find_ensemble(llama, tokenizer, [], tiny_hparams(**{**settings, **changes}))
        assert one.neurons != other.neurons

    def test_is_the_selection_from_the_aggregated_scores(self, llama64, tokenizer, data_file):
        """In float64, so that no rounding moves a neuron over the threshold: one of them sweeps all facts at once."""
        from kne_easyedit.attribution.engine import attribute

        llama = llama64
        hparams = tiny_hparams(localization_data=data_file, localization_size=3, p=0.1)
        scores = [
            attribute(llama, tokenizer, r["prompt"], r["target_new"], LLAMA_DOWN, hparams.attribution_steps)
            for r in DATA
        ]
        expected = select_ensemble(torch.stack(scores).amax(0), 0.1, target_module=LLAMA_DOWN)
        found = find_ensemble(llama, tokenizer, [], hparams)
        assert found.neurons == expected.neurons
        assert (found.p, found.aggregation, found.facts, found.layers) == (0.1, "max", 3, (0, 1, 2, 3))

    def test_several_module_types(self, llama, tokenizer, data_file):
        up = "model.layers.{}.mlp.up_proj"
        hparams = tiny_hparams(target_modules=[LLAMA_DOWN, up], localization_data=data_file, localization_size=2)
        found = find_ensemble(llama, tokenizer, [], hparams)
        assert set(found.neurons) == {LLAMA_DOWN, up}
        _, originals = apply_kne_to_model(llama, tokenizer, [REQUEST], hparams, return_orig_weights=True)
        assert {name.rsplit(".", 2)[1] for name in originals} == {"down_proj", "up_proj"}
        assert edited(llama, tokenizer, REQUEST)

    def test_fewer_facts_than_wanted_are_reported(self, llama, tokenizer, data_file, caplog):
        with caplog.at_level(logging.WARNING):
            find_ensemble(llama, tokenizer, [], tiny_hparams(localization_data=data_file, localization_size=200))
        assert "localization_size: 200 wanted" in caplog.text and "holds 3 facts" in caplog.text

    def test_bad_records_of_the_data_are_left_out(self, llama, tokenizer, tmp_path, computed):
        path = tmp_path / "mixed.json"
        path.write_text(
            json.dumps([DATA[0], {"subject": "Peru", "prompt": "The capital is", "target_new": "Lima"}, DATA[2]])
        )
        find_ensemble(llama, tokenizer, [], tiny_hparams(localization_data=str(path), localization_size=3))
        assert computed == [DATA[0]["prompt"], DATA[2]["prompt"]]

    def test_data_without_a_usable_record_are_named(self, llama, tokenizer, tmp_path, computed):
        path = tmp_path / "bad.json"
        path.write_text(json.dumps([{"prompt": "", "target_new": "Rome"}, {"prompt": "The capital of Spain is"}]))
        with pytest.raises(ValueError, match=r"localization_data: .*bad\.json holds no usable fact"):
            find_ensemble(llama, tokenizer, [], tiny_hparams(localization_data=str(path)))
        assert computed == []

    def test_an_ensemble_from_a_file(self, llama, tokenizer, tmp_path, computed):
        path = tmp_path / "ensemble.json"
        NeuronEnsemble({LLAMA_DOWN: {1: (0, 5), 3: (7,)}}, {LLAMA_DOWN: 24}).save(path)
        before = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}
        apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams(ensemble=str(path), stop_loss=0, num_steps=2))
        changed = {
            name: (p != before[name]).any(1).nonzero().flatten().tolist()
            for name, p in llama.named_parameters()
            if p.ndim == 2
        }
        assert {name: rows for name, rows in changed.items() if rows} == {
            f"{LLAMA_DOWN.format(1)}.weight": [0, 5],
            f"{LLAMA_DOWN.format(3)}.weight": [7],
        }
        assert computed == []

    def test_an_ensemble_given_outright(self, llama, tokenizer, computed):
        made = NeuronEnsemble({LLAMA_DOWN: {2: (4,)}}, {LLAMA_DOWN: 24})
        _, originals = apply_kne_to_model(
            llama, tokenizer, [REQUEST], tiny_hparams(num_steps=1), return_orig_weights=True, ensemble=made
        )
        assert list(originals) == [f"{LLAMA_DOWN.format(2)}.weight"]
        assert computed == []


class TestKeptEnsemble:
    def test_a_changed_file_is_localised_again(self, llama, tokenizer, computed, data_file):
        hparams = tiny_hparams(localization_data=data_file, localization_size=3)
        first = find_ensemble(llama, tokenizer, [], hparams)
        with open(data_file, "w") as stream:
            json.dump([DATA[0], {**DATA[1], "target_new": "Oslo"}, DATA[2]], stream)
        second = find_ensemble(llama, tokenizer, [], hparams)
        assert second is not first and second.neurons != first.neurons
        assert computed == [record["prompt"] for record in DATA] + [DATA[1]["prompt"]]

    def test_the_same_content_elsewhere_is_not(self, llama, tokenizer, computed, data_file, tmp_path):
        first = find_ensemble(llama, tokenizer, [], tiny_hparams(localization_data=data_file, localization_size=3))
        (tmp_path / "other.json").write_text(json.dumps(DATA, indent=3))
        again = find_ensemble(
            llama, tokenizer, [], tiny_hparams(localization_data=str(tmp_path / "other.json"), localization_size=3)
        )
        assert again is first

    def test_another_tokenizer_is_another_ensemble(self, llama, tokenizer, data_file):
        from tokenizers import processors

        hparams = tiny_hparams(localization_data=data_file, localization_size=3)
        first = find_ensemble(llama, tokenizer, [], hparams)
        other = make_tokenizer()
        assert find_ensemble(llama, other, [], hparams) is first, "another object, the same tokens"
        other.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<unk> $A", special_tokens=[("<unk>", 2)]
        )
        assert find_ensemble(llama, other, [], hparams).neurons != first.neurons

    def test_copies_have_the_ensemble_of_the_original(self, llama, tokenizer, data_file, monkeypatch):
        hparams = tiny_hparams(localization_data=data_file, localization_size=3)
        calls, real = [], localization.localize
        monkeypatch.setattr(localization, "localize", lambda *a: calls.append(1) or real(*a))
        copies = [apply_kne_to_model(llama, tokenizer, [one], hparams, copy=True)[0] for one in REQUESTS[:2]]
        apply_kne_to_model(copies[0], tokenizer, [REQUESTS[2]], hparams)  # a sequence that begins with a copy
        assert calls == [1]

    def test_what_a_copy_finds_later_is_not_the_originals(self, llama, tokenizer, data_file):
        hparams = tiny_hparams(localization_data=data_file, localization_size=3)
        copy, _ = apply_kne_to_model(llama, tokenizer, REQUESTS, hparams, copy=True)
        others = tiny_hparams(localization_data=data_file, localization_size=2)
        found = find_ensemble(copy, tokenizer, [], others)
        assert find_ensemble(llama, tokenizer, [], others).neurons != found.neurons

    def test_an_ensemble_file_is_read_anew(self, llama, tokenizer, tmp_path):
        path = tmp_path / "ensemble.json"
        hparams = tiny_hparams(ensemble=str(path))
        for rows in ((1, 2), (3,)):
            NeuronEnsemble({LLAMA_DOWN: {0: rows}}, {LLAMA_DOWN: 24}).save(path)
            assert find_ensemble(llama, tokenizer, [], hparams).neurons == {LLAMA_DOWN: {0: rows}}

    def test_the_prompts_of_the_penalty_are_read_anew(self, data_file):
        """The same length at the same time of change: the content decides."""
        from kne_easyedit.editing.objectives import unrelated_prompts

        hparams = tiny_hparams(kl_weight=0.1, kl_data=data_file, kl_size=1)
        assert unrelated_prompts([], hparams) == ["The language of Peru is"]
        was = os.stat(data_file)
        content = Path(data_file).read_text().replace("The language of Peru is", "The language in Peru is")
        Path(data_file).write_text(content)
        os.utime(data_file, ns=(was.st_atime_ns, was.st_mtime_ns))
        assert unrelated_prompts([], hparams) == ["The language in Peru is"]


class TestBeforeLocalisation:
    """What training needs is looked for first: localisation of 200 facts takes long."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kl_weight": 1.0, "kl_data": "nowhere.json"}, r"nowhere\.json"),
            ({"input_projection": True, "neighbour_data": "nowhere.json"}, r"nowhere\.json"),
            ({"append_eos": True}, "append_eos"),
        ],
        ids=str,
    )
    def test_what_is_missing_is_said(self, llama, data_file, computed, settings, message):
        tokenizer = make_tokenizer()  # one of its own: it is changed
        if "append_eos" in settings:
            tokenizer.eos_token = None
        hparams = tiny_hparams(localization_data=data_file, localization_size=3, **settings)
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            apply_kne_to_model(llama, tokenizer, [REQUEST], hparams)
        assert computed == []

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            (
                "locality",
                [{"prompt": "The capital of Peru is", "ground_truth": "Lima"}],
                r"\[\{'prompt'.* is a list, not",
            ),
            ("locality", "The capital", "'The capital' is a str, not a mapping of categories"),
            ("locality", {3: {"prompt": ["The capital of Peru is"], "ground_truth": ["Lima"]}}, "3 is a int; name"),
            ("portability", "The capital", "'The capital' is a str, not a mapping of categories"),
            ("neighbours", "Spain", "'Spain' is a str, not a list of the names"),
            ("neighbours", ["Spain", 2], r"2 is not a text"),
        ],
        ids=str,
    )
    def test_fields_of_which_neighbours_are_made_are_refused(
        self, llama, tokenizer, data_file, computed, field, value, message
    ):
        hparams = tiny_hparams(localization_data=data_file, localization_size=3, input_projection=True)
        with pytest.raises(ValueError, match=rf"^request.{field}(\[1\])?: {message}"):
            apply_kne_to_model(llama, tokenizer, [{**REQUEST, field: value}], hparams)
        assert computed == []

    @pytest.mark.parametrize("setting", ["append_eos", "append_break"])
    def test_a_fact_that_leaves_its_ending_no_room_is_refused_with_the_setting(
        self, llama, tokenizer, data_file, computed, setting
    ):
        """It has 64 tokens with its target, as many as the model takes. Conversely, one less has room."""
        hparams = tiny_hparams(localization_data=data_file, localization_size=1, num_steps=1, **{setting: True})
        for words in (63, 62):
            request = {"prompt": " ".join(["France"] * words), "target_new": "Rome"}
            if words == 63:
                with pytest.raises(ValueError, match=f"^{setting}: true .* 64 tokens .*or set {setting}: false"):
                    apply_kne_to_model(llama, tokenizer, [request], hparams)
                assert computed == []
            else:
                apply_kne_to_model(llama, tokenizer, [request], hparams)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kl_weight": 1.0, "kl_data": "nowhere.json"}, "^kl_data: data file nowhere.json does not exist"),
            (
                {"input_projection": True, "neighbour_data": "nowhere.json"},
                "^neighbour_data: data file nowhere.json does not exist",
            ),
            (
                {"input_projection": True, "localization_data": "nowhere.json"},
                "^localization_data: data file nowhere.json does not exist",
            ),
            ({"localization_data": "nowhere.json"}, "^localization_data: data file nowhere.json does not exist"),
            ({"ensemble": "."}, "^ensemble: .* is a folder; name a file of kne localize, or magnitude"),
        ],
        ids=str,
    )
    def test_a_file_that_is_missing_is_named_with_its_setting(self, llama, tokenizer, settings, message):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams(**settings))

    @pytest.mark.parametrize("request_", ["The capital of France is", {**REQUEST, 3: "x"}], ids=str)
    def test_what_is_no_request_is_refused(self, llama, tokenizer, data_file, computed, request_):
        hparams = tiny_hparams(localization_data=data_file, localization_size=3)
        with pytest.raises(ValueError, match=r"^request: "):
            apply_kne_to_model(llama, tokenizer, [request_], hparams)
        assert computed == []


@pytest.mark.parametrize("chat", [False, True])
def test_probes_as_data_files_have_them_are_read_like_those_of_requests(llama, chat):
    """Lists of records, as KnowEdit has them, beside EasyEdit's lists by category."""
    tokenizer = make_tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}Say : {{ m['content'] }}{% endfor %} !"
    probes = {"Reasoning": [{"prompt": "The mother of Marie is", "ground_truth": [["Rome"]]}]}
    loaded = {"Reasoning": {"prompt": ["The mother of Marie is"], "ground_truth": ["Rome"]}}
    request = {"prompt": "The mother of Ada Marie is", "target_new": "Rome", "subject": "Ada Marie"}
    hparams = tiny_hparams(subject_variants=3, input_projection=True, num_steps=1, use_chat_template=chat)
    found = [
        compute_edit(llama, tokenizer, {**request, "portability": its}, hparams).losses for its in (probes, loaded)
    ]
    assert found[0] == found[1]
    assert found[0] != compute_edit(llama, tokenizer, request, hparams).losses, "the alias is no variant"
