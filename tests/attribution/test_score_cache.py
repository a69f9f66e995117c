"""Scores on disk: found again only when nothing they depend on has changed, complete or not there at all."""

import errno
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import FACTS, LLAMA_DOWN, all_layers, failing, make_llama
from localizing import files
from peft import LoraConfig, get_peft_model
from stored_scores import STEPS

from kne_easyedit._util import files as paths
from kne_easyedit.attribution import score_cache as cache_module
from kne_easyedit.attribution.score_cache import ScoreCache, entry_files, read_entry
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.models.fingerprint import model_digest
from kne_easyedit.models.targets import resolve_target


class TestEntries:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_found_again_bit_by_bit(self, cache, target, facts, scores, dtype):
        scores = scores.to(dtype) / 3
        assert cache.get(target, facts[0]) is None
        cache.put(target, facts[0], scores)
        found = cache.get(target, facts[0])
        assert found.dtype == dtype and torch.equal(found, scores)

    def test_of_other_facts_stay_apart(self, cache, target, facts, scores):
        for i, fact in enumerate(facts):
            cache.put(target, fact, scores + i)
        assert [torch.equal(cache.get(target, fact), scores + i) for i, fact in enumerate(facts)] == [True] * 3

    def test_remember_how_long_they_took(self, cache, target, facts, scores):
        cache.put(target, facts[0], scores, seconds=12.5)
        assert cache.entry(target, facts[0]).seconds == 12.5

    def test_a_view_is_stored_as_it_is(self, cache, target, facts, scores):
        wide = torch.stack([scores, -scores], -1)[..., 1]
        cache.put(target, facts[0], wide)
        assert torch.equal(cache.get(target, facts[0]), -scores)

    def test_lie_in_the_users_cache_by_default(self, llama, target, facts, scores):
        cache = ScoreCache(None, llama, STEPS)
        cache.put(target, facts[0], scores)
        assert files(paths.cache_home()) == [cache.path(target, facts[0])]

    def test_asking_creates_nothing(self, cache, target, facts, tmp_path):
        cache.get(target, facts[0])
        assert list(tmp_path.iterdir()) == []

    def test_are_shared_by_equal_models(self, stored, tmp_path, target, facts, scores):
        assert torch.equal(ScoreCache(tmp_path, make_llama(), STEPS).get(target, facts[0]), scores)

    def test_say_what_they_are(self, llama, cache, stored, target, facts, scores):
        """For people and other programs."""
        cache.put(target, facts[0], scores, 1.5)
        entry = read_entry(stored)
        assert torch.equal(entry.scores, scores) and entry.layers == [0, 1, 2, 3] and entry.seconds == 1.5
        assert (entry.template, entry.quadrature, entry.steps) == (LLAMA_DOWN, "riemann", STEPS)
        assert (entry.model, entry.model_name) == (model_digest(llama), "LlamaForCausalLM")
        assert (entry.prompt, entry.target) == FACTS[0]

    def test_say_so_in_any_safetensors_reader(self, stored, facts, llama):
        content = stored.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        assert (header["prompt"], header["target"], header["model"]) == (
            facts[0].prompt,
            facts[0].target,
            model_digest(llama),
        )

    def test_of_all_models_are_listed(self, tmp_path, target, facts, scores):
        assert list(entry_files(tmp_path)) == []
        caches = [ScoreCache(tmp_path, make_llama(seed=seed), STEPS) for seed in (1, 2)]
        for cache in caches:
            for fact in facts:
                cache.put(target, fact, scores)
        (tmp_path / "scores" / "notes.txt").write_text("no entry")
        assert list(entry_files(tmp_path)) == sorted(cache.path(target, fact) for cache in caches for fact in facts)


class TestLayers:
    """An entry holds whatever layers were attributed, and serves any of them."""

    @pytest.mark.parametrize("layers", [[0], [3], [1, 2], [0, 2, 3], [0, 1, 2, 3]])
    def test_any_subset_is_served_bit_by_bit(self, llama, cache, facts, stored, scores, layers):
        some = resolve_target(llama, LLAMA_DOWN, layers)
        assert cache.missing(some, facts[0]) == ()
        assert torch.equal(cache.get(some, facts[0]), scores[layers])
        assert not torch.equal(cache.get(some, facts[0]), scores[[(i + 1) % 4 for i in layers]]), (
            "converse: other rows differ"
        )

    @pytest.mark.parametrize(("first", "missing"), [([1, 2], (0, 3)), ([0, 1, 2], (3,)), ([3], (0, 1, 2))])
    def test_a_missing_layer_is_not_served(self, llama, cache, target, facts, scores, first, missing):
        cache.put(resolve_target(llama, LLAMA_DOWN, first), facts[0], scores[first])
        assert cache.get(target, facts[0]) is None
        assert cache.missing(target, facts[0]) == missing
        assert cache.missing(target, facts[1]) == (0, 1, 2, 3)

    @pytest.mark.parametrize(
        "parts", [[[1, 2], [0, 3]], [[3], [2], [1], [0]], [[0, 1], [1, 2, 3]], [[0, 1, 2], [3]]], ids=str
    )
    def test_later_layers_are_merged(self, llama, cache, target, facts, scores, parts):
        for seconds, layers in enumerate(parts, 1):
            cache.put(resolve_target(llama, LLAMA_DOWN, layers), facts[0], scores[layers], seconds)
        assert read_entry(cache.path(target, facts[0])).layers == [0, 1, 2, 3]
        assert torch.equal(cache.get(target, facts[0]), scores)
        assert cache.entry(target, facts[0]).seconds == sum(range(len(parts) + 1)), "all parts took their time"

    def test_a_layer_computed_again_replaces_the_old_one_only(self, llama, cache, target, facts, stored, scores):
        cache.put(resolve_target(llama, LLAMA_DOWN, [2]), facts[0], -scores[[2]])
        found = cache.get(target, facts[0])
        assert torch.equal(found[[0, 1, 3]], scores[[0, 1, 3]]) and torch.equal(found[2], -scores[2])


class TestKey:
    """Whatever changes the scores changes the key; whatever does not leaves it."""

    @pytest.mark.parametrize("other", ["steps", "quadrature", "template", "ids", "prompt_length"])
    def test_entry(self, llama, tmp_path, cache, stored, target, facts, other):
        fact = facts[0]
        if other == "steps":
            cache = ScoreCache(tmp_path, llama, STEPS + 1)
        elif other == "quadrature":
            cache = ScoreCache(tmp_path, llama, STEPS, "gauss-legendre")
        elif other == "template":
            target = resolve_target(llama, "model.layers.{}.self_attn.o_proj")
        elif other == "ids":
            fact = Fact(fact.prompt, fact.target, (*fact.ids[:-1], fact.ids[-1] + 1), fact.prompt_length)
        else:
            fact = Fact(fact.prompt, fact.target, fact.ids, fact.prompt_length - 1)
        assert cache.path(target, fact) != stored
        assert cache.get(target, fact) is None
        assert cache.entry(target, fact) is None

    def test_layers_share_an_entry(self, llama, cache, stored, facts):
        """Converse: they are in the entry, not in its name."""
        assert cache.path(resolve_target(llama, LLAMA_DOWN, [0, 1, 2]), facts[0]) == stored

    def test_the_text_does_not_matter_beside_the_tokens(self, cache, stored, target, facts):
        fact = Fact("another prompt", "another target", facts[0].ids, facts[0].prompt_length)
        assert cache.get(target, fact) is not None

    def test_one_bit_of_one_weight(self, llama):
        before = model_digest(llama)
        weight = llama.model.layers[3].mlp.up_proj.weight.detach()
        pattern = weight.view(torch.int32)
        pattern[39, 23] ^= 1
        assert model_digest(llama) != before
        pattern[39, 23] ^= 1
        assert model_digest(llama) == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: setattr(m.config, "rms_norm_eps", 1e-5),
            lambda m: setattr(m.config, "num_key_value_heads", 4),
            lambda m: m.config.update(
                {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
            ),
            lambda m: m.model.rotary_emb.inv_freq.mul_(2),
            lambda m: m.bfloat16(),
            lambda m: m.double(),
            lambda m: m.model.norm.weight.data.neg_(),
        ],
        ids=["eps", "heads", "rope in the configuration", "rope in a buffer", "bf16", "float64", "norm"],
    )
    def test_other_models(self, llama, change):
        before = model_digest(llama)
        change(llama)
        assert model_digest(llama) != before

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: setattr(m.config, "_name_or_path", "elsewhere"),
            lambda m: setattr(m.config, "use_cache", False),
            lambda m: setattr(m.config, "transformers_version", "0.1"),
            lambda m: m.train(),
            lambda m: m.requires_grad_(False),
        ],
        ids=["path", "use_cache", "version", "training", "requires_grad"],
    )
    def test_the_same_model(self, llama, change):
        before = model_digest(llama)
        change(llama)
        assert model_digest(llama) == before

    def test_swapped_weights(self, llama):
        before = model_digest(llama)
        one, other = (llama.model.layers[i].mlp.up_proj for i in (0, 1))
        one.weight, other.weight = other.weight, one.weight
        assert model_digest(llama) != before


class TestWriting:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["Ctrl-C", "memory"])
    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_an_exception_leaves_no_entry(self, cache, target, facts, scores, tmp_path, monkeypatch, step, error):
        monkeypatch.setattr(paths.os, step, failing(getattr(paths.os, step), 1, error))
        with pytest.raises(type(error)):
            cache.put(target, facts[0], scores)
        assert files(tmp_path) == []
        assert cache.get(target, facts[0]) is None

    def test_an_exception_leaves_an_older_entry(self, cache, target, facts, scores, stored, monkeypatch):
        monkeypatch.setattr(paths.os, "replace", failing(paths.os.replace, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            cache.put(target, facts[0], -scores)
        assert torch.equal(cache.get(target, facts[0]), scores)

    def test_no_space_while_writing(self, cache, target, facts, scores, monkeypatch, tmp_path):
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(cache_module, "atomic_write", failing(None, 1, full))
        with pytest.raises(
            OSError, match=r"No space left on device.*free some space, or set cache_dir or KNE_CACHE"
        ) as caught:
            cache.put(target, facts[0], scores)
        assert caught.value.errno == errno.ENOSPC
        assert str(cache.folder) in str(caught.value)

    def test_what_was_checked_is_what_is_used(self, stored, scores):
        """Not a map of the file: it would change with it, and SIGBUS ends the process if the file is cut short."""
        entry = read_entry(stored)
        with stored.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\x00\x00\x80\x7f")  # inf
        assert torch.equal(entry.scores, scores)

    def test_no_space_in_float64(self, llama64, tokenizer, tmp_path, target, monkeypatch):
        """Scores of a float64 model take 8 bytes a neuron."""
        cache, wide = ScoreCache(tmp_path, llama64, STEPS), replace(all_layers(llama64), n_neurons=1_000_000)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
        cache.require_space(1, replace(wide, n_neurons=500_000))
        with pytest.raises(OSError, match="MiB free"):
            cache.require_space(1, wide)


def test_an_adapter_that_is_switched_off_makes_another_model(llama):
    """No weight changes, and yet the scores of one are not those of the other."""
    bare = model_digest(llama)
    adapted = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    on = model_digest(adapted)
    with adapted.disable_adapter():
        off = model_digest(adapted)
    assert len({bare, on, off}) == 3 and model_digest(adapted) == on
    layer = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.scaling["default"] *= 2
    assert model_digest(adapted) != on
