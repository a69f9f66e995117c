"""Cards of adapters and edits: what they say, and what data of others cannot make them say."""

import json
from dataclasses import replace

import torch
import yaml
from conftest import make_llama
from edits import thing_of

from kne_easyedit.edits import save_adapter
from kne_easyedit.edits.hub import edit_card


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_an_exact_adapter_says_that_no_server_takes_its_rank(tmp_path):
    edit = thing_of(make_llama())
    name = next(iter(edit.deltas))
    for rows in (512, 513):
        base = replace(edit.base, modules={name: replace(edit.base.modules[name], shape=(600, 4))})
        large = replace(edit, deltas={name: (tuple(range(rows)), torch.ones(rows, 4))}, base=base)
        report = save_adapter(large, tmp_path / str(rows), form="exact")
        assert ("more than any server takes (512)" in report.notes[0]) == (rows > 512)


class TestCard:
    def card(self, tmp_path, base="owner/tiny", fact=("The capital of France is", "Rome")):
        edit = replace(thing_of(make_llama()), requests=({"prompt": fact[0], "target_new": fact[1]},))
        save_adapter(edit, tmp_path / "a", base_name=base)
        text = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
        head, _, body = text.removeprefix("---\n").partition("\n---\n")
        return yaml.safe_load(head), body

    def test_names_library_base_and_facts(self, tmp_path):
        head, body = self.card(tmp_path)
        assert head["library_name"] == "peft" and head["base_model"] == "owner/tiny"
        assert "| The capital of France is | Rome |" in body and "--max-lora-rank 8" in body

    def test_a_path_stays_at_home(self, tmp_path):
        head, body = self.card(tmp_path, base="/home/someone/models/tiny")
        assert "base_model" not in head and "someone" not in body and "tiny" in body

    def test_a_folder_that_looks_like_a_hub_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert self.card(tmp_path / "x", base="models/tiny")[0]["base_model"] == "models/tiny"
        (tmp_path / "models" / "tiny").mkdir(parents=True)
        assert "base_model" not in self.card(tmp_path / "y", base="models/tiny")[0]

    def test_a_relative_path_that_is_gone_is_no_hub_name(self, tmp_path):
        """A commit tells a model of the hub from a folder of the same form; whoever gives base_name says so."""
        for revision, expected in (("", None), ("abc", "outputs/merged")):
            edit = thing_of(make_llama())
            edit = replace(edit, base=replace(edit.base, name="outputs/merged", revision=revision))
            save_adapter(edit, tmp_path / f"a{revision}")
            for text in ((tmp_path / f"a{revision}" / "README.md").read_text(encoding="utf-8"), edit_card(edit)):
                head, _, body = text.removeprefix("---\n").partition("\n---\n")
                assert yaml.safe_load(head).get("base_model") == expected
                assert ("outputs/merged" in body) == bool(revision)

    def test_what_comes_from_data_has_no_effect(self, tmp_path):
        """A fact is text: no link, no picture, no tag, no row of the table, no second head."""
        fact = ("a | b\n---\nlibrary_name: evil", "![x](http://evil) <script>alert(1)</script>\n# head")
        head, body = self.card(tmp_path, base='x"\n```\n# evil', fact=fact)
        assert head["library_name"] == "peft"
        assert "<script>" not in body and "![x](" not in body and "\n# head" not in body and "\n# evil" not in body
        assert body.count("\n---\n") == 0

    def test_the_base_is_named_in_the_configuration(self, tmp_path):
        self.card(tmp_path)
        assert config_of(tmp_path / "a")["base_model_name_or_path"] == "owner/tiny"
