"""Scores on disk: found again only when nothing they depend on has changed, complete or not there at all."""

import errno
import functools
import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import FACTS, GPTJ_DOWN, LLAMA_DOWN, all_layers, failing, make_gptj, make_llama, tiny_hparams
from rounding import ONE_SUM, roundings
from transformers import AutoModelForCausalLM

from kne_easyedit._util import files as paths
from kne_easyedit.attribution import score_cache as cache_module
from kne_easyedit.attribution.engine import attribute_facts
from kne_easyedit.attribution.score_cache import DamagedEntry, ScoreCache, entry_files, read_entry
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.localization import localizer as localization
from kne_easyedit.localization.localizer import Localization, localize
from kne_easyedit.models import fast_linear as products
from kne_easyedit.models.fingerprint import model_digest
from kne_easyedit.models.targets import resolve_target

STEPS = 4
REQUESTS = [{"prompt": prompt, "target_new": target} for prompt, target in FACTS]
LLAMA_UP = "model.layers.{}.mlp.up_proj"


@pytest.fixture
def target(llama):
    return all_layers(llama)


@pytest.fixture
def cache(llama, tmp_path):
    return ScoreCache(tmp_path, llama, STEPS)


@pytest.fixture
def scores(llama):
    return torch.randn(4, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def stored(cache, target, facts, scores):
    """The file of one entry."""
    cache.put(target, facts[0], scores)
    return cache.path(target, facts[0])


class Attributed(list):
    """What `attribute_facts` was called for: ({template: layers}, facts) a call."""

    @property
    def facts(self):
        return [fact for _, facts in self for fact in facts]

    def __call__(self, model, targets, facts, *args, **kwargs):
        self.append(({target.template: target.layers for target in targets}, list(facts)))
        return attribute_facts(model, targets, facts, *args, **kwargs)


@pytest.fixture
def attributed(monkeypatch):
    """Records what is attributed from here on."""
    recording = Attributed()
    monkeypatch.setattr(localization, "attribute_facts", recording)
    return recording


@pytest.fixture
def hparams(tmp_path):
    """Each fact is a sweep of its own: its scores have the same bits in whichever company they are computed."""
    return tiny_hparams(cache_dir=str(tmp_path), chunk_rows=1)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def chosen(ensemble):
    """All of an ensemble but the time it took."""
    return replace(ensemble, seconds=None)


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

    def test_only_missing_layers_are_computed(self, llama, tokenizer, tmp_path, hparams, target, facts, attributed):
        localize(llama, tokenizer, REQUESTS, replace(hparams, layers=[1, 2]))
        cache = ScoreCache(tmp_path, llama, STEPS)
        early = [cache.get(resolve_target(llama, LLAMA_DOWN, [1, 2]), fact) for fact in facts]
        found = localize(llama, tokenizer, REQUESTS, hparams)
        assert [targets for targets, _ in attributed] == [{LLAMA_DOWN: (1, 2)}] * 3 + [{LLAMA_DOWN: (0, 3)}] * 3
        assert all(torch.equal(cache.get(target, fact)[1:3], one) for fact, one in zip(facts, early, strict=True))
        again = localize(llama, tokenizer, REQUESTS, replace(hparams, layers=[3, 0, 2]))
        assert len(attributed) == 6, "nothing is missing any more"
        fresh = replace(hparams, cache_dir=str(tmp_path / "fresh"))
        assert found.neurons == localize(llama, tokenizer, REQUESTS, fresh).neurons
        fresh = replace(hparams, layers=[0, 2, 3], cache_dir=str(tmp_path / "fresher"))
        assert again.neurons == localize(llama, tokenizer, REQUESTS, fresh).neurons

    def test_each_fact_gets_the_layers_that_it_lacks(self, llama, tokenizer, hparams, facts, attributed):
        localize(llama, tokenizer, REQUESTS[:1], replace(hparams, layers=[0]))
        localize(llama, tokenizer, REQUESTS[1:2], replace(hparams, layers=[0, 1, 2]))
        del attributed[:]
        localize(llama, tokenizer, REQUESTS, hparams)
        computed = {fact.prompt: targets[LLAMA_DOWN] for targets, (fact,) in attributed}
        assert computed == {facts[0].prompt: (1, 2, 3), facts[1].prompt: (3,), facts[2].prompt: (0, 1, 2, 3)}


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


class TestDamaged:
    """Reported as a warning, computed again, replaced."""

    @pytest.fixture
    def reported(self, cache, target, facts, stored, caplog):
        def check(reason=""):
            with pytest.raises(DamagedEntry, match=f"{stored.name}: .*{reason}"):
                read_entry(stored)
            self.warned(caplog, cache, target, facts[0], stored, reason)

        return check

    def warned(self, caplog, cache, target, fact, path, reason):
        with caplog.at_level(logging.WARNING):
            assert cache.get(target, fact) is None
        assert f"score cache: damaged ({path}: " in caplog.text and "computed again" in caplog.text
        assert reason in caplog.text
        assert not path.exists()

    @pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1, -100])
    def test_truncated(self, stored, reported, length):
        stored.write_bytes(stored.read_bytes()[:length])
        reported()

    @pytest.mark.parametrize("content", [b"x" * 500, b"\x00" * 500, b"{}", b"\xff" * 500])
    def test_something_else(self, stored, reported, content):
        stored.write_bytes(content)
        reported()

    def test_longer(self, stored, reported):
        stored.write_bytes(stored.read_bytes() + b"\x00" * 8)
        reported()

    def test_of_another_fact(self, stored, reported, cache, target, facts, scores):
        cache.put(target, facts[1], scores)
        shutil.copy(cache.path(target, facts[1]), stored)
        reported("it is of another fact")

    @pytest.mark.parametrize("other", ["steps", "quadrature", "template"])
    def test_of_another_sum_or_module(self, llama, tmp_path, stored, reported, target, facts, scores, other):
        """The name says of what an entry is, and so does its inside."""
        source = ScoreCache(
            tmp_path, llama, *{"steps": (STEPS + 1,), "quadrature": (STEPS, "gauss-legendre")}.get(other, (STEPS,))
        )
        target = resolve_target(llama, "model.layers.{}.self_attn.o_proj") if other == "template" else target
        source.put(target, facts[0], scores)
        shutil.copy(source.path(target, facts[0]), stored)
        reported("it is of another fact")

    def test_of_another_model(self, stored, tmp_path, target, facts, caplog):
        other = ScoreCache(tmp_path, make_llama(seed=1), STEPS)
        path = other.path(target, facts[0])
        path.parent.mkdir()
        shutil.copy(stored, path)
        with pytest.raises(DamagedEntry, match="it is of another fact or model"):
            read_entry(path)
        self.warned(caplog, other, target, facts[0], path, "it is of another fact or model")
        read_entry(stored)

    @pytest.mark.parametrize("template", [LLAMA_DOWN, LLAMA_UP])
    def test_of_another_model_are_computed_again(self, tokenizer, tmp_path, hparams, attributed, caplog, template):
        """All entries of one model in the other's folder, by hand: no score of it gets through."""
        one, other = make_llama(seed=1), make_llama(seed=2)
        hparams = replace(hparams, target_modules=[template])
        localize(one, tokenizer, REQUESTS, hparams)
        fresh = localize(other, tokenizer, REQUESTS, replace(hparams, cache_dir=str(tmp_path / "fresh")))
        source, goal = (ScoreCache(tmp_path, model, STEPS).folder for model in (one, other))
        shutil.copytree(source, goal)
        del attributed[:]
        assert chosen(localize(other, tokenizer, REQUESTS, hparams)) == chosen(fresh)
        assert len(attributed.facts) == caplog.text.count("it is of another fact or model") == len(REQUESTS)

    @pytest.mark.parametrize("field", ["seconds", "prompt", "layers", "model_name"])
    def test_metadata_are_covered(self, stored, reported, field):
        content = stored.read_bytes()
        at = content.index(f'"{field}":"'.encode()) + len(field) + 5
        stored.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        reported("its digest does not match")

    def test_one_bit_of_the_scores(self, stored, reported):
        content = bytearray(stored.read_bytes())
        content[-10] ^= 1
        stored.write_bytes(content)
        reported("its digest does not match")

    def test_of_another_width(self, reported, cache, target, facts, scores, stored, caplog):
        """In itself sound, but not of this module."""
        cache.put(target, facts[0], scores[:, :20])
        assert read_entry(stored).scores.shape == (4, 20)
        self.warned(caplog, cache, target, facts[0], stored, "shape (4, 20)")

    @pytest.mark.parametrize(
        "spoil", [lambda s: s[:3], lambda s: s[0], lambda s: s.repeat(2, 1)], ids=["fewer", "flat", "more"]
    )
    def test_other_than_its_layers(self, stored, reported, scores, spoil):
        """With a digest that matches: only a bug could write it."""
        content = stored.read_bytes()
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        del metadata["sha256"]
        wrong = spoil(scores).contiguous()
        stored.write_bytes(
            cache_module.save({"scores": wrong}, {**metadata, "sha256": cache_module._bits(wrong, metadata)})
        )
        reported("shape")

    def test_not_finite(self, reported, cache, target, facts, scores):
        cache.put(target, facts[0], scores * float("nan"))
        reported("not finite")

    def test_any_single_bit(self, stored, scores):
        """Wherever one bit flips, in header or data, it is noticed: one of every byte, all of the header's length."""
        content = stored.read_bytes()
        for at in range(len(content)):
            for bit in range(8) if at < 8 else [at * 5 % 8]:
                damaged = bytearray(content)
                damaged[at] ^= 1 << bit
                assert self.refused(stored, damaged), (at, bit)
        assert not self.refused(stored, content), "converse: put right, it is sound again"

    def test_any_length(self, stored, scores):
        content = stored.read_bytes()
        for length in range(0, len(content), 3):
            assert self.refused(stored, content[:length]), length
        assert not self.refused(stored, content)

    def refused(self, path, content):
        path.write_bytes(content)
        try:
            read_entry(path)
        except DamagedEntry:
            return True
        return False

    @pytest.mark.parametrize("kind", ["flipped", "truncated"])
    @pytest.mark.parametrize("share", [0, 0.005, 0.1, 0.3, 0.5, 0.8, 0.999])
    def test_is_computed_again_and_replaced(
        self, llama, tokenizer, tmp_path, facts, target, caplog, attributed, hparams, kind, share
    ):
        first = localize(llama, tokenizer, REQUESTS, hparams)
        path = ScoreCache(tmp_path, llama, STEPS).path(target, facts[1])
        content, sound = bytearray(path.read_bytes()), read_entry(path).scores.clone()
        at = int(share * len(content))
        if kind == "flipped":
            content[at] ^= 4
        path.write_bytes(content[:at] if kind == "truncated" else content)
        del attributed[:]
        with caplog.at_level(logging.WARNING):
            again = localize(llama, tokenizer, REQUESTS, hparams)
        assert attributed.facts == [facts[1]]
        assert chosen(again) == chosen(first) and torch.equal(read_entry(path).scores, sound)
        assert f"score cache: damaged ({path}: " in caplog.text and "computed again" in caplog.text
        caplog.clear()
        assert localize(llama, tokenizer, REQUESTS, hparams) == again
        assert len(attributed) == 1 and not caplog.text, "replaced by a sound entry"


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
            OSError, match="No space left on device.*free some space, or set cache_dir or KNE_CACHE"
        ) as caught:
            cache.put(target, facts[0], scores)
        assert caught.value.errno == errno.ENOSPC
        assert str(cache.folder) in str(caught.value)

    def test_no_space_is_found_out_before_the_work(self, llama, tmp_path, monkeypatch, attributed, tokenizer):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OSError, match="0.0 MiB free.*free some space, or set cache_dir or KNE_CACHE") as caught:
            localize(llama, tokenizer, REQUESTS, tiny_hparams(cache_dir=str(tmp_path)))
        assert caught.value.errno == errno.ENOSPC
        assert str(tmp_path) in str(caught.value)
        assert attributed == []

    def test_what_is_there_already_needs_no_space(self, llama, tmp_path, monkeypatch, tokenizer):
        """Converse: a full disk does not matter when nothing is missing."""
        hparams = tiny_hparams(cache_dir=str(tmp_path))
        first = localize(llama, tokenizer, REQUESTS, hparams)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        assert localize(llama, tokenizer, REQUESTS, hparams) == first

    def test_a_folder_that_cannot_be(self, llama, tmp_path, tokenizer, attributed):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(OSError, match="score cache: .*file.* cannot be written .*set cache_dir or KNE_CACHE"):
            localize(llama, tokenizer, REQUESTS, tiny_hparams(cache_dir=str(tmp_path / "file")))
        assert attributed == []


class TestResume:
    @pytest.mark.parametrize("done", [0, 1, 2])
    def test_after_an_interruption(self, llama, tokenizer, tmp_path, monkeypatch, hparams, done):
        interrupted = failing(attribute_facts, done + 1, KeyboardInterrupt())
        monkeypatch.setattr(localization, "attribute_facts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            localize(llama, tokenizer, REQUESTS, hparams)
        assert len(files(tmp_path)) == done
        resumed = failing(attribute_facts, -1, RuntimeError())
        monkeypatch.setattr(localization, "attribute_facts", resumed)
        found = localize(llama, tokenizer, REQUESTS, hparams)
        assert resumed.calls == len(REQUESTS) - done
        fresh = localize(llama, tokenizer, REQUESTS, replace(hparams, cache_dir=str(tmp_path / "fresh")))
        assert chosen(found) == chosen(fresh)

    def test_nothing_is_computed_twice(self, llama, tokenizer, tmp_path, attributed):
        hparams = tiny_hparams(cache_dir=str(tmp_path))
        for p in (0.1, 0.2):
            localize(llama, tokenizer, REQUESTS, tiny_hparams(cache_dir=str(tmp_path), p=p))
        localize(make_llama(), tokenizer, REQUESTS, hparams)
        assert len(attributed.facts) == len(REQUESTS)

    @pytest.mark.parametrize(
        ("requests", "changes"),
        [
            (REQUESTS[::-1], {}),
            (REQUESTS[:2], {}),
            (REQUESTS[2:], {}),
            (REQUESTS, {"p": 0.05}),
            (REQUESTS, {"aggregation": "mean"}),
            (REQUESTS, {"layers": [2, 1]}),
            (REQUESTS, {"chunk_rows": None}),
            (REQUESTS[:0:-1], {"p": 0.5, "aggregation": "mean", "layers": [0, 3]}),
        ],
        ids=["order", "first N", "last N", "p", "aggregation", "layers", "chunks", "all at once"],
    )
    def test_entries_serve_other(self, llama64, tokenizer, tmp_path, attributed, hparams, requests, changes):
        """In float64: other chunks add up in another order, and no rounding must move a neuron over the threshold."""
        llama = llama64
        first = localize(llama, tokenizer, REQUESTS, hparams)
        del attributed[:]
        wanted = replace(hparams, **changes)
        found = localize(llama, tokenizer, requests, wanted)
        assert attributed == []
        fresh = localize(llama, tokenizer, requests, replace(wanted, cache_dir=str(tmp_path / "fresh")))
        assert len(attributed.facts) == len(requests), "converse: in an empty cache it is all work"
        assert found.neurons == fresh.neurons and found.facts == len(requests)
        assert found.thresholds == pytest.approx(fresh.thresholds, rel=1e-9)
        assert found.neurons != first.neurons or changes.keys() <= {"chunk_rows"} and len(requests) == len(REQUESTS)

    @pytest.mark.parametrize("changes", [{"attribution_steps": STEPS + 1}, {"quadrature": "gauss-legendre"}], ids=str)
    def test_entries_do_not_serve_other(self, llama, tokenizer, tmp_path, attributed, hparams, changes):
        first = localize(llama, tokenizer, REQUESTS, hparams)
        second = localize(llama, tokenizer, REQUESTS, replace(hparams, **changes))
        assert len(attributed.facts) == len(files(tmp_path)) == 2 * len(REQUESTS)
        assert first.thresholds != second.thresholds
        for changed, before in ((changes, second), ({}, first)):
            assert localize(llama, tokenizer, REQUESTS, replace(hparams, **changed)) == before
        assert len(attributed.facts) == 2 * len(REQUESTS), "both stay"

    def test_two_module_types_share_the_work(self, llama, tokenizer, tmp_path, attributed, hparams):
        both = localize(llama, tokenizer, REQUESTS, replace(hparams, target_modules=[LLAMA_DOWN, LLAMA_UP]))
        layers = (0, 1, 2, 3)
        assert [targets for targets, _ in attributed] == [{LLAMA_DOWN: layers, LLAMA_UP: layers}] * len(REQUESTS)
        assert len(files(tmp_path)) == 2 * len(REQUESTS)
        for template in (LLAMA_UP, LLAMA_DOWN):
            alone = localize(llama, tokenizer, REQUESTS, replace(hparams, target_modules=[template]))
            assert alone.neurons == {template: both.neurons[template]}
            assert alone.thresholds == {template: both.thresholds[template]}
        assert len(attributed) == len(REQUESTS), "each alone finds all that it needs"

    def test_a_module_type_that_comes_later(self, llama, tokenizer, tmp_path, attributed, hparams):
        """Only what is missing of each: the new type, and the layers that the old one lacks."""
        localize(llama, tokenizer, REQUESTS[:1], hparams)
        localize(llama, tokenizer, REQUESTS[1:2], replace(hparams, layers=[0, 1]))
        both = replace(hparams, target_modules=[LLAMA_UP, LLAMA_DOWN])
        del attributed[:]
        found = localize(llama, tokenizer, REQUESTS, both)
        layers = (0, 1, 2, 3)
        assert {fact.prompt: targets for targets, (fact,) in attributed} == {
            FACTS[0][0]: {LLAMA_UP: layers},
            FACTS[1][0]: {LLAMA_UP: layers, LLAMA_DOWN: (2, 3)},
            FACTS[2][0]: {LLAMA_UP: layers, LLAMA_DOWN: layers},
        }
        assert (
            found.neurons
            == localize(llama, tokenizer, REQUESTS, replace(both, cache_dir=str(tmp_path / "fresh"))).neurons
        )

    def test_facts_of_equal_answer_length_share_a_sweep(self, llama, tokenizer, tmp_path, attributed):
        """As many as the rows have room for: 4 layers of 4 steps are 16 rows a fact."""
        requests = [
            {"prompt": f"The capital of {land} is", "target_new": "Rome"}
            for land in ("France", "Spain", "Peru", "Italy", "Oslo")
        ]
        for rows, sizes in ((1, [1] * 5), (31, [1] * 5), (32, [2, 2, 1]), (10_000, [5])):
            localize(llama, tokenizer, requests, tiny_hparams(cache_dir=str(tmp_path / str(rows)), chunk_rows=rows))
            assert [len(facts) for _, facts in attributed] == sizes
            del attributed[:]
        localize(llama, tokenizer, REQUESTS, tiny_hparams(cache_dir=str(tmp_path / "different"), chunk_rows=10_000))
        assert [len(facts) for _, facts in attributed] == [1, 1, 1], "converse: of unequal length they do not"

    @pytest.mark.parametrize("chunk_rows", [1, 10_000])
    @pytest.mark.parametrize("aggregation", ["max", "mean"])
    def test_duplicates_are_computed_once_and_counted_twice(
        self, llama, tokenizer, target, tmp_path, attributed, chunk_rows, aggregation
    ):
        hparams = tiny_hparams(cache_dir=str(tmp_path), chunk_rows=chunk_rows, aggregation=aggregation)
        twice = Localization(llama, tokenizer, [REQUESTS[0], *REQUESTS, REQUESTS[0]], hparams)
        assert twice.compute() == len(attributed.facts) == len(files(tmp_path)) == len(REQUESTS)
        assert twice.ensemble().facts == len(REQUESTS) + 2
        every = torch.stack([scores.values[LLAMA_DOWN] for scores in twice.scores()])
        assert torch.equal(every[0], every[1]) and torch.equal(every[0], every[4])
        wanted = every.amax(0) if aggregation == "max" else every.mean(0)
        assert roundings(twice.aggregate()[0].values[LLAMA_DOWN], wanted) < ONE_SUM
        once = Localization(llama, tokenizer, REQUESTS, hparams).aggregate()[0].values[LLAMA_DOWN]
        weighed = roundings(once, wanted) > 1000 * ONE_SUM
        assert weighed == (aggregation == "mean"), "a mean weighs it three times, a maximum does not care"

    @pytest.mark.parametrize("how", ["deleted", "truncated", "layers"])
    @pytest.mark.parametrize(
        "lost",
        [pytest.param([0], marks=pytest.mark.slow), [1, 2], pytest.param([0, 1, 2], marks=pytest.mark.slow)],
        ids=str,
    )
    def test_lost_between_computing_and_aggregating(
        self, llama, tokenizer, target, tmp_path, attributed, hparams, how, lost
    ):
        intact = localize(llama, tokenizer, REQUESTS, replace(hparams, cache_dir=str(tmp_path / "intact")))
        found = Localization(llama, tokenizer, REQUESTS, hparams)
        found.compute()
        del attributed[:]
        facts = [found.facts[i] for i in lost]
        for fact in facts:
            path = found.cache.path(target, fact)
            content, scores = path.read_bytes(), read_entry(path).scores.clone()
            path.unlink()
            if how == "truncated":
                path.write_bytes(content[:-1])
            elif how == "layers":  # another process that knew of fewer layers
                found.cache.put(resolve_target(llama, LLAMA_DOWN, [0, 2]), fact, scores[[0, 2]])
        assert chosen(found.ensemble()) == chosen(intact)
        assert attributed.facts == facts
        assert found.cache.missing(target, facts[0]) == (), "stored again"

    def test_a_folder_that_loses_everything(self, llama, tokenizer, hparams, monkeypatch):
        """Then every fact is computed when its scores are wanted."""
        expected = localize(llama, tokenizer, REQUESTS, hparams)
        monkeypatch.setattr(ScoreCache, "put", lambda *args: None)
        fresh = replace(hparams, cache_dir=f"{hparams.cache_dir}/fresh")
        assert chosen(localize(llama, tokenizer, REQUESTS, fresh)) == chosen(expected)

    def test_what_others_store_meanwhile_is_not_computed(
        self, llama, tokenizer, tmp_path, monkeypatch, hparams, attributed
    ):
        """Another process does all the facts during our first sweep."""

        def overtaken(*args, **kwargs):
            if not attributed:
                monkeypatch.setattr(localization, "attribute_facts", attribute_facts)
                localize(llama, tokenizer, REQUESTS, hparams)
                monkeypatch.setattr(localization, "attribute_facts", overtaken)
            return attributed(*args, **kwargs)

        monkeypatch.setattr(localization, "attribute_facts", overtaken)
        found = localize(llama, tokenizer, REQUESTS, hparams)
        assert len(attributed.facts) == 1
        monkeypatch.setattr(localization, "attribute_facts", attribute_facts)
        assert chosen(found) == chosen(
            localize(llama, tokenizer, REQUESTS, replace(hparams, cache_dir=str(tmp_path / "fresh")))
        )

    def test_other_models_do_not_share(self, tokenizer, tmp_path, attributed):
        models = [(make_llama(seed=1), LLAMA_DOWN), (make_llama(seed=2), LLAMA_DOWN), (make_gptj(), GPTJ_DOWN)]
        found = [localize(m, tokenizer, REQUESTS, tiny_hparams(t, cache_dir=str(tmp_path))).neurons for m, t in models]
        assert len(attributed.facts) == 3 * len(REQUESTS)
        assert found[0] != found[1]

    def test_another_model_in_the_same_place(self, tokenizer, tmp_path, attributed, hparams):
        """The weights tell models apart, not where they were loaded from: the path stays, the scores do not."""
        place, found = tmp_path / "model", {}
        for seed, computed in ((1, 3), (2, 3), (1, 0)):
            shutil.rmtree(place, ignore_errors=True)
            make_llama(seed=seed).save_pretrained(place)
            model = AutoModelForCausalLM.from_pretrained(place)
            assert model.config._name_or_path == str(place)
            del attributed[:]
            ensemble = localize(model, tokenizer, REQUESTS, hparams)
            assert len(attributed.facts) == computed, "only the first weights, back again, are known"
            assert found.setdefault(seed, ensemble) == ensemble
        assert found[1].neurons != found[2].neurons

    def test_an_edited_model_is_another_model(self, llama, tokenizer, tmp_path, attributed):
        hparams = tiny_hparams(cache_dir=str(tmp_path))
        localize(llama, tokenizer, REQUESTS, hparams)
        with torch.no_grad():
            llama.model.layers[0].mlp.down_proj.weight[0] += 0.1
        localize(llama, tokenizer, REQUESTS, hparams)
        assert len(attributed.facts) == 2 * len(REQUESTS)


class TestEdges:
    """Each of these was a bug once."""

    def test_what_was_checked_is_what_is_used(self, stored, scores):
        """Not a map of the file: that would change with it after the check, and end the process by SIGBUS if it is cut short."""
        entry = read_entry(stored)
        with stored.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\x00\x00\x80\x7f")  # inf
        assert torch.equal(entry.scores, scores)

    def test_no_space_for_all_module_types_together(self, llama, tokenizer, hparams, monkeypatch, attributed):
        """There is room for the entries of either type, not for both."""
        usage = shutil.disk_usage(hparams.cache_dir)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
        localize(llama, tokenizer, REQUESTS, hparams)
        with pytest.raises(OSError, match="MiB free"):
            localize(make_llama(seed=1), tokenizer, REQUESTS, replace(hparams, target_modules=[LLAMA_DOWN, LLAMA_UP]))
        assert len(attributed.facts) == len(REQUESTS)

    def test_no_space_in_float64(self, llama64, tokenizer, tmp_path, target, monkeypatch):
        """Scores of a float64 model take 8 bytes a neuron."""
        cache, wide = ScoreCache(tmp_path, llama64, STEPS), replace(all_layers(llama64), n_neurons=1_000_000)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
        cache.require_space(1, replace(wide, n_neurons=500_000))
        with pytest.raises(OSError, match="MiB free"):
            cache.require_space(1, wide)

    def test_layers_that_others_store_meanwhile(self, llama, tokenizer, target, monkeypatch, hparams, attributed):
        """Another process stores layer 0 of all facts during our first sweep; the other layers are still ours."""

        def overtaken(*args, **kwargs):
            if not attributed:
                monkeypatch.setattr(localization, "attribute_facts", attribute_facts)
                localize(llama, tokenizer, REQUESTS, replace(hparams, layers=[0], p=1))
                monkeypatch.setattr(localization, "attribute_facts", overtaken)
            return attributed(*args, **kwargs)

        monkeypatch.setattr(localization, "attribute_facts", overtaken)
        ours = Localization(llama, tokenizer, REQUESTS, hparams)
        ours.compute()
        assert [ours.cache.missing(target, fact) for fact in ours.facts] == [()] * len(REQUESTS)

    def test_time_of_what_was_lost(self, llama, tokenizer, hparams):
        """What was lost and computed again took time, too."""
        found = Localization(llama, tokenizer, REQUESTS, hparams)
        found.compute()
        for path in entry_files(hparams.cache_dir):
            path.unlink()
        assert found.ensemble().seconds > 0

    def test_time_of_duplicates(self, llama, tokenizer, hparams):
        """Computed once, a fact took its time once."""
        once = localize(llama, tokenizer, REQUESTS[:1], hparams)
        twice = localize(llama, tokenizer, REQUESTS[:1] * 2, hparams)
        assert twice.seconds == once.seconds

    def test_facts_of_equal_tokens_are_computed_once(self, llama, tokenizer, tmp_path, attributed):
        """They share an entry, for the tokenizer drops what tells them apart."""
        requests = [REQUESTS[0], {**REQUESTS[0], "prompt": REQUESTS[0]["prompt"] + "~"}]
        localize(llama, tokenizer, requests, tiny_hparams(cache_dir=str(tmp_path), chunk_rows=10_000))
        assert len(files(tmp_path)) == 1
        assert len(attributed.facts) == 1

    def test_random_numbers_go_on_as_if_nothing_was(self, llama, tokenizer, hparams, monkeypatch):
        """Nothing draws from torch's generator, the choice of a library (once a process) neither."""
        monkeypatch.setattr(products, "onednn_is_faster", functools.cache(products.onednn_is_faster.__wrapped__))
        state = torch.get_rng_state()
        localize(llama, tokenizer, REQUESTS[:1], hparams)
        assert torch.equal(torch.get_rng_state(), state)
