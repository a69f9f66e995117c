"""Scores on disk: found again only when nothing they depend on has changed, complete or not there at all."""

import errno
import json
import logging
import shutil

import pytest
import torch
from conftest import FACTS, GPTJ_DOWN, LLAMA_DOWN, all_layers, failing, make_gptj, make_llama, tiny_hparams

from kne_easyedit import cache as cache_module
from kne_easyedit import localization, paths
from kne_easyedit.attribution import attribute_facts
from kne_easyedit.batching import Fact
from kne_easyedit.cache import ScoreCache, model_digest
from kne_easyedit.layout import resolve_target
from kne_easyedit.localization import localize, score_facts

STEPS = 4
REQUESTS = [{"prompt": prompt, "target_new": target} for prompt, target in FACTS]


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


@pytest.fixture
def attributed(monkeypatch):
    """Counts the facts attributed from here on."""
    counting = failing(attribute_facts, -1, RuntimeError())
    monkeypatch.setattr(localization, "attribute_facts", counting)
    return counting


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


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
        assert cache.seconds(target, facts[0]) == 12.5

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


class TestKey:
    """Whatever changes the scores changes the key; whatever does not leaves it."""

    @pytest.mark.parametrize("other", ["steps", "template", "layers", "ids", "prompt_length"])
    def test_entry(self, llama, cache, stored, target, facts, other):
        steps, fact = STEPS, facts[0]
        if other == "steps":
            steps += 1
        elif other == "template":
            target = resolve_target(llama, "model.layers.{}.self_attn.o_proj")
        elif other == "layers":
            target = resolve_target(llama, LLAMA_DOWN, [0, 1, 2])
        elif other == "ids":
            fact = Fact(fact.prompt, fact.target, (*fact.ids[:-1], fact.ids[-1] + 1), fact.prompt_length)
        else:
            fact = Fact(fact.prompt, fact.target, fact.ids, fact.prompt_length - 1)
        assert cache.path(target, steps, fact) != stored
        assert cache.get(target, steps, fact) is None

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
            lambda m: m.config.update({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
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
            with caplog.at_level(logging.WARNING):
                assert cache.get(target, facts[0]) is None
            assert f"score cache: {stored} is damaged" in caplog.text and "computed again" in caplog.text
            assert reason in caplog.text
            assert not stored.exists()

        return check

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

    def test_one_bit_of_the_scores(self, stored, reported):
        content = bytearray(stored.read_bytes())
        content[-10] ^= 1
        stored.write_bytes(content)
        reported("its digest does not match")

    def test_of_another_shape(self, reported, cache, target, facts, scores):
        cache.put(target, facts[0], scores[:3])
        reported("shape (3, 24)")

    def test_not_finite(self, reported, cache, target, facts, scores):
        cache.put(target, facts[0], scores * float("nan"))
        reported("not finite")

    def test_any_single_bit(self, cache, target, facts, stored, scores, caplog):
        """Wherever one bit flips: either the scores are the right ones, or there are none."""
        caplog.set_level(logging.CRITICAL)
        content = stored.read_bytes()
        refused = 0
        for at in range(len(content)):
            damaged = bytearray(content)
            damaged[at] ^= 1 << at % 8
            stored.write_bytes(damaged)
            found = cache.get(target, facts[0])
            assert found is None or torch.equal(found, scores) and found.dtype == scores.dtype
            assert found is None or cache.seconds(target, facts[0]) >= 0
            refused += found is None
        assert refused > scores.numel() * 4, "at least every bit of the scores counts"

    def test_is_computed_again_and_replaced(self, llama, tmp_path, facts, target, caplog, attributed):
        hparams = tiny_hparams(cache_dir=str(tmp_path))
        first = list(self.run(llama, target, facts, hparams))
        path = ScoreCache(tmp_path, llama, STEPS).path(target, facts[1])
        good = path.read_bytes()
        path.write_bytes(good[:-3])
        with caplog.at_level(logging.WARNING):
            again = list(self.run(llama, target, facts, hparams))
        assert attributed.calls == 3 + 1
        assert all(map(torch.equal, first, again))
        assert str(path) in caplog.text
        assert all(map(torch.equal, self.run(llama, target, facts, hparams), first))
        assert attributed.calls == 3 + 1, "replaced by a sound entry"

    def run(self, model, target, facts, hparams):
        return score_facts(model, target, facts, hparams, ScoreCache(hparams.cache_dir, model))


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
        with pytest.raises(OSError, match="No space left on device.*free some space, or set cache_dir or KNE_CACHE") as caught:
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
        assert attributed.calls == 0

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
        assert attributed.calls == 0


class TestResume:
    @pytest.mark.parametrize("done", [0, 1, 2])
    def test_after_an_interruption(self, llama, tokenizer, tmp_path, monkeypatch, done):
        hparams = tiny_hparams(cache_dir=str(tmp_path))
        interrupted = failing(attribute_facts, done + 1, KeyboardInterrupt())
        monkeypatch.setattr(localization, "attribute_facts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            localize(llama, tokenizer, REQUESTS, hparams)
        assert len(files(tmp_path)) == done
        resumed = failing(attribute_facts, -1, RuntimeError())
        monkeypatch.setattr(localization, "attribute_facts", resumed)
        found = localize(llama, tokenizer, REQUESTS, hparams)
        assert resumed.calls == len(REQUESTS) - done
        fresh = localize(llama, tokenizer, REQUESTS, tiny_hparams(cache_dir=str(tmp_path / "fresh")))
        assert found.neurons == fresh.neurons and found.thresholds == fresh.thresholds

    def test_nothing_is_computed_twice(self, llama, tokenizer, tmp_path, attributed):
        hparams = tiny_hparams(cache_dir=str(tmp_path))
        for p in (0.1, 0.2):
            localize(llama, tokenizer, REQUESTS, tiny_hparams(cache_dir=str(tmp_path), p=p))
        localize(make_llama(), tokenizer, REQUESTS, hparams)
        assert attributed.calls == len(REQUESTS)

    def test_other_models_do_not_share(self, tokenizer, tmp_path, attributed):
        models = [(make_llama(seed=1), LLAMA_DOWN), (make_llama(seed=2), LLAMA_DOWN), (make_gptj(), GPTJ_DOWN)]
        found = [localize(m, tokenizer, REQUESTS, tiny_hparams(t, cache_dir=str(tmp_path))).neurons for m, t in models]
        assert attributed.calls == 3 * len(REQUESTS)
        assert found[0] != found[1]

    def test_an_edited_model_is_another_model(self, llama, tokenizer, tmp_path, attributed):
        hparams = tiny_hparams(cache_dir=str(tmp_path))
        localize(llama, tokenizer, REQUESTS, hparams)
        with torch.no_grad():
            llama.model.layers[0].mlp.down_proj.weight[0] += 0.1
        localize(llama, tokenizer, REQUESTS, hparams)
        assert attributed.calls == 2 * len(REQUESTS)


def test_an_entry_says_what_it_is(stored, facts, llama):
    """For people and other programs: prompt, target and the model's digest stand in the file."""
    content = stored.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert (header["prompt"], header["target"], header["model"]) == (facts[0].prompt, facts[0].target, model_digest(llama))
