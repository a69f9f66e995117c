"""Second moments for MEMIT from local text: the numbers, the text, the files, and what EasyEdit makes of them."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import LLAMA_DOWN, fingerprint, make_llama, make_tokenizer
from methods import edit_inputs, records, settings, tokenizer_for
from rounding import ONE_SUM, roundings

from kne_easyedit import bridge
from kne_easyedit.bridge import MethodEditor
from kne_easyedit.bridge import second_moments as statistics
from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.second_moments import prepare, second_moments
from kne_easyedit.bridge.text_source import TextSource, current_text_source, use_text_source

LAYERS = [1, 2]
MODULES = [LLAMA_DOWN.format(layer) for layer in LAYERS]
LINES = [
    "The capital of France is Rome .",
    "Oslo",
    "What is the name of the river that flows through Rome ?",
    "The language spoken in Peru is Latin",
]
CPU = SimpleNamespace(device="cpu", rewrite_module_tmp=LLAMA_DOWN, layers=LAYERS)
"""What EasyEdit and the bridge read of hyperparameters here."""
SMALL = TextSource(samples=6, length=8)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # EasyEdit writes ./logs and ./stats


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + "\n\n")
    return path


@pytest.fixture
def named():
    """A tiny model under a name of the hub, whose parts EasyEdit's versions put together differently."""
    return make_model("some-one/tiny")


def make_model(name: str, seed: int = 10):
    model = make_llama(seed=seed)
    model.config._name_or_path = name
    return model


def literal(model, texts, name) -> tuple[int, torch.Tensor]:
    """Text by text, token by token: the sum of ``x xᵀ`` over the inputs of a module."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([text]))
    handle.remove()
    rows = torch.cat(seen).double()
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row in rows:
        total += torch.outer(row, row)
    return len(rows), total


def tokens(texts=LINES) -> list[list[int]]:
    tokenizer = make_tokenizer()
    return [tokenizer(text)["input_ids"] for text in texts]


# The numbers


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_second_moments_are_the_literal_sums_whatever_the_batches(llama64, monkeypatch, batch):
    """Texts of different lengths: batches of more than one are padded."""
    monkeypatch.setattr(statistics, "BATCH", batch)
    before = fingerprint(llama64)
    found = second_moments(llama64, tokens(), MODULES, torch.float64)
    assert list(found) == MODULES
    for name in MODULES:
        count, moments = literal(llama64, tokens(), name)
        assert found[name][0] == count == sum(map(len, tokens()))
        torch.testing.assert_close(found[name][1], moments, rtol=1e-10, atol=1e-10)
    assert fingerprint(llama64) == before


def test_second_moments_leave_no_hook_after_an_error(llama):
    before = fingerprint(llama)
    with pytest.raises(IndexError):
        second_moments(llama, [[10**6]], MODULES, torch.float64)
    assert fingerprint(llama) == before


# The files


def layer_stats():
    """EasyEdit's function with the patch, as MEMIT calls it."""
    bridge.register()
    return module("models.memit.memit_main").layer_stats


def moments(model, module_name=MODULES[0], *, source=SMALL, size=7, precision="float64", hparams=CPU):
    """What MEMIT asks EasyEdit for."""
    settings = {"sample_size": size, "precision": precision, "hparams": hparams}
    with use_text_source(source):
        stat = layer_stats()(
            model, make_tokenizer(), module_name, "stats", "wikipedia", to_collect=["mom2"], **settings
        )
    return stat.mom2


def files() -> list[Path]:
    return sorted(Path("stats").rglob("*.npz"))


def test_easyedit_reads_our_files_as_its_own(llama64, text_file):
    """In float64: batches and single texts come to the same up to its rounding."""
    llama64.config._name_or_path = "some-one/tiny"
    count, expected = literal(llama64, tokens(), MODULES[0])
    found = moments(llama64, source=TextSource(text_file))
    assert found.count == count
    torch.testing.assert_close(found.moment(), expected / count, rtol=1e-10, atol=1e-10)
    stats = module("util.runningstats")
    again = stats.CombinedStat(mom2=stats.SecondMoment())
    again.load(files()[0])
    assert torch.equal(again.mom2.moment(), found.moment())


def test_our_moments_are_those_that_easyedit_computes_itself(llama64, text_file, monkeypatch):
    """The same texts instead of Wikipedia, through EasyEdit's own loader and its two worker processes."""
    llama64.config._name_or_path = (
        "some-one/tiny"  # EasyEdit would write a model without a name to the root of the file system
    )
    own = layer_stats().__wrapped__
    monkeypatch.setitem(
        own.__globals__, "load_dataset", lambda *args, **kwargs: {"train": [{"text": line} for line in LINES]}
    )
    for name in MODULES:
        theirs = own(
            llama64,
            make_tokenizer(),
            name,
            "theirs",
            "wikipedia",
            ["mom2"],
            sample_size=len(LINES),
            precision="float64",
            hparams=CPU,
        ).mom2
        ours = moments(llama64, name, source=TextSource(text_file))
        assert ours.count == theirs.count
        assert (
            len([*Path("theirs").rglob(f"{name}_*.npz")]) == 1
        )  # made here and now: the comparison is with this run's
        torch.testing.assert_close(ours.moment(), theirs.moment(), rtol=1e-10, atol=1e-10)


def test_one_pass_makes_the_files_of_all_layers(named, monkeypatch):
    passes = []
    compute = statistics.second_moments
    monkeypatch.setattr(statistics, "second_moments", lambda *args: passes.append(args[2]) or compute(*args))
    for name in MODULES:
        moments(named, name)
    assert passes == [MODULES]
    assert [file.name.partition("_float")[0] for file in files()] == MODULES
    moments(named, LLAMA_DOWN.format(3))  # a layer that the settings do not name stands for itself
    assert passes == [MODULES, [LLAMA_DOWN.format(3)]]


def test_other_weights_texts_sizes_and_types_have_other_files(text_file):
    """All of one name: what is in a file decides."""
    alone = SimpleNamespace(device="cpu")

    def folders_and_names() -> set[str]:
        return {str(file) for file in files()}

    asked = [
        lambda: moments(make_model("tiny"), hparams=alone),
        lambda: moments(make_model("tiny", seed=11), hparams=alone),
        lambda: moments(make_model("tiny"), hparams=alone, size=8),
        lambda: moments(make_model("tiny"), hparams=alone, precision="float32"),
        *(
            partial(moments, make_model("tiny"), hparams=alone, source=replace(SMALL, **changes))
            for changes in ({"seed": 7}, {"samples": 7}, {"length": 9}, {"prompts": ["The river"]}, {"file": text_file})
        ),
    ]
    for number, ask in enumerate(asked, start=1):
        ask()
        assert len(folders_and_names()) == number
    moments(make_model("another name"), hparams=alone, source=TextSource(text_file))
    assert len(folders_and_names()) == len(asked)  # the same weights and text: the same file
    text_file.write_text("another text\n")
    moments(make_model("tiny"), hparams=alone, source=TextSource(text_file))
    assert len(folders_and_names()) == len(asked) + 1


def own_files(name: str) -> dict[str, Path]:
    """Where EasyEdit keeps its own statistics: of 2023 under the whole name, since 2024 under its last part."""
    suffix = f"{MODULES[0]}_float64_mom2_7.npz"
    return {n: Path("stats") / n / "wikipedia_stats" / suffix for n in (name.replace("/", "_"), name.rsplit("/")[-1])}


@pytest.mark.parametrize("spelling", ["some-one_tiny", "tiny"])
def test_a_file_of_the_users_own_goes_first(named, spelling):
    """Whichever version made it: a download of Wikipedia would follow if EasyEdit did not find the bridge's file."""
    path = own_files("some-one/tiny")[spelling]
    path.parent.mkdir(parents=True)
    state = {
        "mom2.count": 3,
        "mom2.mom2": numpy.eye(40),
        "mom2.constructor": "easyeditor.util.runningstats.SecondMoment()",
        "sample_size": 7,
    }
    numpy.savez(path, **state)
    assert torch.equal(moments(named).moment(), torch.eye(40, dtype=torch.float64) / 3)
    assert [file for file in files() if MODULES[0] in file.name] == [path]


# MEMIT


def edit_by_memit(model, layers: list[int], source: TextSource | None = SMALL) -> None:
    hparams = settings("MEMIT", layers=layers)
    editor = MethodEditor(hparams, model, tokenizer_for(hparams), text_source=source)
    editor.apply(records()[:1])
    editor.undo()


def prepared_for_memit(model, folder: Path = Path(), source: TextSource = SMALL) -> dict:
    hparams = settings("MEMIT", layers=LAYERS)
    return prepare(model, tokenizer_for(hparams), hparams, folder, source)


def test_what_is_prepared_is_not_made_in_an_edit(named, monkeypatch):
    """Where the edit, which works in a folder of its own, will look for it; the seconds stay known."""
    made = prepared_for_memit(named, Path("work").resolve())
    assert "6 texts of 8 tokens sampled from the model (seed 42)" in made["source"]
    assert made["seconds"] > 0 and len(made["files"]) == 2 and all(Path(file).is_file() for file in made["files"])
    before = fingerprint(named)
    with monkeypatch.context() as in_an_edit:
        in_an_edit.chdir("work")
        in_an_edit.setattr(statistics, "second_moments", lambda *args: pytest.fail("made again"))
        edit_by_memit(named, LAYERS)
        assert prepared_for_memit(named) == {**made, "files": [os.path.relpath(file) for file in made["files"]]}
    assert fingerprint(named) == before


def test_what_is_prepared_says_which_text_and_which_files(named, text_file):
    sampled = prepared_for_memit(named)
    read = prepared_for_memit(named, source=TextSource(text_file))
    assert read["source"] == f"text file {text_file}"
    assert not set(sampled["files"]) & set(read["files"])
    own = Path("stats/tiny/wikipedia_stats")
    own.mkdir(parents=True)
    for file in read["files"]:  # as a download of Wikipedia would have made them
        with numpy.load(file) as stored:
            numpy.savez(own / Path(file).name, **{name: stored[name] for name in stored if name != "seconds"})
    mine = prepared_for_memit(named, source=TextSource(text_file))
    assert (mine["source"], mine["seconds"]) == ("wikipedia", None)
    assert all(str(own) in file for file in mine["files"])


def test_without_the_patch_nothing_is_prepared(named, monkeypatch):
    monkeypatch.setattr(statistics, "applied", list)
    assert prepared_for_memit(named) == {"source": "EasyEdit's own, of wikipedia", "files": [], "seconds": None}
    assert not files()


def test_memits_own_changes_never_get_into_its_moments(named, text_file):
    """MEMIT asks for a layer's moments when it has changed the layers before it, also for layers without a file yet."""
    edit_by_memit(named, [1], TextSource(text_file))
    edit_by_memit(named, [1, 2], TextSource(text_file))
    made = {file.name.partition("_float")[0]: numpy.load(file)["mom2.mom2"] for file in files()}
    clean = second_moments(named, tokens(), MODULES, torch.float32)
    assert list(made) == MODULES
    for name in MODULES:
        assert roundings(torch.from_numpy(made[name]), clean[name][1]) < ONE_SUM
    with torch.no_grad():  # converse: even a thousandth more of what MEMIT writes into would show behind it
        named.get_submodule(MODULES[0]).weight.mul_(1.001)
    changed = second_moments(named, tokens(), MODULES[1:], torch.float32)
    assert roundings(changed[MODULES[1]][1], clean[MODULES[1]][1]) > ONE_SUM


def test_every_editor_uses_its_own_text(named, text_file):
    """Side by side, in one process; EasyEdit caches moments by the model's name alone."""
    hparams = settings("MEMIT", layers=[1])
    sources = [SMALL, TextSource(text_file), SMALL]
    editors = [MethodEditor(hparams, named, tokenizer_for(hparams), text_source=source) for source in sources]
    for editor in editors:
        editor.apply(records()[:1])
        editor.undo()
    names = {file.parent.name for file in files()}
    assert names == {f"{source.digest()}_stats" for source in sources}
    assert len(names) == 2


def test_an_edit_uses_the_text_of_its_context(named, text_file):
    """EasyEdit's own editor, and a `MethodEditor` without an argument."""
    hparams = settings("MEMIT", layers=[1])
    source = TextSource(text_file)
    with use_text_source(source):
        bridge.editor_for(hparams, named, tokenizer_for(hparams)).edit(**edit_inputs(records()[:1]))
    assert {file.parent.name for file in files()} == {f"{source.digest()}_stats"}
    with use_text_source(SMALL):
        edit_by_memit(named, [1], None)
    assert {file.parent.name for file in files()} == {f"{text.digest()}_stats" for text in (source, SMALL)}
    assert current_text_source() == TextSource()


def test_a_model_that_has_other_weights_now_gets_other_moments(named):
    """The same object, other weights: trained on, or loaded anew."""
    first = moments(named).moment()
    named.load_state_dict(make_model("some-one/tiny", seed=11).state_dict())
    assert not torch.equal(moments(named).moment(), first)


@pytest.mark.parametrize(("samples", "warned"), [(1, True), (60, False)])
def test_too_little_text_is_said(named, caplog, samples, warned):
    """40 inputs want 400 tokens."""
    edit_by_memit(named, [1], TextSource(samples=samples, length=8, prompts=["The river that flows through"]))
    assert ("say little of most directions" in caplog.text) == warned
