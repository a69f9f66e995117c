"""The matrix of docs/compatibility.md for the EasyEdit of this process: every method in every mode, on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import compatibility_cells as compatibility
import compatibility_page

CELLS = [(method, mode) for method in compatibility.METHODS for mode in compatibility.MODES]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    from kne_easyedit.bridge import TextSource, use_text_source

    monkeypatch.chdir(tmp_path)  # EasyEdit writes ./logs
    with use_text_source(TextSource(samples=8, length=6)):
        yield


@pytest.mark.parametrize(("method", "mode"), CELLS, ids=lambda value: value.replace(" ", "-"))
def test_a_cell_works_or_fails_for_the_reason_that_is_given(method, mode, tmp_path, capsys):
    reason = compatibility.limit(method, mode)
    if reason in (None, compatibility.FORGETS):
        compatibility.attempt(method, mode, tmp_path / "stats")
    else:  # a limit that is none any more must not stay in the table
        with pytest.raises(Exception):  # noqa: B017  (each version fails in its own way)
            compatibility.attempt(method, mode, tmp_path / "stats")


def test_a_cell_that_leaves_the_model_changed_is_no_success(tmp_path, monkeypatch):
    """Converse: a method that forgets an original is noticed."""
    from kne_easyedit import bridge
    from kne_easyedit.bridge.importing import module

    bridge.register()  # whatever test ran before
    methods = module("util.alg_dict").ALG_DICT
    apply = methods["FT"]

    def forgetful(*args, **kwargs):
        edited, _ = apply(*args, **kwargs)
        return edited, {}

    monkeypatch.setitem(methods, "FT", forgetful)
    with pytest.raises(AssertionError, match="not what it was"):
        compatibility.attempt("FT", "edit", tmp_path)


def test_the_page_says_what_works_and_why_not():
    cells = [
        {"method": method, "mode": mode, "cannot": None, "error": None, "needs": []}
        for method in compatibility.METHODS
        for mode in compatibility.MODES
    ]
    cells[0]["needs"] = ["tied-head"]
    cells[1]["cannot"] = "no such thing"
    cells[2]["error"] = "ValueError: boom"
    found = {
        "pypi": {
            "easyedit": {"kind": "installed", "version": "0.0.1.dev0"},
            "patches": {"tied-head": "applied"},
            "faults": {"tied-head": "a fault"},
            "cells": cells,
        }
    }
    text = compatibility_page.text_of(found, {}, None)
    assert "| edit | works with [1] | works |" in text
    assert "| sequential_edit | cannot [2] | works |" in text and "| batch_edit 1 | **fails** [3] |" in text
    assert "- [1] patches tied-head" in text and "- [2] no such thing" in text and "- [3] ValueError: boom" in text
    assert "| tied-head | a fault |" in text
    found["pypi"]["cells"] = [cell for cell in cells if cell["method"] == "KNE"]
    alone = compatibility_page.text_of(found, {}, None)  # `--methods KNE`
    assert "| mode | KNE |\n" in alone and "| mode | KNE |\n" not in text


def test_the_tracked_page_has_the_texts_of_the_script():
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert page.startswith(compatibility_page.HEAD)
    assert compatibility_page.OTHERS in page
