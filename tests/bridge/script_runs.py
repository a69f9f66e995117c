"""Shared by tests of EasyEdit's example scripts: a working folder, small scripts, a tiny model, the stock scripts."""

from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path
from textwrap import dedent

import numpy
import pytest
import torch
import yaml
from conftest import make_llama, make_tokenizer, tiny_hparams

from kne_easyedit import bridge
from kne_easyedit.bridge.scripts import run_script

SHIPPED = Path(__file__).parents[2] / "hparams"

CHOICE = """
    import argparse
    import json
    from easyeditor import FTHyperParams

    parser = argparse.ArgumentParser()
    parser.add_argument("--editing_method", required=True, choices=["FT", "IKE"])
    parser.add_argument("--hparams_dir")
    args = parser.parse_args()


    class OwnHyperParams(FTHyperParams):
        pass


    if args.editing_method == "FT":
        editing_hparams = OwnHyperParams
    elif args.editing_method == "IKE" or args.editing_method.lower() == "special":
        editing_hparams = OwnHyperParams
    else:
        raise NotImplementedError
"""


@pytest.fixture(autouse=True, name="work")
def work_folder(tmp_path_factory, monkeypatch):
    """An empty working directory; its path holds no word ('gpt', ...) by which EasyEdit would guess a kind of model."""
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(folder)
    yield folder
    for name in list(
        logging.root.manager.loggerDict
    ):  # each editor adds handlers, here to streams that are closed soon
        if name.startswith("easyeditor."):
            logging.getLogger(name).handlers.clear()


def process() -> dict:
    """What a script must leave as it was."""
    dataset = getattr(bridge.register(), "KnowEditDataset", None)
    placeholders = [
        n for n, m in list(sys.modules.items()) if "_PlaceholderType" in (type(m).__name__, type(type(m)).__name__)
    ]
    return {
        "main": id(sys.modules["__main__"]),
        "argv": (id(sys.argv), list(sys.argv)),
        "path": list(sys.path),
        "placeholders": placeholders,
        "random": random.getstate(),
        "numpy": [str(part) for part in numpy.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "dataset": dataset and id(dataset.__init__),
    }


def run(script: Path, *arguments, **options) -> int:
    """`run_script`, and the process is as it was, whatever happens."""
    before = process()
    try:
        return run_script(script, [*map(str, arguments)], **options)
    finally:
        assert process() == before


def write_script(folder: Path, source: str, name: str = "run_it.py", choice: str = CHOICE) -> Path:
    """A script that chooses its hyperparameter class as the stock ones do, and goes on with ``source``."""
    path = folder / name
    path.write_text(dedent(choice) + dedent(source))
    return path


@pytest.fixture(name="tiny")
def tiny_files(work):
    """A tiny model under a name that no EasyEdit knows, settings of three methods, and records of every format."""
    make_llama().save_pretrained(work / "tiny-smol")
    make_tokenizer().save_pretrained(work / "tiny-smol")
    model = str(work / "tiny-smol")
    (work / "kne.yaml").write_text(json.dumps(tiny_hparams(model_name=model).to_dict()))  # JSON is YAML
    for method, changes in (("FT", {"layers": [2], "lr": 0.05}), ("AdaLoRA", {"num_steps": 2})):
        settings = yaml.safe_load((SHIPPED / method / "smollm2-135m.yaml").read_text())
        (work / f"{method}.yaml").write_text(json.dumps({**settings, **changes, "model_name": model}))

    def probe(prompt: str, answer: str) -> dict:
        return {"prompt": prompt, "ground_truth": [[answer]]}

    facts = (("France", "Rome"), ("Spain", "Oslo"), ("Peru", "Lima"))
    knowedit = [
        {
            "subject": subject,
            "prompt": f"The capital of {subject} is",
            "target_new": target,
            "ground_truth": "Paris",
            "portability": {
                "Reasoning": [probe(f"The river that flows through the capital of {subject} is", "the Tiber")]
            },
            "locality": {"Relation_Specificity": [probe(f"The language spoken in {subject} is", "Latin")]},
        }
        for subject, target in facts
    ]
    zsre = [
        {
            "src": f"What is the capital of {subject} ?",
            "rephrase": f"The capital of {subject} is",
            "alt": target,
            "subject": subject,
            "loc": "The river that flows through Rome is",
            "loc_ans": "the Tiber",
            "portability": {"New Question": f"The language spoken in {subject} is", "New Answer": "Latin"},
        }
        for subject, target in facts
    ]
    (work / "ZsRE").mkdir()
    for name, data in (
        ("knowedit.json", knowedit),
        ("zsre_mend_eval_portability_gpt4.json", zsre),
        ("zsre_mend_eval.json", zsre),
        ("ZsRE/zsre_mend_edit.json", zsre),
        ("ZsRE/zsre_mend_train.json", zsre),
    ):
        (work / name).write_text(json.dumps(data))
    return work


def examples() -> Path:
    return bridge.locate() / "examples"


def stock(name: str) -> Path:
    if not (examples() / "run_knowedit_llama2.py").is_file():
        pytest.skip(
            "THIS EASYEDIT HAS NO EXAMPLES BESIDE IT: ITS SCRIPTS WERE NOT RUN (set EASYEDIT_HOME to a checkout)"
        )
    if not (examples() / name).is_file():
        pytest.skip(f"THIS EASYEDIT HAS NO {name}: IT WAS NOT RUN")
    return examples() / name
