"""The cache under real processes: killed at the worst moments and resumed, or two at once on the same facts."""

import errno
import fcntl
import io
import multiprocessing
import os
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import FACTS, HANGS, LLAMA_DOWN, THREADS, make_llama, make_tokenizer, tiny_hparams

from kne_easyedit._util import files as paths
from kne_easyedit._util.claims import FILE
from kne_easyedit.attribution.engine import attribute_facts
from kne_easyedit.attribution.score_cache import entry_files, read_entry
from kne_easyedit.localization import localizer as localization
from kne_easyedit.localization.localizer import localize

MORE = (("The capital of Spain is", "Madrid"), ("The mother of Ada is", "Marie ."), ("Lima flows", "Oslo"))
REQUESTS = [{"prompt": prompt, "target_new": target} for prompt, target in (*FACTS, *MORE)]
HPARAMS = tiny_hparams(chunk_rows=1)  # each fact is its own sweep, stored at once, with the same bits every time
PATIENCE = HANGS


# In the processes


def main(connection, folder: Path, layers=(), moment=None, k=1, then=None, locks=True) -> None:
    """One localisation. It dies, or waits for the other (``then``), when ``moment`` comes for the ``k``-th time."""
    torch.set_num_threads(THREADS)  # as in the tests: their scores must have the same bits
    if not locks:
        fcntl.lockf = without_locks
    attributed = []

    def wait():
        connection.send("waiting")
        connection.recv()

    def recording(model, targets, facts, *args, **kwargs):
        attributed.extend(fact.prompt for fact in facts)
        return attribute_facts(model, targets, facts, *args, **kwargs)

    localization.attribute_facts = recording
    act = {"die": die, "wait": wait}.get(then)
    if moment == "attribution":
        intercept(localization, "attribute_facts", k, before=lambda: intercept(torch.autograd, "grad", 2, before=act))
    elif moment == "half the file":
        opened, own = count(1), Path.open
        Path.open = lambda path, mode="r", *args, **kwargs: (
            Half(path, "x") if mode == "xb" and next(opened) == k else own(path, mode, *args, **kwargs)
        )
    elif moment == "before the sync":
        intercept(os, "fsync", k, before=act)
    elif moment == "before the rename":
        intercept(os, "replace", k, before=act)
    elif moment == "after the rename":
        intercept(os, "replace", k, after=act)
    model, tokenizer, hparams = (
        make_llama(),
        make_tokenizer(),
        replace(HPARAMS, layers=list(layers), cache_dir=str(folder)),
    )
    wait()
    connection.send((attributed, replace(localize(model, tokenizer, REQUESTS, hparams), seconds=None)))


def without_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def intercept(owner, name, k, before=None, after=None):
    """Does something before or after the ``k``-th call of ``owner.name``."""
    own, calls = getattr(owner, name), count(1)

    def wrapper(*args, **kwargs):
        now = next(calls) == k
        if now and before:
            before()
        result = own(*args, **kwargs)
        if now and after:
            after()
        return result

    setattr(owner, name, wrapper)


class Half(io.FileIO):
    """A file that the process does not live to finish."""

    def write(self, content):
        super().write(content[: len(content) // 2])
        die()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# In the tests


@pytest.fixture(scope="module")
def processes():
    """Fresh processes out of one that has imported everything and done nothing: imports would take most of the time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as monkeypatch:
        here, package = Path(__file__), Path(paths.__file__)
        found_in = (here.parent, here.parents[1], package.parents[2])  # this module, conftest, the package
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, found_in)))
        first = context.Process(target=int)
        first.start()  # and with it the one they all come from
        first.join()
    return context


class Child:
    """A process that waits for `go` before it localises."""

    def __init__(self, context, folder: Path, **plan):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=main, args=(theirs, folder), kwargs=plan)
        self.process.start()
        theirs.close()

    def receive(self):
        assert self.connection.poll(PATIENCE), "the process hangs"
        return self.connection.recv()

    def go(self) -> None:
        self.connection.send("go")

    def end(self) -> int:
        self.process.join(PATIENCE)
        return self.process.exitcode


@pytest.fixture
def start(processes, tmp_path):
    """Starts processes that share a cache; none outlives the test."""
    children = []

    def start(**plan):
        children.append(Child(processes, tmp_path / "cache", **plan))
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.process.join()


@pytest.fixture
def uninterrupted(tmp_path):
    """The ensemble of one run in an empty cache, here, and the scores of each fact."""

    def run(layers=()):
        folder = tmp_path / f"alone{list(layers)}"
        found = localize(
            make_llama(), make_tokenizer(), REQUESTS, replace(HPARAMS, cache_dir=str(folder), layers=list(layers))
        )
        return replace(found, seconds=None), scores_in(folder)

    return run


def scores_in(folder) -> dict:
    """Prompt -> scores, of all entries; every one of them must be sound."""
    return {entry.prompt: entry.scores.clone() for entry in map(read_entry, entry_files(folder))}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[prompt], other[prompt]) for prompt in one)


def unfinished(folder) -> list:
    """What lies there beside entries and the file of claims."""
    known = {*entry_files(folder), *folder.rglob(FILE)}
    return [path for path in folder.rglob("*") if path.is_file() and path not in known]


def meet(children) -> None:
    """Lets them go on only when all of them wait."""
    assert [child.receive() for child in children] == ["waiting"] * len(children)
    for child in children:
        child.go()


class TestKilled:
    """By SIGKILL, which nothing can catch, at one of six facts."""

    @pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(6, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(
        ("moment", "left"),
        [
            ("attribution", 0),
            ("half the file", 1),
            ("before the sync", 1),
            ("before the rename", 1),
            ("after the rename", 0),
        ],
    )
    def test_is_resumed(self, start, uninterrupted, tmp_path, moment, left, k):
        victim, cache = start(moment=moment, k=k, then="die"), tmp_path / "cache"
        alone, alone_scores = uninterrupted()
        meet([victim])
        assert victim.end() == -signal.SIGKILL

        before = scores_in(cache)
        assert len(before) == (k if moment == "after the rename" else k - 1)
        assert all(torch.equal(scores, alone_scores[prompt]) for prompt, scores in before.items())
        assert len(unfinished(cache)) == left
        assert all(path.name.startswith(".") and path.suffix == ".tmp" for path in unfinished(cache))

        heir = start()
        meet([heir])
        attributed, found = heir.receive()
        assert heir.end() == 0
        assert sorted(attributed) == sorted(alone_scores.keys() - before.keys())
        assert found == alone
        assert equal(scores_in(cache), alone_scores)
        assert len(unfinished(cache)) == left, "the dead one's file, and none of the heir's"

    def test_again_and_again(self, start, uninterrupted, tmp_path):
        """Every process stores one fact and dies at the next: the last finds them all."""
        alone, alone_scores = uninterrupted()
        for stored in range(1, len(REQUESTS)):
            victim = start(moment="before the rename", k=2, then="die")
            meet([victim])
            assert victim.end() == -signal.SIGKILL
            assert len(scores_in(tmp_path / "cache")) == stored
        last = start()
        meet([last])
        attributed, found = last.receive()
        assert len(attributed) == 1 and found == alone
        assert equal(scores_in(tmp_path / "cache"), alone_scores)

    def test_unless_it_is_not_reached(self, start, tmp_path):
        """Converse: a seventh fact there is not, and the process lives."""
        survivor = start(moment="before the rename", k=len(REQUESTS) + 1, then="die")
        meet([survivor])
        assert len(survivor.receive()[0]) == len(REQUESTS)
        assert survivor.end() == 0 and unfinished(tmp_path / "cache") == []


class TestAtOnce:
    @pytest.mark.parametrize("moment", ["attribution", "before the sync", "before the rename"])
    def test_on_the_same_facts(self, start, uninterrupted, tmp_path, moment):
        """Both are at work before either goes on: each at a fact of its own, and none is done twice."""
        alone, alone_scores = uninterrupted()
        both = [start(moment=moment, then="wait") for _ in range(2)]
        meet(both)
        meet(both)
        (first, found), (second, found_too) = [child.receive() for child in both]
        assert [child.end() for child in both] == [0, 0]
        assert found == found_too == alone
        assert first and second and sorted([*first, *second]) == sorted(alone_scores)
        assert equal(scores_in(tmp_path / "cache"), alone_scores)
        assert unfinished(tmp_path / "cache") == []

    @pytest.mark.parametrize("moment", ["attribution", "before the rename"])
    def test_where_there_are_no_locks_the_same_work_is_done_twice(self, start, uninterrupted, tmp_path, moment):
        """Converse; it changes no bit. Both are at the first fact before either goes on, and write the same file."""
        alone, alone_scores = uninterrupted()
        both = [start(moment=moment, then="wait", locks=False) for _ in range(2)]
        meet(both)
        meet(both)
        (first, found), (second, found_too) = [child.receive() for child in both]
        assert [child.end() for child in both] == [0, 0]
        assert found == found_too == alone
        assert first[0] == second[0], "they did meet"
        assert {*first, *second} == alone_scores.keys() and all(len(set(done)) == len(done) for done in (first, second))
        assert equal(scores_in(tmp_path / "cache"), alone_scores)
        assert unfinished(tmp_path / "cache") == []

    def test_left_to_themselves(self, start, uninterrupted, tmp_path):
        """Four, and nothing but the start in common."""
        alone, alone_scores = uninterrupted()
        all_ = [start() for _ in range(4)]
        meet(all_)
        found = [child.receive() for child in all_]
        assert [ensemble for _, ensemble in found] == [alone] * 4
        assert sorted(prompt for attributed, _ in found for prompt in attributed) == sorted(alone_scores)
        assert [child.end() for child in all_] == [0] * 4
        assert equal(scores_in(tmp_path / "cache"), alone_scores)
        assert unfinished(tmp_path / "cache") == []

    def test_on_other_layers_of_the_same_facts(self, start, uninterrupted, tmp_path):
        """They merge into the same entries, one after the other: none overwrites what it has not seen."""
        parts = ([0, 1], [2, 3])
        alone = [uninterrupted(layers)[0] for layers in parts]
        both = [start(moment="before the rename", then="wait", layers=layers) for layers in parts]
        meet(both)
        meet(both)
        (first, found), (second, found_too) = [child.receive() for child in both]
        assert [child.end() for child in both] == [0, 0]
        assert [found, found_too] == alone
        assert found.neurons[LLAMA_DOWN].keys() != found_too.neurons[LLAMA_DOWN].keys()
        assert len(first) == len(second) == len(REQUESTS), "nothing was computed twice"
        assert len(scores_in(tmp_path / "cache")) == len(REQUESTS)
        assert unfinished(tmp_path / "cache") == []

    def test_when_one_is_killed(self, start, uninterrupted, tmp_path):
        """The other neither waits for it nor reads what it left half done."""
        alone, alone_scores = uninterrupted()
        both = [start(moment="half the file", k=2, then="die"), start()]
        meet(both)
        assert both[1].receive()[1] == alone
        assert [child.end() for child in both][1] == 0
        assert equal(scores_in(tmp_path / "cache"), alone_scores)
