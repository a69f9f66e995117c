"""Many processes on the same facts: batches that each gets some of, shards that make one cache."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from conftest import make_llama, make_tokenizer, tiny_hparams
from localizing import REQUESTS, chosen

from kne_easyedit import cli
from kne_easyedit.attribution.score_cache import ScoreCache, entry_files, read_entry
from kne_easyedit.localization import localizer as localization
from kne_easyedit.localization.batches import batches
from kne_easyedit.localization.localizer import Localization, localize

ALIKE = [
    {"prompt": f"The capital of {subject} is", "target_new": target}
    for subject in ("France", "Spain", "Peru", "Italy")
    for target in ("Rome", "Oslo")
]
"""Facts that may all share a sweep."""


@pytest.mark.parametrize(("workers", "jobs", "sizes"), [(1, 1, [8]), (2, 1, [4, 4]), (1, 4, [2] * 4), (2, 2, [2] * 4)])
def test_batches_are_so_small_that_each_process_gets_some(llama, tokenizer, hparams, monkeypatch, workers, jobs, sizes):
    found = Localization(llama, tokenizer, ALIKE, replace(hparams, chunk_rows=10_000), jobs)
    seen = []

    def parallel(function, sweeps, workers):
        seen.extend(len(sweep.facts) for _, sweep in sweeps)
        for sweep in sweeps:
            yield from function(sweep)

    monkeypatch.setattr(localization, "run_parallel", parallel)
    assert found.compute(workers) == len(ALIKE)
    assert seen == sizes


def test_memory_still_bounds_a_batch(facts):
    assert [len(batch) for batch in batches(facts[:1] * 6, points=10, rows=20, processes=1)] == [2, 2, 2]
    assert [len(batch) for batch in batches(facts[:1] * 6, points=10, rows=20, processes=6)] == [1] * 6
    assert [len(batch) for batch in batches(facts[:1] * 6, points=10, rows=5, processes=1)] == [1] * 6


def test_facts_that_another_process_has_come_last_and_are_waited_for(
    llama, tokenizer, hparams, monkeypatch, attributed
):
    """The other one stores what it has claimed when it is asked for the third time, or dies."""
    for stores in (True, False):
        own = replace(hparams, cache_dir=f"{hparams.cache_dir}/{stores}", chunk_rows=1)
        theirs = Localization(llama, tokenizer, REQUESTS[:1], own)
        taken, asked, real = theirs.cache.path(theirs.targets[0], theirs.facts[0]).stem, Counter(), ScoreCache.claim

        def claim(self, targets, facts, taken=taken, asked=asked, real=real, theirs=theirs, stores=stores):
            stems = {self.path(target, fact).stem for target in targets for fact in facts}
            asked.update(stems & {taken})
            if taken in stems and asked[taken] < 3:
                return _refused()
            if taken in stems and stores and asked[taken] == 3:
                monkeypatch.setattr(ScoreCache, "claim", real)
                theirs.compute()
            return real(self, targets, facts)

        monkeypatch.setattr(localization, "PAUSE", 0.0)
        monkeypatch.setattr(ScoreCache, "claim", claim)
        del attributed[:]
        found = Localization(llama, tokenizer, REQUESTS, own)
        assert found.compute() == (2 if stores else 3)
        assert asked[taken] == 3
        assert [fact.prompt for fact in attributed.facts][-1] == REQUESTS[0]["prompt"], "the others came first"
        assert sorted(fact.prompt for fact in attributed.facts) == sorted(r["prompt"] for r in REQUESTS)
        monkeypatch.setattr(ScoreCache, "claim", real)


class _refused:
    def __enter__(self):
        return False

    def __exit__(self, *_):
        return None


@pytest.fixture(name="place")
def place_fixture(tmp_path, monkeypatch):
    """A folder with a tiny model and five facts, which commands name."""
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained(tmp_path / "tiny-model")
    make_tokenizer().save_pretrained(tmp_path / "tiny-model")
    records = [{**one, "subject": one["prompt"].split()[3], "ground_truth": "Paris"} for one in ALIKE[:5]]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    return tmp_path


def command(*options: str) -> list[str]:
    given = ["--model", "tiny-model", "--data", "facts.json", "--size", "5", "--out", "found"]
    return [
        "localize",
        *given,
        "--set",
        "attribution_steps=4",
        "chunk_rows=1",
        "cache_dir=cache",
        "device=cpu",
        *options,
    ]


def test_shards_fill_one_cache_and_the_whole_reads_it(place, capsys, attributed):
    for i, facts in enumerate((3, 2)):
        assert cli.main([*command(), "--shard", f"{i}/2"]) == 0
        assert f"shard {i}/2: {facts} facts, {facts} attributed now" in capsys.readouterr().out
    assert not (place / "found").exists(), "a part has no ensemble"
    assert len(attributed.facts) == len(list(entry_files(place / "cache"))) == 5
    assert cli.main(command()) == 0
    assert "5 facts (0 attributed now" in capsys.readouterr().out
    assert len(attributed.facts) == 5


def test_workers_change_no_bit(place, capsys):
    """Each fact is a sweep of its own here."""
    assert cli.main([*command(), "--workers", "2"]) == 0
    assert "5 facts (5 attributed now" in capsys.readouterr().out
    hparams = tiny_hparams(cache_dir="alone", chunk_rows=1)
    records = [{"prompt": one["prompt"], "target_new": one["target_new"]} for one in ALIKE[:5]]
    localize(make_llama(), make_tokenizer(), records, hparams)
    one, other = (
        {read_entry(path).prompt + read_entry(path).target: read_entry(path).scores.tolist() for path in entry_files(c)}
        for c in ("cache", "alone")
    )
    assert one == other and len(one) == 5


@pytest.mark.parametrize(
    ("shard", "said"), [("2/2", "shard: '2/2' is no part i/n"), ("7/9", "shard: 7/9 of 5 facts holds none")]
)
def test_a_shard_that_is_none_or_empty(place, capsys, shard, said):
    assert cli.main([*command(), "--shard", shard]) == 1
    assert said in capsys.readouterr().err
    assert not (place / "cache").exists()


def test_an_ensemble_does_not_depend_on_how_many_share_the_work(llama, tokenizer, hparams):
    found = [
        chosen(localize(llama, tokenizer, ALIKE, replace(hparams, cache_dir=f"{hparams.cache_dir}/{jobs}"), 1, jobs))
        for jobs in (1, 3, 8)
    ]
    assert found[0].neurons == found[1].neurons == found[2].neurons
