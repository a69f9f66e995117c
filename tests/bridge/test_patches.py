"""The patches of EasyEdit as a registry, and the source patches on small texts."""

from __future__ import annotations

import ast
import dataclasses
import sys
from functools import partial
from importlib.machinery import SourceFileLoader
from types import ModuleType, SimpleNamespace

import pytest
import torch
from methods import in_tmp, patches_by_name  # noqa: F401  (in_tmp is a fixture)

from kne_easyedit import bridge
from kne_easyedit.bridge import importing, patches
from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.patches import APPLIED, NOT_NEEDED, SWITCHED_OFF, Patch

# The registry


@pytest.fixture
def registry(monkeypatch) -> dict:
    """An empty one."""
    monkeypatch.setattr(patches, "_PATCHES", {})
    return patches._PATCHES


def test_a_name_is_given_once(registry):
    patches.add(Patch("one", "a fault"))
    with pytest.raises(ValueError, match="'one' is there already"):
        patches.add(Patch("one", "another"))
    assert registry["one"].fault == "a fault"


def test_switching_off_takes_names_or_all(monkeypatch):
    names = {patch.name for patch in patches.report()}
    for text, off in (("", set()), ("all", names), (" tied-head , device-names,", {"tied-head", "device-names"})):
        monkeypatch.setenv(patches.OFF, text)
        assert patches.switched_off() == off
    monkeypatch.delenv(patches.OFF)
    assert patches.switched_off() == set()


@pytest.mark.parametrize(
    ("text", "says"),
    [("modl-switches", "did you mean 'model-switches'"), ("device-names,0", "'0' is no patch; there are ")],
)
def test_an_unknown_name_is_refused_with_the_nearest(monkeypatch, text, says):
    monkeypatch.setenv(patches.OFF, text)
    with pytest.raises(ValueError, match=says):
        patches.switched_off()
    with pytest.raises(ValueError, match=says):  # before anything of EasyEdit is compiled
        patches.rewrite(ast.parse("x = 1"), "easyeditor.x")


def test_patches_are_applied_once_and_tell_what_was_done(registry, monkeypatch):
    calls = []

    def patch(name: str, there: bool) -> None:
        patches.runtime_patch(name, "a fault")(lambda easyeditor: calls.append(name) or there)

    patch("needed", True), patch("superfluous", False), patch("unwanted", True)
    patches.add(patches.SourcePatch("of a source", "a fault", transformer=Doubling))
    assert [p.state for p in patches.report()] == [None] * 4
    monkeypatch.setenv(patches.OFF, "unwanted")
    for _ in range(2):
        patches.apply_all(ModuleType("easyeditor"))
    assert calls == ["needed", "superfluous"]
    assert [(p.name, p.state) for p in patches.report()] == [
        ("needed", APPLIED),
        ("superfluous", NOT_NEEDED),
        ("unwanted", SWITCHED_OFF),
        ("of a source", NOT_NEEDED),
    ]
    assert patches.applied() == ["needed"]


class Doubling(ast.NodeTransformer):
    """1 -> 2."""

    def __init__(self):
        self.changes = 0

    def visit_Constant(self, node):
        self.changes += node.value == 1
        return ast.Constant(2) if node.value == 1 else node


@pytest.mark.parametrize(
    ("source", "name", "off", "result", "state"),
    [
        ("x = 1", "easyeditor.a.b", "", "x = 2", APPLIED),
        ("x = 3", "easyeditor.a.b", "", "x = 3", None),
        ("x = 1", "easyeditor.c", "", "x = 1", None),  # another module
        ("x = 1", "easyeditor.a.b", "doubling", "x = 1", None),
    ],
)
def test_a_source_patch_changes_its_modules_where_it_is_wanted(registry, monkeypatch, source, name, off, result, state):
    patches.add(patches.SourcePatch("doubling", "a fault", transformer=Doubling, modules=("a.b",)))
    monkeypatch.setenv(patches.OFF, off)
    assert ast.unparse(patches.rewrite(ast.parse(source), name)) == result
    assert registry["doubling"].state == state


def test_loading_again_wraps_nothing_again():
    easyeditor = bridge.register()
    touched = {
        "editor": easyeditor.BaseEditor.__init__,
        "settings": easyeditor.FTHyperParams.__init__,
        "parameter": module("util.nethook").get_parameter,
        **module("util.alg_dict").ALG_DICT,
    }
    patches.apply_all(importing.load())
    bridge.register()
    assert touched == {
        "editor": easyeditor.BaseEditor.__init__,
        "settings": easyeditor.FTHyperParams.__init__,
        "parameter": module("util.nethook").get_parameter,
        **module("util.alg_dict").ALG_DICT,
    }


def test_every_patch_has_said_what_it_did():
    for patch in patches_by_name().values():
        assert patch.state in (APPLIED, NOT_NEEDED)
        assert patch.fault


# Source patches, on small texts


def replace_settings(name: str, source: str, where: str) -> str:
    """What a copy of the patch makes of a source; the patch's own state stays."""
    tree = dataclasses.replace(patches_by_name()[name]).rewrite(ast.parse(source), where)
    return ast.unparse(ast.fix_missing_locations(tree))


def run(source: str, **names) -> dict:
    exec(compile(source, "small text", "exec"), names)
    return names


@pytest.mark.parametrize(("device", "name"), [(0, "cuda:0"), ("1", "cuda:1"), ("cpu", "cpu"), ("cuda:2", "cuda:2")])
def test_device_names_are_numbers_or_names(device, name):
    source = 'where = move(f"cuda:{hparams.device}")'
    for text in (source, f"def f():\n    if x:\n        return {source[8:]}\nx = 1\nwhere = f()"):
        found = run(
            replace_settings("device-names", text, "easyeditor.any"),
            hparams=SimpleNamespace(device=device),
            move=lambda name: name,
        )
        assert found["where"] == name
    assert (
        run(source, hparams=SimpleNamespace(device="cpu"), move=lambda name: name)["where"] == "cuda:cpu"
    )  # the fault
    with pytest.raises(RuntimeError, match="device"):
        torch.device("cuda:cpu")


@pytest.mark.parametrize(
    "text", ["'cuda:0'", "f'cuda:{a}:{b}'", "f'on cuda:{a}'", "f'cuda:{a:02d}'", "f'{a}'", "f'cpu:{a}'", "'cuda:' + a"]
)
def test_other_texts_about_devices_stay(text):
    assert ast.dump(ast.parse(replace_settings("device-names", text, "easyeditor.any"))) == ast.dump(ast.parse(text))


ADAPTERS = [
    ("adapter-removal", "del editor.model.peft_config", "easyeditor.editors.editor"),
    ("adapter-printing", "model.print_trainable_parameters()", "easyeditor.models.lora.lora_main"),
]


@pytest.mark.parametrize(("name", "statement", "where"), ADAPTERS)
def test_what_an_adapter_has_is_used_only_if_it_is_there(name, statement, where):
    for text in (statement, f"if True:\n    {statement}\nelse:\n    pass", f"for i in range(1):\n    {statement}"):
        for has in (True, False):
            calls = []
            parts = {"peft_config": 1, "print_trainable_parameters": partial(calls.append, 1)} if has else {}
            model = SimpleNamespace(**parts)
            run(replace_settings(name, text, where), model=model, editor=SimpleNamespace(model=model))
            assert not (name == "adapter-removal" and hasattr(model, "peft_config"))
            assert calls == [1] * (has and name == "adapter-printing")
    with pytest.raises(AttributeError):  # the fault
        run(statement, model=SimpleNamespace(), editor=SimpleNamespace(model=SimpleNamespace()))


@pytest.mark.parametrize(("name", "statement", "where"), ADAPTERS)
def test_other_statements_about_adapters_stay(name, statement, where):
    attribute = statement.rpartition(".")[2].removesuffix("()")
    guarded = f"if hasattr(model, '{attribute}'):\n    {statement}"
    for text in (guarded, "del model.other", "del peft_config", "model.print()", f"print('{attribute}')"):
        assert replace_settings(name, text, where) == text
    assert replace_settings(name, statement, "easyeditor.other") == statement


BATCH_EDIT = """
def batch_edit(chunks):
    {before}
    for chunk in chunks:
        {within}
        for fact in chunk:
            all_metrics.append(fact)
    return all_metrics, len(all_metrics)
"""


def test_batch_edit_returns_the_metrics_of_all_chunks():
    source = BATCH_EDIT.format(before="pass", within="all_metrics = []")
    assert run(source)["batch_edit"]([[1, 2], [3]]) == ([3], 1)  # the fault
    assert run(replace_settings("batch-metrics", source, "easyeditor.editors.editor"))["batch_edit"]([[1, 2], [3]]) == (
        [1, 2, 3],
        3,
    )


def test_a_batch_edit_that_is_right_stays():
    right = ast.unparse(ast.parse(BATCH_EDIT.format(before="all_metrics = []", within="pass")))
    wrong_elsewhere = ast.unparse(
        ast.parse(BATCH_EDIT.format(before="pass", within="all_metrics = []").replace("batch_edit", "edit"))
    )
    for text in (right, wrong_elsewhere):
        assert replace_settings("batch-metrics", text, "easyeditor.editors.editor") == text


def test_compiled_sources_leave_no_bytecode(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    path = tmp_path / "some_module.py"
    path.write_text('where = f"cuda:{device}"\n')
    code = importing._Loader("easyeditor.some_module", str(path)).get_code("easyeditor.some_module")
    found = {"device": "cpu"}
    exec(code, found)
    assert found["where"] == "cpu"
    assert [p.name for p in tmp_path.iterdir()] == ["some_module.py"]
    SourceFileLoader("some_module", str(path)).get_code("some_module")  # Python's own does leave some
    assert (tmp_path / "__pycache__").is_dir()
