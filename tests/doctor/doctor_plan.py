"""A planned run on a tiny model, which tests of `kne doctor` break in one place."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import make_llama, make_tokenizer, tiny_hparams
from methods import HPARAMS, TINY

from kne_easyedit import cli

SUBJECTS = {"France": "Rome", "Spain": "Oslo", "Peru": "Marie", "Italy": "Lima"}


class Plan:
    """A planned run in a folder of its own: a tiny model, its settings, four records. Tests break one of them."""

    def __init__(self, folder):
        self.folder, self.model = folder, folder / "tiny-model"
        tokenizer = make_tokenizer()
        tokenizer.bos_token = "<eos>"
        make_llama().save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        self.records = [
            {
                "subject": subject,
                "prompt": f"The capital of {subject} is",
                "target_new": new,
                "ground_truth": "Paris",
                "portability": {},
                "locality": {"Forgetfulness": [{"prompt": "The river that", "ground_truth": ["flows"]}]},
            }
            for subject, new in SUBJECTS.items()
        ]
        kne = tiny_hparams(model_name=str(self.model), num_steps=5).to_dict()
        ft = yaml.safe_load((HPARAMS / "FT-L/smollm2-135m.yaml").read_text())
        self.settings = {"KNE": kne, "FT-L": {**ft, **TINY["FT-L"], "num_steps": 2, "model_name": str(self.model)}}

    def check(self, *arguments: str, methods=("KNE", "FT-L")) -> int:
        """``kne doctor`` on what the plan is now."""
        (self.folder / "records.json").write_text(json.dumps(self.records))
        files = []
        for method in methods:
            (self.folder / method).mkdir(exist_ok=True)
            files.append(self.folder / method / "tiny.yaml")
            files[-1].write_text(yaml.safe_dump(self.settings[method]))
        return cli.main(
            ["doctor", "--hparams", *map(str, files), "--data", str(self.folder / "records.json"), *arguments]
        )


@pytest.fixture(name="plan")
def planned(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Plan(tmp_path)


def lines(text: str, mark: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(mark)]
