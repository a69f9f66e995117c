"""Localising and explaining from the command line and under Hydra: what is written is what the library computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FACTS, HANGS, LLAMA_DOWN, fingerprint, make_llama, make_tokenizer, tiny_hparams, with_same_threads
from safetensors import safe_open

from kne_easyedit import KNEHyperParams, cli
from kne_easyedit._util.digest import digest
from kne_easyedit.attribution.score_cache import entry_files
from kne_easyedit.localization import localizer as localization
from kne_easyedit.localization.ensemble import NeuronEnsemble, select_ensemble
from kne_easyedit.localization.explain import explain
from kne_easyedit.localization.localizer import localize
from kne_easyedit.localization.output import decisive_settings
from kne_easyedit.localization.stability import study

UP = "model.layers.{}.mlp.up_proj"
REQUESTS = [
    {"prompt": prompt, "target_new": target}
    for prompt, target in [*FACTS, ("The capital of Peru is", "Madrid"), ("Ada is", "Marie")]
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny model, its settings and a KnowEdit file in the working folder."""
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    records = [{**request, "subject": request["prompt"].split()[0]} for request in REQUESTS]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    settings = tiny_hparams(
        model_name="model", localization_data="facts.json", localization_size=4, cache_dir="cache"
    ).to_dict()
    (tmp_path / "kne.yaml").write_text(json.dumps(settings))
    return tmp_path


def kne(*arguments: str) -> int:
    return cli.main([*arguments])


def read(path: Path):
    return json.loads(path.read_text())


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


class TestStudy:
    def test_is_the_localisation_and_its_two_halves(self, llama, tokenizer):
        before = fingerprint(llama)
        found = study(llama, tokenizer, REQUESTS, tiny_hparams())
        assert found.ensemble.neurons == localize(llama, tokenizer, REQUESTS, tiny_hparams()).neurons
        halves = [localize(llama, tokenizer, REQUESTS[i::2], tiny_hparams()) for i in (0, 1)]
        assert [half.neurons for half in found.halves] == [half.neurons for half in halves]
        assert found.stability == halves[0].overlap(halves[1])
        assert 0 < found.stability < 1 and 0 < found.chance < 1
        assert found.computed == len(REQUESTS) and study(llama, tokenizer, REQUESTS, tiny_hparams()).computed == 0
        assert fingerprint(llama) == before

    def test_one_fact_has_no_halves(self, llama, tokenizer):
        found = study(llama, tokenizer, REQUESTS[:1], tiny_hparams())
        assert found.halves is None and found.stability is None

    def test_overlap_counts_shared_neurons(self):
        one = NeuronEnsemble({LLAMA_DOWN: {0: (1, 2), 1: (5,)}}, {LLAMA_DOWN: 24})
        other = NeuronEnsemble({LLAMA_DOWN: {0: (2,), 2: (5,)}}, {LLAMA_DOWN: 24})
        assert one.overlap(one) == 1 and one.overlap(other) == other.overlap(one) == 2 * 1 / (3 + 2)
        assert one.overlap(NeuronEnsemble({UP: {0: (1, 2), 1: (5,)}}, {UP: 24})) == 0, (
            "another module's neurons are others"
        )


class TestLocalizeCommand:
    def test_writes_and_prints_what_was_found(self, tiny, capsys):
        assert kne("localize", "--hparams", "kne.yaml", "--out", "out") == 0
        out = capsys.readouterr().out
        ensemble, summary = NeuronEnsemble.load("out/ensemble.json"), read(tiny / "out/summary.json")
        expected = localize(make_llama(), make_tokenizer(), REQUESTS[:4], tiny_hparams())
        assert ensemble.neurons == expected.neurons and ensemble.facts == 4
        with safe_open("out/scores.safetensors", framework="pt") as file:
            scores, metadata = file.get_tensor(LLAMA_DOWN), file.metadata()
        assert select_ensemble(scores, 0.2, target_module=LLAMA_DOWN).neurons == expected.neurons
        assert metadata["facts"] == "4" and metadata["model"] == summary["model_digest"]
        assert summary["neurons"] == expected.size and summary["parameter_share"] == expected.parameter_share(
            make_llama()
        )
        assert is_png(tiny / "out/ensemble.png")
        assert f"{expected.size} neurons" in out and "stability: ensembles of two halves" in out and "layer   3" in out

    def test_modules_data_size_and_settings_are_arguments(self, tiny):
        arguments = [
            "--data",
            "facts.json",
            "--size",
            "5",
            "--modules",
            LLAMA_DOWN,
            UP,
            "--set",
            "p=0.1",
            "layers=[1,2]",
            "quadrature=gauss-legendre",
        ]
        assert kne("localize", "--hparams", "kne.yaml", *arguments, "--out", "out") == 0
        ensemble = NeuronEnsemble.load("out/ensemble.json")
        expected = localize(
            make_llama(),
            make_tokenizer(),
            REQUESTS,
            tiny_hparams(target_modules=[LLAMA_DOWN, UP], p=0.1, layers=[1, 2], quadrature="gauss-legendre"),
        )
        assert ensemble.neurons == expected.neurons and set(ensemble.neurons) == {LLAMA_DOWN, UP}
        assert {layer for found in ensemble.neurons.values() for layer in found} <= {1, 2}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--set", "q=1"], "unknown setting 'q'"),
            (["--set", "p"], "--set 'p': expected NAME=VALUE"),
            (["--set", "p=7"], "p: 7.0 must be in"),
            (["--set", "localization_data=null"], "localization_data: none; name a KnowEdit file"),
            (["--modules", "model.layers.{}.mlp.donw_proj"], "nearest: model.layers.{}.mlp.down_proj"),
            (["--data", "none.json"], "data file none.json does not exist"),
            (["--hparams", "none.yaml"], "hparams file none.yaml does not exist"),
            (["--model", "nowhere"], "model_name: 'nowhere' cannot be loaded"),
        ],
    )
    def test_bad_input_is_one_clear_line(self, tiny, capsys, arguments, message):
        assert kne("localize", "--hparams", "kne.yaml", *arguments, "--out", "out") == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
        assert not (tiny / "out").exists()

    def test_results_of_other_settings_are_not_replaced(self, tiny, capsys):
        assert kne("localize", "--hparams", "kne.yaml", "--out", "out") == 0
        before = read(tiny / "out/ensemble.json")
        assert kne("localize", "--hparams", "kne.yaml", "--set", "p=0.1", "--out", "out") == 1
        assert "out has results of other settings (p: 0.2 there, 0.1 now); name another" in capsys.readouterr().err
        assert read(tiny / "out/ensemble.json") == before
        # Converse: the same again, and what changes no result.
        assert kne("localize", "--hparams", "kne.yaml", "--set", "chunk_rows=1", "lr=0.5", "--out", "out") == 0
        assert kne("localize", "--hparams", "kne.yaml", "--set", "p=0.1", "--shard", "0/2", "--out", "out") == 0
        (tiny / "out/summary.json").write_text("[]")
        assert kne("localize", "--hparams", "kne.yaml", "--out", "out") == 1
        assert "summary.json: no summary of a localisation" in capsys.readouterr().err

    def test_interrupted_and_resumed(self, tiny, monkeypatch, capsys):
        real, calls = localization.attribute_facts, []

        def third_is_interrupted(*arguments, **keywords):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*arguments, **keywords)

        monkeypatch.setattr(localization, "attribute_facts", third_is_interrupted)
        assert kne("localize", "--hparams", "kne.yaml", "--set", "chunk_rows=1", "--out", "out") == 130
        assert "the same command resumes" in capsys.readouterr().err
        assert kne("localize", "--hparams", "kne.yaml", "--set", "chunk_rows=1", "--out", "out") == 0
        assert "(2 attributed now" in capsys.readouterr().out


class TestHydra:
    def test_the_script_does_the_same(self, tiny):
        out = self.run(
            tiny,
            "data=facts.json",
            "size=4",
            "hparams.p=0.2",
            "hparams.attribution_steps=4",
            "hparams.score_scale=none",
        )
        assert "stability" in out
        assert (
            NeuronEnsemble.load("out/ensemble.json").neurons
            == localize(make_llama(), make_tokenizer(), REQUESTS[:4], tiny_hparams()).neurons
        )
        assert is_png(tiny / "out/ensemble.png")

    def test_jobs_of_a_sweep_have_folders_named_by_their_settings(self, tiny):
        """So another sweep leaves the results of the first."""
        self.run(tiny, "data=facts.json", "hparams.attribution_steps=4", "size=2", "hparams.p=0.2,0.1", "-m")
        found = list((tiny / "out").glob("*/ensemble.json"))
        settings = [read(path.with_name("summary.json"))["hparams"] for path in found]
        assert {its["p"] for its in settings} == {0.1, 0.2}
        for path, its in zip(found, settings):
            known = {**its, "target_modules": list(its["target_modules"])}
            decisive = decisive_settings(KNEHyperParams.from_dict(known))
            assert path.parent.name == digest(decisive)[:8] != digest({**decisive, "localization_size": 3})[:8]

    def test_an_unknown_name_is_refused(self, tiny):
        with pytest.raises(AssertionError, match="Could not override 'siez'"):
            self.run(tiny, "siez=4")

    def run(self, folder, *overrides):
        arguments = [
            sys.executable,
            ROOT / "scripts/localize.py",
            "model=model",
            "out=out",
            "hparams.cache_dir=cache",
            *overrides,
        ]
        done = subprocess.run(
            arguments, cwd=folder, capture_output=True, text=True, env=with_same_threads(), timeout=HANGS
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


class TestExplain:
    def test_each_fact_by_itself(self, llama, tokenizer):
        found = explain(llama, tokenizer, REQUESTS, tiny_hparams())
        alone = [localize(llama, tokenizer, [request], tiny_hparams()) for request in REQUESTS]
        assert [ensemble.neurons for ensemble in found.ensembles] == [ensemble.neurons for ensemble in alone]
        for ensemble, best in zip(found.ensembles, found.strongest):
            values = [value for _, value in best]
            assert values == sorted(values, reverse=True) and best[0][0] in ensemble.members()

    def test_collisions_and_hubs(self, llama, tokenizer):
        found = explain(llama, tokenizer, REQUESTS, tiny_hparams())
        shares, sets = found.collisions(), [ensemble.members() for ensemble in found.ensembles]
        assert all(shares[i][i] == 1 for i in range(len(sets)))
        assert shares[0][1] == len(sets[0] & sets[1]) / len(sets[0]) < 1
        for neuron, count in found.hubs():
            assert count == sum(neuron in members for members in sets) >= 2
        assert found.hubs()[0][1] == max(count for _, count in found.hubs())

    def test_command_writes_and_prints(self, tiny, capsys):
        arguments = [
            "explain",
            "--hparams",
            "kne.yaml",
            "--prompt",
            "Ada spoken in",
            "--target",
            "Latin",
            "--data",
            "facts.json",
            "--size",
            "5",
        ]
        assert kne(*arguments, "--out", "out") == 0
        out, content = capsys.readouterr().out, read(tiny / "out/explanation.json")
        assert [fact["target_new"] for fact in content["facts"]] == ["Latin", *(r["target_new"] for r in REQUESTS)]
        assert len(content["collisions"]["shares"]) == 6 and content["collisions"]["shares"][2][2] == 1
        assert content["facts"][0]["neurons"] == sum(
            len(rows) for rows in content["facts"][0]["rows"][LLAMA_DOWN].values()
        )
        assert is_png(tiny / "out/explanation.png")
        assert "Ada spoken in  ->  Latin" in out and "Collisions: on average" in out

    def test_a_single_fact(self, tiny, capsys):
        assert (
            kne("explain", "--hparams", "kne.yaml", "--prompt", "Ada spoken in", "--target", "Latin", "--out", "out")
            == 0
        )
        assert "Collisions" not in capsys.readouterr().out
        assert is_png(tiny / "out/explanation.png")

    def test_half_a_fact_is_refused(self, tiny, capsys):
        assert kne("explain", "--hparams", "kne.yaml", "--prompt", "Ada", "--out", "out") == 1
        assert "--prompt and --target belong together" in capsys.readouterr().err


class TestCacheCommand:
    @pytest.fixture
    def filled(self, tiny, capsys):
        """Three facts of one model, two of another."""
        assert kne("localize", "--hparams", "kne.yaml", "--size", "3", "--out", "out") == 0
        make_llama(seed=2).save_pretrained(tiny / "other")
        make_tokenizer().save_pretrained(tiny / "other")
        assert kne("localize", "--hparams", "kne.yaml", "--model", "other", "--size", "2", "--out", "2") == 0
        capsys.readouterr()
        return list(entry_files("cache"))

    def test_info(self, filled, capsys):
        assert kne("cache", "info", "--cache-dir", "cache") == 0
        out = capsys.readouterr().out
        assert "5 entries" in out and out.count(f"{LLAMA_DOWN}, riemann, m = 4, 4 layers") == 2
        assert "model" in out and "other" in out and filled[0].parent.name in out

    def test_info_of_an_empty_cache(self, tiny, capsys, monkeypatch):
        monkeypatch.setenv("KNE_CACHE", str(tiny / "nothing"))
        assert kne("cache", "info") == 0
        assert "0 entries, 0 B in all" in capsys.readouterr().out

    @pytest.mark.parametrize("command", ["info", "verify", "prune --all"])
    def test_a_folder_that_is_no_cache_is_not_sound(self, command, tmp_path, capsys):
        assert kne("cache", *command.split(), "--cache-dir", str(tmp_path / "mistyped")) == 1
        assert "--cache-dir: " in (said := capsys.readouterr().err) and "mistyped: no score cache; it has no" in said

    def test_verify_finds_the_damaged_one(self, filled, capsys):
        assert kne("cache", "verify", "--cache-dir", "cache") == 0
        assert "5 of 5 entries are sound" in capsys.readouterr().out
        self.damage(filled[1])
        assert kne("cache", "verify", "--cache-dir", "cache") == 1
        out = capsys.readouterr().out
        assert "4 of 5 entries are sound" in out and f"damaged: {filled[1]}" in out

    def test_prune_damaged(self, filled, capsys):
        self.damage(filled[1])
        assert kne("cache", "prune", "--damaged", "--dry-run", "--cache-dir", "cache") == 0
        assert "1 entries" in capsys.readouterr().out and list(entry_files("cache")) == filled
        assert kne("cache", "prune", "--damaged", "--cache-dir", "cache") == 0
        assert list(entry_files("cache")) == filled[:1] + filled[2:]

    def test_prune_torn_files(self, filled, capsys):
        """A process killed while it wrote leaves a hidden file; a young one may still be written."""
        torn = [filled[0].with_name(f".{name}.tmp") for name in ("old", "young")]
        for path in torn:
            path.write_bytes(b"half")
        os.utime(torn[0], (0, 0))
        assert kne("cache", "prune", "--damaged", "--cache-dir", "cache") == 0
        assert not torn[0].exists() and torn[1].exists() and list(entry_files("cache")) == filled

    def test_prune_by_age_and_model(self, filled, capsys):
        os.utime(filled[0], (0, 0))
        assert kne("cache", "prune", "--older-than", "30", "--cache-dir", "cache") == 0
        assert list(entry_files("cache")) == filled[1:]
        digest = filled[1].parent.name
        assert kne("cache", "prune", "--model", digest[:6], "--cache-dir", "cache") == 0
        assert list(entry_files("cache")) == [path for path in filled[1:] if path.parent.name != digest]
        assert kne("cache", "prune", "--all", "--cache-dir", "cache") == 0
        assert list(entry_files("cache")) == [] and not list(Path("cache/scores").iterdir())

    def test_prune_wants_to_know_what(self, filled, capsys):
        with pytest.raises(SystemExit):
            kne("cache", "prune", "--cache-dir", "cache")
        assert kne("cache", "prune", "--model", "abcdef", "--cache-dir", "cache") == 1
        assert "no such model" in capsys.readouterr().err
        assert list(entry_files("cache")) == filled

    @pytest.mark.parametrize(
        "command", ["info", "verify", "prune --older-than 1", "prune --damaged", "prune --all", "merge"]
    )
    def test_an_entry_that_another_process_removes_meanwhile(self, filled, monkeypatch, command):
        gone = [filled[0].with_name("gone.safetensors"), *filled]
        monkeypatch.setattr("kne_easyedit.attribution.score_cache.entry_files", lambda folder=None: iter(gone))
        into = ["cache", "--cache-dir", "others"] if command == "merge" else ["--cache-dir", "cache"]
        assert kne("cache", *command.split(), *into) == 0

    def damage(self, path):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)


def test_a_study_of_scores_from_the_cache_is_bit_by_bit_the_same(llama, tokenizer):
    first, second = (study(llama, tokenizer, REQUESTS, tiny_hparams()) for _ in range(2))
    assert torch.equal(first.scores[LLAMA_DOWN], second.scores[LLAMA_DOWN])
    assert first.ensemble == second.ensemble and second.computed == 0
