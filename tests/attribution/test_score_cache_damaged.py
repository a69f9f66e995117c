"""Damaged entries of the score cache: reported as a warning, computed again, replaced."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import LLAMA_DOWN, make_llama
from localizing import REQUESTS, chosen
from stored_scores import STEPS

from kne_easyedit.attribution import score_cache as cache_module
from kne_easyedit.attribution.score_cache import DamagedEntry, ScoreCache, read_entry
from kne_easyedit.localization.localizer import localize
from kne_easyedit.models.targets import resolve_target

LLAMA_UP = "model.layers.{}.mlp.up_proj"


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
            cache_module.save({"scores": wrong}, {**metadata, "sha256": cache_module.scores_digest(wrong, metadata)})
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
