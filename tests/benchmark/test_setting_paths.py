"""Paths in settings: relative to where the command was given, and known by what they hold."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_llama, make_tokenizer, tiny_hparams
from methods import settings

from kne_easyedit._util.files import expand_path
from kne_easyedit._util.settings import path_settings, resolve_paths
from kne_easyedit.benchmark import Run
from kne_easyedit.benchmark.job import fingerprint
from kne_easyedit.bridge import TextSource
from kne_easyedit.models.loading import load_model


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("STATS", "some/where")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("stats", "stats"),
        ("./data/../stats", "data/../stats"),
        ("~/stats", "home/stats"),
        ("$STATS/x", "some/where/x"),
        ("${STATS}", "some/where"),
    ],
)
def test_what_a_path_means(here, given, meant):
    assert expand_path(given) == here / meant


def test_which_settings_are_paths(here):
    hparams = SimpleNamespace(
        ensemble="e.json",
        kl_data="kl.json",
        localization_data="embedded",
        cache_dir=None,
        stats_dir="./data/stats",
        P_loc="p.pt",
        save_path="",
        archive="~/a",
        results_dir="$STATS",
        state_dict_file="https://a.b/c",
        contriver_dir="facebook/contriever",
        model_name="./gpt/llama",
        mom2_dataset="wikipedia",
        target_modules=["x"],
        device="cpu",
    )
    before = dict(vars(hparams))
    resolve_paths(hparams)
    changed = {name: value for name, value in vars(hparams).items() if value != before[name]}
    assert changed == {
        "ensemble": f"{here}/e.json",
        "kl_data": f"{here}/kl.json",
        "stats_dir": f"{here}/data/stats",
        "P_loc": f"{here}/p.pt",
        "archive": f"{here}/home/a",
        "results_dir": f"{here}/some/where",
    }
    again = dict(vars(hparams))
    resolve_paths(hparams)
    assert vars(hparams) == again


def test_every_setting_of_kne_that_is_a_path_is_known(here):
    found = path_settings(tiny_hparams(localization_data="a", ensemble="b", cache_dir="c", kl_data="d"))
    assert found == {"localization_data": "a", "ensemble": "b", "cache_dir": "c", "kl_data": "d"}


def test_second_moments_of_the_users_own_count_by_what_they_hold(here):
    """EasyEdit's files serve where they lie: other ones give other edits. Their folder's name says nothing."""
    model = make_llama()
    model.config._name_or_path = "some/tiny"
    job = Run(model, make_tokenizer(), [], {"MEMIT": settings("MEMIT", stats_dir="stats")}, "d", here)
    none = fingerprint(job, "MEMIT", [], None)
    path = here / "stats/tiny/wikipedia_stats/model.layers.1.mlp.down_proj_float32_mom2_7.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"one")
    one = fingerprint(job, "MEMIT", [], None)
    path.write_bytes(b"two")
    two = fingerprint(job, "MEMIT", [], None)
    assert len({none, one, two}) == 3
    (here / "stats").rename(here / "elsewhere")
    job.hparams = {"MEMIT": settings("MEMIT", stats_dir=str(here / "elsewhere"))}
    assert fingerprint(job, "MEMIT", [], None) == two


def test_a_text_for_second_moments_is_found_from_another_folder(here, monkeypatch):
    (here / "text.txt").write_text("The capital of France is Rome\n")
    source = TextSource(Path("text.txt"))
    (here / "below").mkdir()
    monkeypatch.chdir(here / "below")
    assert source.digest().startswith("file-")


def test_a_model_in_the_home_folder(here):
    make_llama().save_pretrained(here / "home/tiny-model")
    make_tokenizer().save_pretrained(here / "home/tiny-model")
    model, _ = load_model(SimpleNamespace(model_name="~/tiny-model", device="cpu"))
    assert model.config._name_or_path == f"{here}/home/tiny-model"
