"""The cache under real processes: killed at the worst moments and resumed, or two at once on the same facts.

This file is also the script that those processes run (`main`).
"""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FACTS, LLAMA_DOWN, make_llama, make_tokenizer, tiny_hparams

from kne_easyedit import localization, paths
from kne_easyedit.attribution import attribute_facts
from kne_easyedit.cache import entry_files, read_entry
from kne_easyedit.localization import localize

MORE = (("The capital of Spain is", "Madrid"), ("The mother of Ada is", "Marie ."), ("Lima flows", "Oslo"))
REQUESTS = [{"prompt": prompt, "target_new": target} for prompt, target in (*FACTS, *MORE)]
HPARAMS = tiny_hparams(chunk_rows=1)  # each fact is a sweep of its own, stored at once, with the same bits in any company


# In the processes


def main(plan: dict) -> None:
    """One localisation. ``plan``: its layers, and whether to die or to wait for the other at the k-th time of some moment."""
    torch.set_num_threads(1)
    attributed, reach = [], {"die": die, "wait": wait, None: None}[plan["then"]]

    def recording(model, targets, facts, *args, **kwargs):
        attributed.extend(fact.prompt for fact in facts)
        if plan["moment"] == "attribution" and len(attributed) == plan["k"]:
            before_call(torch.autograd, "grad", 2, reach)
        return attribute_facts(model, targets, facts, *args, **kwargs)

    localization.attribute_facts = recording
    if plan["moment"] == "half the file":
        before_call(paths, "open", plan["k"], lambda: setattr(paths, "open", lambda path, mode: Half(path, "x")))
    elif plan["moment"] == "before the sync":
        before_call(os, "fsync", plan["k"], reach)
    elif plan["moment"] == "before the rename":
        before_call(os, "replace", plan["k"], reach)
    elif plan["moment"] == "after the rename":
        after_call(os, "replace", plan["k"], reach)
    model, tokenizer, hparams = make_llama(), make_tokenizer(), replace(HPARAMS, layers=plan["layers"])
    wait()
    found = localize(model, tokenizer, REQUESTS, hparams)
    print(json.dumps({"attributed": attributed, "found": described(found)}))


def before_call(owner, name, k, act):
    """Does ``act`` before the ``k``-th call of ``owner.name``."""
    own, calls = getattr(owner, name, open), []

    def wrapper(*args, **kwargs):
        calls.append(args)
        if len(calls) == k:
            act()
            return getattr(owner, name)(*args, **kwargs) if getattr(owner, name) is not wrapper else own(*args, **kwargs)
        return own(*args, **kwargs)

    setattr(owner, name, wrapper)


def after_call(owner, name, k, act):
    own, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        own(*args, **kwargs)
        calls.append(args)
        if len(calls) == k:
            act()

    setattr(owner, name, wrapper)


class Half(io.FileIO):
    """A file that the process does not live to finish."""

    def write(self, content):
        super().write(content[: len(content) // 2])
        die()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def wait():
    """Says that it waits, and goes on when told to."""
    print("waiting", flush=True)
    sys.stdin.readline()


def described(ensemble) -> dict:
    """All of an ensemble but the time it took, as JSON has it."""
    return json.loads(json.dumps({**vars(ensemble), "seconds": None}))


# In the tests


class Child:
    """A process that has imported everything and waits for `go`."""

    def __init__(self, folder: Path, moment=None, k=0, then=None, layers=()):
        plan = json.dumps({"moment": moment, "k": k, "then": then, "layers": list(layers)})
        folder.mkdir(exist_ok=True)
        environment = {**os.environ, "KNE_CACHE": str(folder / "cache"), "PYTHONPATH": str(Path(paths.__file__).parents[1])}
        self.process = subprocess.Popen(
            [sys.executable, __file__, plan], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
        )

    def waits(self) -> None:
        assert self.process.stdout.readline() == "waiting\n"

    def go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> dict:
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return json.loads(out)


@pytest.fixture
def children(tmp_path):
    """Starts processes that share a cache; none outlives the test."""
    started = []

    def start(**plan):
        started.append(Child(tmp_path, **plan))
        return started[-1]

    yield start
    for child in started:
        child.process.kill()
        child.process.communicate()


@pytest.fixture
def uninterrupted(tmp_path):
    """The ensemble of one run in an empty cache, here, and the scores of each fact."""

    def run(layers=()):
        folder = tmp_path / f"alone{list(layers)}"
        found = localize(make_llama(), make_tokenizer(), REQUESTS, replace(HPARAMS, cache_dir=str(folder), layers=list(layers)))
        return described(found), scores_in(folder)

    return run


def scores_in(folder) -> dict:
    """Prompt -> scores, of all entries; every one of them must be sound."""
    return {entry.prompt: entry.scores.clone() for entry in map(read_entry, entry_files(folder))}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[prompt], other[prompt]) for prompt in one)


def unfinished(folder) -> list:
    """What lies there beside entries."""
    return [path for path in folder.rglob("*") if path.is_file() and path not in set(entry_files(folder))]


class TestKilled:
    """By SIGKILL, which nothing can catch, at the third of six facts."""

    @pytest.mark.parametrize(
        ("moment", "stored", "left"),
        [
            ("attribution", 2, 0),
            ("half the file", 2, 1),
            ("before the sync", 2, 1),
            ("before the rename", 2, 1),
            ("after the rename", 3, 0),
        ],
    )
    def test_is_resumed(self, children, uninterrupted, tmp_path, moment, stored, left):
        victim, heir = children(moment=moment, k=3, then="die"), children()  # the heir imports meanwhile, and waits
        alone, alone_scores = uninterrupted()
        order = sorted(alone_scores, key=lambda prompt: prompt)
        victim.waits()
        victim.go()
        assert victim.process.wait(timeout=60) == -signal.SIGKILL

        cache = tmp_path / "cache"
        before = scores_in(cache)
        assert len(before) == stored
        assert all(torch.equal(scores, alone_scores[prompt]) for prompt, scores in before.items())
        assert len(unfinished(cache)) == left
        assert not any(path.name.endswith(".safetensors") or not path.name.startswith(".") for path in unfinished(cache))

        heir.waits()
        heir.go()
        result = heir.result()
        assert sorted(result["attributed"]) == [prompt for prompt in order if prompt not in before]
        assert result["found"] == alone
        assert equal(scores_in(cache), alone_scores)
        assert len(unfinished(cache)) == left, "the dead one's file, and none of the heir's"


class TestAtOnce:
    @pytest.mark.parametrize("moment", ["attribution", "before the rename"])
    def test_on_the_same_facts(self, children, uninterrupted, tmp_path, moment):
        """Both are at the first fact before either goes on: they do the same work and write the same file."""
        both = [children(moment=moment, k=1, then="wait") for _ in range(2)]
        alone, alone_scores = uninterrupted()
        for meeting in ("loaded", moment):
            for child in both:
                child.waits()
            for child in both:
                child.go()
        results = [child.result() for child in both]
        assert [result["found"] for result in results] == [alone, alone]
        first, second = (result["attributed"] for result in results)
        assert first[0] == second[0], "they did meet"
        assert {*first, *second} == alone_scores.keys() and all(len(set(done)) == len(done) for done in (first, second))
        assert equal(scores_in(tmp_path / "cache"), alone_scores)
        assert unfinished(tmp_path / "cache") == []

    def test_on_other_layers_of_the_same_facts(self, children, uninterrupted, tmp_path):
        """Both merge into an entry that they saw missing: one overwrites the other, whose layers are computed again."""
        parts = ([0, 1], [2, 3])
        both = [children(moment="before the rename", k=1, then="wait", layers=layers) for layers in parts]
        alone = [uninterrupted(layers)[0] for layers in parts]
        for meeting in ("loaded", "renaming"):
            for child in both:
                child.waits()
            for child in both:
                child.go()
        results = [child.result() for child in both]
        assert [result["found"] for result in results] == alone
        assert alone[0]["neurons"][LLAMA_DOWN].keys() != alone[1]["neurons"][LLAMA_DOWN].keys()
        done = [result["attributed"] for result in results]
        assert done[0][0] == done[1][0] and len(done[0]) + len(done[1]) > 2 * len(REQUESTS), "something was overwritten"
        assert len(scores_in(tmp_path / "cache")) == len(REQUESTS)
        assert unfinished(tmp_path / "cache") == []


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
