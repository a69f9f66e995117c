"""The layout of the package: data flows one way, and what is public is listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kne_easyedit

PACKAGE = Path(kne_easyedit.__file__).parent
ROOMS = (
    "_util",
    "metrics",
    "facts",
    "models",
    "attribution",
    "localization",
    "editing",
    "hparams",
    "edits",
    "bridge",
    "benchmark",
    "doctor",
    "studies",
    "lab",
    "cli",
)
"""From the bottom to the top: a room imports from itself and from those before it."""
PUBLIC = """
Answer Batch EditFailed EditLost EditStore Fact KNEEdit KNEHyperParams NeuronEnsemble RowEdit UnsupportedModel
__version__ aggregate answer_loss apply_kne_to_model attribute collate compute_edit encode find_ensemble forget
load_records localize restore row_adapter select_ensemble train_rows write_rows
"""
LONGEST_FILE = 400
"""Lines."""


def sources(folder: Path = PACKAGE) -> dict[str, Path]:
    """Name of a module below the package -> its file."""
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(path: Path, known: set[str]) -> Iterator[str]:
    """The package's modules that a file imports anywhere in it, in functions and for type checking, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            if node.module and node.module.split(".")[0] == "kne_easyedit":
                base = node.module.removeprefix("kne_easyedit").lstrip(".")
                for alias in node.names:
                    name = f"{base}.{alias.name}".lstrip(".")
                    yield name if name in known else base
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("kne_easyedit.")
                for alias in node.names
                if alias.name.startswith("kne_easyedit.")
            )


def backward(modules: dict[str, Path]) -> list[str]:
    """Imports of a room from one above it."""
    found = []
    for name, path in modules.items():
        room = name.split(".")[0]
        if room not in ROOMS:
            continue
        for imported in imports(path, set(modules)):
            target = imported.split(".")[0]
            if target in ROOMS and ROOMS.index(target) > ROOMS.index(room):
                found.append(f"{name} -> {imported}")
    return found


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, if there are any."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        found = next(filter(None, (visit(other, [*way, name]) for other in sorted(graph.get(name, ())))), None)
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in sorted(graph))), None)


def test_every_module_is_in_a_room():
    rooms = {name.split(".")[0] for name in sources()} - {"", "_version"}
    assert rooms == set(ROOMS)


def test_imports_go_down_only():
    assert backward(sources()) == []


def test_no_modules_import_each_other_in_a_circle():
    modules = sources()
    graph = {name: {other for other in imports(path, set(modules)) if other != name} for name, path in modules.items()}
    # A room's __init__ names what is in it; its own modules import each other by their full names.
    graph = {name: {other for other in found if not name.startswith(f"{other}.")} for name, found in graph.items()}
    assert circle(graph) is None


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from kne_easyedit.bridge import register\n", ["facts.x -> bridge"]),
        ("def f():\n    from kne_easyedit.editing.edit import compute_edit\n", ["facts.x -> editing.edit"]),
        ("import kne_easyedit.hparams\n", ["facts.x -> hparams"]),
        ("from kne_easyedit._util.digest import digest\n", []),
    ],
)
def test_an_import_that_runs_back_is_found(tmp_path, source, found):
    (tmp_path / "x.py").write_text(source)
    assert backward({**sources(), "facts.x": tmp_path / "x.py"}) == found


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_public_api_is_what_init_names():
    assert sorted(kne_easyedit.__all__) == sorted(PUBLIC.split())
    assert all(hasattr(kne_easyedit, name) for name in kne_easyedit.__all__)


def test_a_room_says_in_three_lines_what_it_is_for():
    for path in PACKAGE.glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text and 2 <= len([line for line in text.splitlines() if line]) <= 4, path


def test_no_file_is_too_long():
    root = PACKAGE.parent
    files = [path for folder in (PACKAGE, root / "scripts", root / "tests") for path in folder.rglob("*.py")]
    long = {str(p.relative_to(root)): n for p in files if (n := len(p.read_text().splitlines())) > LONGEST_FILE}
    assert not long


def test_tests_mirror_the_rooms():
    tests = PACKAGE.parent / "tests"
    folders = {path.parent.name for path in tests.glob("*/test_*.py")}
    assert folders <= {*ROOMS, "scripts", "cluster"}
    names = [path.name for path in tests.rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest knows test modules by their base names"


def test_annotations_count_for_users():
    assert (PACKAGE / "py.typed").is_file()
