"""scripts/comment_settings.py: shipped settings are explained by the first sentences of the fields' docstrings."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import yaml

from kne_easyedit.hparams import KNEHyperParams

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "hparams" / "KNE").glob("*.yaml"))
spec = importlib.util.spec_from_file_location("comment_settings", ROOT / "scripts" / "comment_settings.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_what_it_writes(path):
    text = path.read_text(encoding="utf-8")
    assert script.commented(text) == text, "run python scripts/comment_settings.py"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_field_is_in_every_file(path):
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == {f.name for f in dataclasses.fields(KNEHyperParams)}


def test_every_field_has_a_sentence():
    helps = script.field_help()
    assert set(helps) == {field.name for field in dataclasses.fields(KNEHyperParams)}
    assert helps["p"] == "Fraction of the neurons kept (Eq. 6), in (0, 1]"
    assert helps["cache_dir"].startswith("Folder of the score cache; null: ")
    assert not any("``" in text or "\n" in text or text.endswith(".") for text in helps.values())


def test_only_comments_of_settings_change():
    text = '# p: 3\np: 0.2   # wrong\nseparator: " # "\nother: 1  # stays\n\nlr: 1.0\n'
    new = script.commented(text)
    assert yaml.safe_load(new) == yaml.safe_load(text)
    assert new.startswith("# p: 3\np: 0.2") and "wrong" not in new and "other: 1  # stays\n\nlr: 1.0 " in new
    assert script.commented(new) == new


def test_check_names_stale_files(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "hparams" / "KNE"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text("p: 0.2  # wrong\n")
    monkeypatch.setattr(script, "FOLDER", folder)
    for arguments, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr("sys.argv", ["comment_settings.py", *arguments])
        assert script.main() == code
    assert (
        capsys.readouterr().out
        == "hparams/KNE/a.yaml: comments differ from KNEHyperParams\nhparams/KNE/a.yaml: written\n"
    )
