"""Facts are read, encoded and looked up once on their way to an ensemble."""

import json

import pytest
import torch
from conftest import FACTS, LLAMA_DOWN, make_llama, tiny_hparams
from localizing import REQUESTS, Attributed, chosen

from kne_easyedit import compute_edit
from kne_easyedit.attribution import score_cache
from kne_easyedit.attribution.score_cache import ScoreCache
from kne_easyedit.facts.encoding import Fact, encode_request
from kne_easyedit.localization import data, localizer
from kne_easyedit.localization.data import encode_facts, localization_requests
from kne_easyedit.localization.explain import explain
from kne_easyedit.localization.localizer import Localization, find_ensemble, localize
from kne_easyedit.localization.stability import study

LLAMA_UP = "model.layers.{}.mlp.up_proj"
BOTH = [LLAMA_DOWN, LLAMA_UP]


@pytest.fixture
def hparams(tmp_path):
    return tiny_hparams(cache_dir=str(tmp_path / "cache"), chunk_rows=1)


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{**request, "subject": request["prompt"].split()[0]} for request in REQUESTS]))
    return path


def counting(monkeypatch, module, name):
    """Counts the calls of a function of ``module``; returns the list of their first arguments."""
    calls, real = [], getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(args[0])
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


class TestCacheReads:
    """In a warm run every entry is read once: of each fact, for each module type."""

    @pytest.mark.parametrize("templates", [[LLAMA_DOWN], BOTH], ids=["one type", "two types"])
    @pytest.mark.parametrize("run", [localize, study, explain])
    def test_warm(self, llama, tokenizer, hparams, monkeypatch, run, templates):
        hparams.target_modules = templates
        first = run(llama, tokenizer, REQUESTS, hparams)
        reads = counting(monkeypatch, score_cache, "read_entry")
        again = run(llama, tokenizer, REQUESTS, hparams)
        assert len(reads) == len(set(reads)) == len(REQUESTS) * len(templates)
        assert run is study or again == first
        if run is study:
            assert again.computed == 0 and first.computed == len(REQUESTS)
            assert (again.ensemble, again.halves) == (first.ensemble, first.halves)
            assert all(torch.equal(again.scores[t], first.scores[t]) for t in templates)

    def test_for_an_edit_on_a_data_file(self, tokenizer, hparams, monkeypatch, data_file):
        hparams.localization_data, hparams.localization_size = str(data_file), len(REQUESTS)
        first = find_ensemble(make_llama(), tokenizer, [], hparams)
        reads = counting(monkeypatch, score_cache, "read_entry")
        assert find_ensemble(make_llama(), tokenizer, [], hparams) == first
        assert len(reads) == len(REQUESTS)

    @pytest.mark.parametrize("known", [[0], [1], [2], [0, 2]], ids=str)
    def test_partly_warm_is_bit_by_bit_the_same(self, llama, tokenizer, hparams, monkeypatch, known):
        """Whichever facts are missing, scores are added in the order of the facts: a mean has the same bits."""
        hparams.aggregation = "mean"
        localize(llama, tokenizer, [REQUESTS[i] for i in known], hparams)
        attributed = Attributed()
        monkeypatch.setattr(localizer, "attribute_facts", attributed)
        found = Localization(llama, tokenizer, REQUESTS, hparams)
        (scores,) = found.aggregate()
        assert found.computed == len(attributed.facts) == len(REQUESTS) - len(known)
        monkeypatch.setattr(ScoreCache, "put", None)
        (warm,) = Localization(llama, tokenizer, REQUESTS, hparams).aggregate()
        assert torch.equal(scores.values[LLAMA_DOWN], warm.values[LLAMA_DOWN]) and scores.seconds == warm.seconds

    def test_parts_in_one_pass_are_those_one_by_one(self, llama, tokenizer, hparams, monkeypatch):
        alone = [localize(llama, tokenizer, REQUESTS[part], hparams) for part in (slice(0, 2), slice(1, None, 2))]
        found = Localization(llama, tokenizer, REQUESTS, hparams)
        together = [found.select(scores) for scores in found.aggregate(slice(0, 2), slice(1, None, 2))]
        assert together == alone and chosen(together[0]) != chosen(together[1])

    def test_of_an_empty_part(self, llama, tokenizer, hparams):
        with pytest.raises(ValueError, match="scores: there are none to aggregate"):
            Localization(llama, tokenizer, REQUESTS, hparams).aggregate(slice(3, 3))


def test_the_name_of_an_entry(llama, tmp_path):
    """Scores stored by earlier versions are found: a name depends on tokens, module type and sum only."""
    target = localizer.resolve_target(llama, LLAMA_DOWN)
    path = ScoreCache(tmp_path, llama, 4).path(target, Fact("Ada is", "Marie", (5, 6, 7), 2))
    assert path.name == "a250938d320c529c732f489243a11494759adbdacc8f4a4cf42db45e8f3285bc.safetensors"


class TestEncoding:
    @pytest.fixture
    def encoded(self, monkeypatch):
        return counting(monkeypatch, data, "encode_request")

    def test_once_for_an_edit_on_its_own_requests(self, llama, tokenizer, hparams, encoded):
        compute_edit(llama, tokenizer, REQUESTS[:2], hparams)
        assert len(encoded) == 2

    def test_once_for_an_edit_on_a_data_file(self, llama, tokenizer, hparams, encoded, data_file):
        """The request, and each fact of the file."""
        hparams.localization_data, hparams.localization_size = str(data_file), 3
        compute_edit(llama, tokenizer, REQUESTS[:1], hparams)
        assert len(encoded) == 1 + 3

    @pytest.mark.parametrize("run", [localize, study, explain])
    def test_once_for_a_localisation(self, llama, tokenizer, hparams, encoded, run):
        run(llama, tokenizer, REQUESTS, hparams)
        assert len(encoded) == len(REQUESTS)

    @pytest.mark.parametrize("door", [localize, find_ensemble])
    def test_facts_are_taken_as_they_are(self, llama, tokenizer, hparams, encoded, door):
        facts = encode_facts(llama, tokenizer, REQUESTS, hparams)
        assert facts == [encode_request(tokenizer, request) for request in REQUESTS] and facts[0].prompt == FACTS[0][0]
        del encoded[:]
        assert door(llama, None, facts, hparams) == localize(llama, tokenizer, REQUESTS, hparams)
        assert len(encoded) == len(REQUESTS), "converse: of the second call"

    def test_a_fact_that_is_too_long(self, llama, tokenizer, hparams):
        with pytest.raises(ValueError, match="tokens with its target, the model takes 64"):
            encode_facts(llama, tokenizer, [{"prompt": "Ada " * 80, "target_new": "Marie"}], hparams)


class TestRequests:
    def test_a_file_is_parsed_once_until_it_changes(self, hparams, data_file, monkeypatch):
        hparams.localization_data, hparams.localization_size, hparams.localization_offset = str(data_file), 2, 1
        parsed = counting(monkeypatch, data, "load_requests")
        first = localization_requests(hparams)
        assert [request["prompt"] for request in first] == [request["prompt"] for request in REQUESTS[1:3]]
        assert localization_requests(hparams) == first and len(parsed) == 1
        data_file.write_text(data_file.read_text().replace("Ada", "Eve"))
        localization_requests(hparams)
        assert len(parsed) == 2

    def test_no_file(self, hparams):
        with pytest.raises(ValueError, match="localization_data: none; name a KnowEdit file"):
            localization_requests(hparams)
