"""Files of second moments that are damaged, written by several at once, or asked for after edits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import LLAMA_DOWN, make_llama, make_tokenizer
from methods import NAME, edit_inputs, in_tmp, records, settings, tokenizer_for  # noqa: F401  (in_tmp is a fixture)

from kne_easyedit import bridge
from kne_easyedit._util import files as own_files
from kne_easyedit.bridge import MethodEditor
from kne_easyedit.bridge import second_moments as statistics
from kne_easyedit.bridge.second_moments import Wanted, files_of, known_weights, second_moments
from kne_easyedit.bridge.text_source import TextSource

SMALL = TextSource(samples=6, length=8)
MODULE = LLAMA_DOWN.format(1)
WANTED = Wanted([MODULE], Path("stats"), "wikipedia", "float64", 7)


@pytest.fixture
def model():
    model = make_llama()
    model.config._name_or_path = NAME
    return model


def found(model, source: TextSource = SMALL) -> Path:
    """The file that a method is given."""
    (file,) = files_of(model, make_tokenizer(), known_weights(model), WANTED, source)
    return file.path


def moments_in(path: Path) -> torch.Tensor:
    with numpy.load(path) as stored:
        return torch.from_numpy(stored["mom2.mom2"])


# Written


@pytest.fixture
def write(model, monkeypatch):
    """Writes ready moments to ``target``."""
    ready = second_moments(model, [[1, 2, 3]], [MODULE], torch.float64)
    monkeypatch.setattr(statistics, "second_moments", lambda *args: ready)
    monkeypatch.setattr(statistics, "logger", SimpleNamespace(warning=lambda *args: None))
    monkeypatch.setattr(TextSource, "texts", lambda *args: [])

    def write() -> torch.Tensor:
        statistics._compute(model, make_tokenizer(), {MODULE: target()}, torch.float64, 7, SMALL)
        return ready[MODULE][1]

    return write


def target() -> Path:
    return Path("stats/x_stats") / f"{MODULE}_float64_mom2_7.npz"


def test_a_kill_in_the_middle_of_writing_leaves_no_half_file(write, monkeypatch):
    """A child is killed before its file is on the disk; the next who asks makes a whole one."""
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(own_files.os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
            write()
        finally:
            os._exit(1)  # not reached: it is killed
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(list(target().parent.iterdir())) == 1
    assert not target().exists()
    expected = write()
    assert torch.equal(moments_in(target()), expected)


def test_two_with_one_process_number_may_write_one_file(write, monkeypatch):
    """As in two containers on one folder."""
    save, begun = numpy.savez, []

    def both(file, **arrays):
        save(file, **arrays)
        if not begun:
            begun.append(1)
            write()

    monkeypatch.setattr(numpy, "savez", both)
    expected = write()
    assert begun and torch.equal(moments_in(target()), expected)
    assert list(target().parent.iterdir()) == [target()]


# Damaged


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """One byte within the moments."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def emptied(content: bytes) -> bytes:
    return b""


DAMAGES = [cut, flipped, emptied]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_ours_is_made_anew_with_a_warning(model, caplog, damage):
    path = found(model)
    moments = moments_in(path)
    content = path.read_bytes()
    caplog.clear()
    assert found(model) == path and not caplog.text  # converse
    path.write_bytes(damage(content))
    assert found(model) == path
    assert f"{path} cannot be read (" in caplog.text and "is made anew" in caplog.text
    assert torch.equal(moments_in(path), moments)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_the_users_is_refused_by_name(model, damage):
    own = Path("stats") / NAME / "wikipedia_stats" / f"{MODULE}_float64_mom2_7.npz"
    own.parent.mkdir(parents=True)
    content = found(model).read_bytes()
    own.write_bytes(content)
    assert found(model) == own  # converse
    own.write_bytes(damage(content))
    with pytest.raises(ValueError, match=rf"stats_dir: {own} cannot be read .*; replace it, or delete it or move it"):
        found(model)
    assert own.read_bytes() == damage(content)


def test_a_file_of_something_else_is_refused_by_name(model):
    own = Path("stats") / NAME / "wikipedia_stats" / f"{MODULE}_float64_mom2_7.npz"
    own.parent.mkdir(parents=True)
    numpy.savez(own, **{"mom2.mom2": numpy.eye(40)})
    with pytest.raises(ValueError, match=r"cannot be read \(mom2.count is not in it\)"):
        found(model)


# After edits


def test_the_moments_are_those_of_the_unedited_model_whatever_is_kept_and_undone(model, monkeypatch):
    """An edit that stays, one on top of it that is undone, and one more."""
    hparams = settings("MEMIT", layers=[1])
    editor = bridge.editor_for(hparams, model, tokenizer_for(hparams))
    stays = {"keep_original_weight": False} if bridge.is_legacy() else {"sequential_edit": True}
    before = statistics.checksums(model)
    editor.edit(**edit_inputs(records()[:1]), **stays)
    kept = statistics.checksums(model)
    monkeypatch.setattr(statistics, "second_moments", lambda *args: pytest.fail("made again"))
    editor.edit(**edit_inputs(records()[1:]), keep_original_weight=True)
    assert statistics.checksums(model) == kept != before
    assert len(list(Path("stats").iterdir())) == 1


def test_other_weights_are_another_model(model):
    """Converse: those that no edit has left."""
    hparams = settings("MEMIT", layers=[1])
    editor = MethodEditor(hparams, model, tokenizer_for(hparams))
    editor.apply(records()[:1])
    editor.undo()
    with torch.no_grad():
        model.get_submodule(MODULE).weight.mul_(1.001)
    editor.apply(records()[:1])
    assert len(list(Path("stats").iterdir())) == 2
