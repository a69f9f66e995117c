"""CONTRIBUTING's recipes, done here: each takes what it says it takes, and nothing else."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from conftest import FACTS, HANGS, LLAMA_DOWN, THREE_TOKENS, NoDetours, make_llama, make_tokenizer, tiny_hparams
from families import FAMILIES, LLAMA, Kind, made, templates
from reference import literal_attribution
from torch import nn

from kne_easyedit import KNEHyperParams, cli, metrics
from kne_easyedit.attribution.engine import attribute
from kne_easyedit.bridge import importing, methods, patches, register
from kne_easyedit.editing import compute_edit, objectives
from kne_easyedit.localization import NeuronEnsemble, selection

ROOT = Path(__file__).parents[1]
REQUESTS = [{"prompt": prompt, "target_new": target} for prompt, target in FACTS]


# What the recipes say


def recipes() -> dict[str, str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n## Recipes\n")[2].partition("\n## ")[0]
    parts = re.split(r"^### (.+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def touched(recipe: str) -> list[tuple[str, list[str]]]:
    """The files that a recipe touches, each with the names in it that change."""
    (sentence,) = re.findall(r"^Touches: (.+?)\.$", recipe, re.MULTILINE | re.DOTALL)
    found = re.findall(r"`([\w./-]+\.\w+)`(?: \(((?:`\w+`(?:,\s)?)+)\))?", sentence)
    return [(path, re.findall(r"\w+", names)) for path, names in found]


def names_in(path: Path) -> set[str]:
    """The names that a module defines at its top."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.unit
def test_there_is_a_recipe_for_each_kind_of_extension():
    kinds = ("selection rule", "objective", "metric", "baseline", "patch", "model family", "EasyEdit version")
    assert [re.sub(r"^Add an? ", "", title) for title in recipes()] == list(kinds)


@pytest.mark.unit
@pytest.mark.parametrize("title", recipes())
def test_the_files_and_names_that_a_recipe_touches_are_there(title):
    files = touched(recipes()[title])
    assert files
    for path, names in files:
        assert (ROOT / path).is_file(), path
        assert not names or set(names) <= names_in(ROOT / path), f"{path}: {names}"


# The recipes


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A tiny model, its settings and facts, in the working folder."""
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    records = [{**request, "subject": request["prompt"].split()[0]} for request in REQUESTS]
    Path("facts.json").write_text(json.dumps(records))
    settings = tiny_hparams(model_name="model", localization_data="facts.json", localization_size=3, cache_dir="cache")
    Path("kne.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    return tmp_path


@pytest.mark.unit
def test_a_selection_rule_is_one_entry(tiny, monkeypatch):
    """One neuron of each layer comes first, whatever the layers' scores: what no rule of ours does."""

    def ranks(scores: torch.Tensor) -> torch.Tensor:
        return 1.0 / (1 + scores.argsort(1, descending=True).argsort(1)) * (scores > 0)

    command = ["localize", "--hparams", "kne.yaml", "--set", "score_scale=rank", "p=0.04", "--out", "out"]
    assert cli.main(command) == 1, "no such rule yet"
    monkeypatch.setitem(selection.SCALES, "rank", ranks)
    assert cli.main(command) == 0
    found = NeuronEnsemble.load("out/ensemble.json")
    assert found.scale == "rank" and set(found.counts()[LLAMA_DOWN].values()) == {1}
    scores = ["--set", "score_scale=none", "p=0.04", "--out", "plain"]
    assert cli.main(["localize", "--hparams", "kne.yaml", *scores]) == 0
    assert NeuronEnsemble.load("plain/ensemble.json").members() != found.members()
    assert cli.main(["explain", "--hparams", "kne.yaml", "--set", "score_scale=rank", "p=0.04", "--out", "why"]) == 0


class Small:
    """An objective: rows that change less."""

    name = "size"

    def __init__(self, weight: float):
        self.weight = weight

    def loss(self, model: nn.Module) -> torch.Tensor:
        return sum(p.square().sum() for p in model.parameters() if p.requires_grad)


@dataclass
class Wider(KNEHyperParams):
    size_weight: float = 0.0


@pytest.mark.unit
def test_an_objective_is_a_class_a_line_and_a_setting(llama, tokenizer, monkeypatch):
    def size(weight: float) -> float:
        hparams = Wider(**{**tiny_hparams(stop_loss=0, num_steps=5, seed=1).to_dict(), "size_weight": weight})
        edit = compute_edit(llama, tokenizer, REQUESTS[:1], hparams)
        return sum(delta.square().sum().item() for _, delta in edit.deltas.values())

    before = size(1.0)
    monkeypatch.setitem(objectives.OBJECTIVES, "size_weight", lambda m, t, r, hparams: Small(hparams.size_weight))
    assert size(0.0) == before, "weight 0 changes nothing"
    assert size(1.0) < 0.9 * before


@pytest.mark.unit
def test_a_metric_is_one_entry(monkeypatch):
    lines = [{"post": {"rewrite_acc": [1.0], "politeness": [0.25]}}]
    assert "politeness" not in metrics.table({"KNE": metrics.summarize_metrics(lines)})
    new = metrics.Metric(
        "politeness", "POL", "share of polite words", "percent", "up", ("metrics", "post", "politeness")
    )
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, new))
    summary = metrics.summarize_metrics(lines)
    assert summary["politeness"] == 25 and "politeness" in metrics.table({"KNE": summary})
    with pytest.raises(ValueError, match="politeness"):
        metrics.check_metrics({"post": {"politeness": "very"}})


@pytest.mark.easyedit
def test_a_baseline_is_a_yaml_and_where_it_has_a_label_a_line(tiny, monkeypatch, capsys):
    settings = yaml.safe_load((ROOT / "hparams/FT/smollm2-135m.yaml").read_text())
    own = {"model_name": "model", "layers": [2], "num_steps": 2, "device": "cpu"}
    Path("hparams/FT-late").mkdir(parents=True)
    Path("hparams/FT-late/tiny.yaml").write_text(yaml.safe_dump({**settings, **own}))
    command = ["run", "--data", "facts.json", "--records", "1", "--methods", "FT-late", "--model", "model"]
    command += ["--hparams", "hparams/FT-late/tiny.yaml", "--workers", "1", "--out", "out"]
    assert cli.main(command) == 1 and "FT-late" in capsys.readouterr().err, "no such label yet"
    monkeypatch.setitem(methods.METHODS, "FT-late", methods.Method("FT-late", "FT", {"layers": [2]}))
    assert cli.main(command) == 0
    line = json.loads(Path("out/results.jsonl").read_text().splitlines()[0])
    assert line["method"] == "FT-late" and "| FT-late" in capsys.readouterr().out


@pytest.mark.easyedit
def test_a_patch_is_a_function_or_a_transformer(monkeypatch):
    """The fault: a wrong number in a module of an EasyEdit."""
    monkeypatch.setattr(patches, "_PATCHES", {})

    @patches.runtime_patch("right-number", "number() is wrong")
    def right_number(easyeditor: ModuleType) -> bool:
        wrong, easyeditor.number = easyeditor.number() != 4, lambda: 4
        return wrong

    class Four(ast.NodeTransformer):
        def __init__(self):
            self.changes = 0

        def visit_Constant(self, node):
            if node.value == 5:
                self.changes += 1
                return ast.copy_location(ast.Constant(4), node)
            return node

    patches.add(patches.SourcePatch("right-constant", "the constant is wrong", transformer=Four, modules=(".numbers",)))

    def imported(off: str) -> tuple[int, list[str | None]]:
        monkeypatch.setenv(patches.OFF, off)
        patches.reset()
        module = ModuleType("easyeditor.numbers")
        tree = patches.rewrite(ast.parse("def number(): return 5"), "easyeditor.numbers")
        exec(compile(tree, "numbers", "exec"), module.__dict__)
        patches.apply_all(module)
        return module.number(), [patch.state for patch in patches.report()]

    assert imported("all") == (5, [patches.SWITCHED_OFF] * 2)
    assert imported("right-constant") == (4, [patches.APPLIED, patches.SWITCHED_OFF])
    assert imported("right-number") == (4, [patches.SWITCHED_OFF, patches.APPLIED])
    assert imported("") == (4, [patches.NOT_NEEDED, patches.APPLIED])


@pytest.mark.unit
def test_a_model_family_is_one_entry(tokenizer, monkeypatch):
    """One that the table does not have."""
    assert "olmo" not in FAMILIES
    kind = Kind("OlmoForCausalLM", "model.layers", LLAMA, 12, {"attn_implementation": "sdpa"})
    monkeypatch.setitem(FAMILIES, "olmo", kind)
    model = made.__wrapped__("olmo")
    linear = {name for name, module in model.model.layers[0].named_modules() if isinstance(module, nn.Linear)}
    assert linear == set(LLAMA.split())
    for template in (templates("olmo")[0], templates("olmo")[-1]):
        with NoDetours():
            ours = attribute(model, tokenizer, *THREE_TOKENS, template, 3, engine="sweep")
            theirs = literal_attribution(model, tokenizer, *THREE_TOKENS, template, 3)
        assert ours.abs().max() > 0.01 and (ours - theirs).abs().max() < 1e-9 * theirs.abs().max()


@pytest.fixture
def other_version(tmp_path) -> Path:
    """A clone of an EasyEdit that differs from the installed one: its code in a folder, one module more."""
    installed = Path(importlib.util.find_spec("easyeditor").origin).parent
    shutil.copytree(installed, tmp_path / "EasyEdit/easyeditor", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "EasyEdit/easyeditor/later.py").write_text("VERSION = 'later'\n")
    return tmp_path / "EasyEdit"


def run(*command: str, folder: Path, **environment: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.easyedit
def test_another_version_of_easyedit_is_a_folder(other_version, tmp_path):
    program = (
        "import kne_easyedit.bridge as b; b.register(); from easyeditor import later as l; print(l.VERSION, l.__file__)"
    )
    version, path = run("-c", program, folder=tmp_path, EASYEDIT_HOME=str(other_version)).split()[-2:]
    assert version == "later" and Path(path).is_relative_to(other_version)
    assert not hasattr(register(), "later") and importing.locate(), "this process has the installed one"
