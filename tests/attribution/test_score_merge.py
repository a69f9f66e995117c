"""Caches that machines have filled apart, merged: as if one had been filled by all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_hparams
from localizing import REQUESTS, chosen
from rounding import A_MODEL, roundings

from kne_easyedit import cli
from kne_easyedit.attribution.score_cache import entry_files, read_entry
from kne_easyedit.localization.localizer import Localization, localize

HPARAMS = tiny_hparams(chunk_rows=1)


def scores_in(folder) -> dict:
    return {path.name: read_entry(path).scores for path in entry_files(folder)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(name="filled")
def filled_fixture(llama, tokenizer, tmp_path):
    """Fills a cache with some facts and layers; returns its folder."""

    def fill(name, requests=REQUESTS, layers=()):
        hparams = replace(HPARAMS, cache_dir=str(tmp_path / name), layers=list(layers))
        Localization(llama, tokenizer, requests, hparams).compute()
        return tmp_path / name

    return fill


def merge(*caches, into):
    return cli.main(["cache", "merge", *map(str, caches), "--cache-dir", str(into)])


def test_shards_of_two_machines_make_one_cache(filled, llama, tokenizer, tmp_path, capsys, attributed):
    alone, a, b = filled("alone"), filled("a", REQUESTS[::2]), filled("b", REQUESTS[1::2])
    assert merge(a, b, into=tmp_path / "all") == 0
    assert f"{len(REQUESTS)} entries copied, 0 completed" in capsys.readouterr().out
    assert equal(scores_in(tmp_path / "all"), scores_in(alone)) and len(scores_in(alone)) == len(REQUESTS)
    del attributed[:]
    hparams = replace(HPARAMS, cache_dir=str(tmp_path / "all"))
    found = localize(llama, tokenizer, REQUESTS, hparams)
    assert attributed == [], "nothing is left to be computed"
    assert chosen(found) == chosen(localize(llama, tokenizer, REQUESTS, replace(hparams, cache_dir=str(alone))))


def test_again_and_overlapping_it_changes_nothing(filled, tmp_path, capsys):
    a, b = filled("a", REQUESTS[:2]), filled("b", REQUESTS[1:])
    assert merge(a, b, into=tmp_path / "all") == 0
    first = {path.name: path.read_bytes() for path in entry_files(tmp_path / "all")}
    assert merge(b, a, into=tmp_path / "all") == 0
    assert f"0 entries copied, 0 completed by more layers, {len(REQUESTS) + 1} known" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in entry_files(tmp_path / "all")} == first


def test_layers_are_added_and_those_that_are_there_stay(filled, tmp_path, capsys):
    low, high, all_ = filled("low", layers=[0, 1]), filled("high", layers=[1, 2, 3]), filled("alone")
    assert merge(low, high, into=tmp_path / "all") == 0
    assert f"{len(REQUESTS)} completed by more layers" in capsys.readouterr().out
    merged, whole = scores_in(tmp_path / "all"), scores_in(all_)
    assert all(read_entry(path).layers == [0, 1, 2, 3] for path in entry_files(tmp_path / "all"))
    assert all(torch.equal(merged[name][:2], scores) for name, scores in scores_in(low).items())
    assert all(torch.equal(merged[name][2:], scores[1:]) for name, scores in scores_in(high).items())
    assert all(roundings(merged[name], whole[name]) < A_MODEL for name in whole)
    assert cli.main(["cache", "verify", "--cache-dir", str(tmp_path / "all")]) == 0


def test_a_damaged_entry_is_named_and_the_others_come(filled, tmp_path, capsys):
    a = filled("a")
    damaged = next(entry_files(a))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert merge(a, into=tmp_path / "all") == 1
    said = capsys.readouterr().out
    assert f"left out: {damaged}" in said and f"{len(REQUESTS) - 1} entries copied" in said and "1 damaged" in said
    assert len(scores_in(tmp_path / "all")) == len(REQUESTS) - 1


@pytest.mark.parametrize(("given", "said"), [("none", "no score cache"), ("a", "is the cache that the others")])
def test_what_is_no_other_cache(filled, tmp_path, capsys, given, said):
    a = filled("a", REQUESTS[:1])
    assert merge(tmp_path / given, into=a) == 1
    assert said in capsys.readouterr().err
