"""Localising through the score cache: nothing is computed twice; interruptions and other processes change no bit."""

import errno
import functools
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import FACTS, GPTJ_DOWN, LLAMA_DOWN, failing, make_gptj, make_llama, tiny_hparams
from localizing import REQUESTS, chosen, files
from rounding import ONE_SUM, roundings
from stored_scores import STEPS
from transformers import AutoModelForCausalLM

from kne_easyedit.attribution.engine import attribute_facts
from kne_easyedit.attribution.score_cache import ScoreCache, entry_files, read_entry
from kne_easyedit.localization import localizer as localization
from kne_easyedit.localization.localizer import Localization, localize
from kne_easyedit.models import fast_linear as products
from kne_easyedit.models.targets import resolve_target

LLAMA_UP = "model.layers.{}.mlp.up_proj"


class TestMissing:
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

    def test_no_space_is_found_out_before_the_work(self, llama, tmp_path, monkeypatch, attributed, tokenizer):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OSError, match=r"0.0 MiB free.*free some space, or set cache_dir or KNE_CACHE") as caught:
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
        with pytest.raises(OSError, match=r"score cache: .*file.* cannot be written .*set cache_dir or KNE_CACHE"):
            localize(llama, tokenizer, REQUESTS, tiny_hparams(cache_dir=str(tmp_path / "file")))
        assert attributed == []

    def test_no_space_for_all_module_types_together(self, llama, tokenizer, hparams, monkeypatch, attributed):
        """There is room for the entries of either type, not for both."""
        usage = shutil.disk_usage(hparams.cache_dir)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
        localize(llama, tokenizer, REQUESTS, hparams)
        with pytest.raises(OSError, match="MiB free"):
            localize(make_llama(seed=1), tokenizer, REQUESTS, replace(hparams, target_modules=[LLAMA_DOWN, LLAMA_UP]))
        assert len(attributed.facts) == len(REQUESTS)


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
        assert found.neurons != first.neurons or (changes.keys() <= {"chunk_rows"} and len(requests) == len(REQUESTS))

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
        """Then every fact is computed when its scores are read."""
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
