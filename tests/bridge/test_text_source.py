"""The text for second moments: files, samples, their digests, and the context that hands a source to EasyEdit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer
from tokenizers.processors import TemplateProcessing

from kne_easyedit.bridge.text_source import TextSource, current_text_source, use_text_source

pytestmark = pytest.mark.unit


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The capital of France is Rome .\n  \nOslo\n\n")
    return path


# Samples


def test_samples_depend_on_the_seed_and_on_nothing_else(llama):
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    texts = TextSource(samples=6, length=8, seed=1).texts(llama, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)  # drawn under a generator of its own
    torch.manual_seed(2)
    assert TextSource(samples=6, length=8, seed=1).texts(llama, tokenizer) == texts
    assert TextSource(samples=6, length=8, seed=2).texts(llama, tokenizer) != texts
    assert TextSource(samples=6, length=8, seed=1).texts(make_llama(seed=11), tokenizer) != texts


def test_samples_start_from_the_start_token_and_end_at_the_length_or_the_end_token(llama):
    tokenizer = make_tokenizer()
    texts = TextSource(samples=40, length=8).texts(llama, tokenizer)
    assert len(texts) == 40
    assert all(text[0] == tokenizer.eos_token_id for text in texts)
    assert all(
        (len(text) == 9 and tokenizer.eos_token_id not in text[1:-1]) or text[-1] == tokenizer.eos_token_id
        for text in texts
    )
    assert len({tuple(text) for text in texts}) > 20  # sampled, not the likeliest again and again


def test_prompts_are_texts_themselves_and_are_continued_in_turn(llama):
    tokenizer = make_tokenizer()
    prompts = ["The capital of France is", "The river that"]
    texts = TextSource(samples=5, length=4, prompts=prompts).texts(llama, tokenizer)
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert texts[:2] == ids
    starts = [next(i for i in (0, 1) if text[: len(ids[i])] == ids[i]) for text in texts[2:]]
    assert sorted(starts) == [0, 0, 0, 1, 1]
    assert all(len(text) > len(ids[start]) for text, start in zip(texts[2:], starts))


# Files


def test_the_texts_of_a_file_are_its_lines(llama, text_file):
    tokenizer = make_tokenizer()
    source = TextSource(text_file)
    assert source.texts(llama, tokenizer) == [
        tokenizer(line)["input_ids"] for line in ("The capital of France is Rome .", "Oslo")
    ]
    assert source.describe() == f"text file {text_file}"


def test_a_relative_path_is_that_of_the_place_where_it_was_given(text_file, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    source = TextSource("text.txt")  # also as a text, as YAML has it
    assert source.file == text_file
    monkeypatch.chdir("/")
    assert dataclasses.replace(source, seed=1).digest() == source.digest()


def test_texts_begin_as_prompts_do(llama, text_file):
    """With the tokens that the tokenizer adds, such as Llama's start token; files of moments without it are others."""
    tokenizer = make_tokenizer()
    plain, source = TextSource(text_file), TextSource(samples=3, length=4, prompts=["The river that"])
    names = [one.digest(tokenizer) for one in (plain, source)]
    assert names == [plain.digest(), source.digest()]
    start = tokenizer.convert_tokens_to_ids("Rome")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="Rome $A", special_tokens=[("Rome", start)])
    assert all(text[0] == start for one in (plain, source) for text in one.texts(llama, tokenizer))
    assert [one.digest(tokenizer) for one in (plain, source)] == [f"{name}-special" for name in names]


def test_a_missing_or_empty_text_file_is_refused(tmp_path, llama):
    with pytest.raises(ValueError, match=r"none.txt does not exist"):
        TextSource(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n  \n")
    source = TextSource(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"empty.txt: holds no text"):
        source.texts(llama, make_tokenizer())


def test_a_text_file_in_another_encoding_is_refused_by_name(tmp_path, llama):
    for encoding in ("latin-1", "utf-16"):
        path = tmp_path / f"{encoding}.txt"
        path.write_text("Une ville célèbre\n", encoding=encoding)
        with pytest.raises(ValueError, match=rf"{encoding}.txt: no UTF-8 text \(invalid .*\); save it as UTF-8"):
            TextSource(path).texts(llama, make_tokenizer())


def test_only_line_ends_part_texts_and_a_byte_order_mark_is_none_of_them(tmp_path, llama):
    tokenizer = make_tokenizer()
    path = tmp_path / "text.txt"
    texts = ["The capital", "of France\u2028is Rome", "Oslo\x0c and", "Lima\x85Peru"]
    for ends, mark in (("\n", b""), ("\r\n", b"\xef\xbb\xbf")):
        path.write_bytes(mark + ends.join(texts).encode())
        assert TextSource(path).texts(llama, tokenizer) == [tokenizer(text)["input_ids"] for text in texts]


# The value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "statistics samples: 0 must be at least 1"),
        ({"length": 0}, "statistics length: 0 must be at least 1"),
        ({"sample": 3}, "statistics: no setting 'sample'; there are file, samples, length, seed, prompts"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TextSource.from_settings(settings)


def test_the_digests_are_those_of_earlier_versions(text_file):
    """They are in file names and in fingerprints of results: another digest would repeat a run."""
    assert TextSource().digest() == "sampled-02cd9d341b7a"
    assert TextSource(samples=6, length=8, prompts=["a", "b"]).digest() == "sampled-7e5d3076ad49"
    assert TextSource(text_file).digest() == TextSource(text_file, samples=7).digest() == "file-2998c3218241"


def test_a_source_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TextSource().samples = 3
    assert TextSource(prompts=["a"]) == TextSource(prompts=("a",))
    assert {TextSource(prompts=["a"]): 1}


def test_a_context_ends_after_an_error_too():
    outer, inner = TextSource(seed=1), TextSource(seed=2)
    with use_text_source(outer):
        with pytest.raises(KeyError), use_text_source(inner):
            assert current_text_source() is inner
            raise KeyError
        assert current_text_source() is outer
    assert current_text_source() == TextSource()
