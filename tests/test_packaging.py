"""What is published: lists by hand are complete, the wheel and the sdist hold what they should."""

from __future__ import annotations

import configparser
import fnmatch
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import HANGS
from packaging.requirements import Requirement

from kne_easyedit import __version__

ROOT = Path(__file__).parents[1]
COPIED = ("*.cff", "*.in", "*.md", "*.toml", "LICENSE", "Makefile", "hparams", "kne_easyedit", "setup.cfg", "tests")
"""The sources of a distribution: everything else here is made of them, or is not published."""


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


APART = "ability"
"""The extra that has pins of its own beside the constraints, in .ci/ability.txt."""


def pins(file: str = "constraints.txt") -> dict[str, list[Requirement]]:
    """Name of a package -> its lines in the constraints, one or one for each range of Pythons."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / ".ci" / file).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(normalized(requirement.name), []).append(requirement)
    return found


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# Lists by hand


def packages(config: configparser.ConfigParser) -> dict[str, Path]:
    """Name of a package -> its folder."""
    moved = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    names = config["options"]["packages"].split()
    return {name: ROOT / moved.get(name, name.replace(".", "/")) for name in names}


def test_every_folder_of_modules_is_a_package_that_is_installed(config):
    folders = {path.parent for path in (ROOT / "kne_easyedit").rglob("__init__.py")}
    assert {*folders, ROOT / "hparams"} == set(packages(config).values())
    assert all((folder / "__init__.py").is_file() for folder in packages(config).values())


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["version"] == __version__ and citation["preferred-citation"]["url"].endswith("/2412.20637")
    assert f"## [{__version__}] - {citation['date-released']}" in changelog


def left_out(config: configparser.ConfigParser) -> list[str]:
    """Files in the packages' folders that no list installs."""
    patterns = {name: value.split(", ") for name, value in config["options.package_data"].items()}
    found = []
    for name, folder in packages(config).items():
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            of_another = any((folder / parent / "__init__.py").exists() for parent in list(inside.parents)[:-1])
            if path.is_dir() or path.suffix in (".py", ".pyc") or of_another:
                continue
            # As in setuptools, * stops at a folder.
            if not any(
                pattern.count("/") == len(inside.parts) - 1 and fnmatch.fnmatch(str(inside), pattern)
                for pattern in patterns.get(name, [])
            ):
                found.append(str(path.relative_to(ROOT)))
    return found


def test_every_file_that_is_no_module_is_installed(config):
    assert left_out(config) == []


def test_a_file_that_no_list_installs_is_found(config):
    del config["options.package_data"]["kne_easyedit.facts"]
    assert sorted(left_out(config)) == ["kne_easyedit/facts/facts.json", "kne_easyedit/facts/relations.json"]


# Pins


def test_every_package_of_every_extra_is_pinned(config):
    extras = dict(config["options.extras_require"])
    apart = {normalized(Requirement(line).name) for line in extras.pop(APART).split()}
    wanted = [config["options"]["install_requires"], *extras.values()]
    names = {normalized(Requirement(line).name) for text in wanted for line in text.split()}
    assert names - pins().keys() == set()
    assert apart <= pins(f"{APART}.txt").keys() and not apart & pins().keys()


def test_what_these_packages_need_is_pinned_too(config):
    """As far as it is installed here; `make lint docs examples test` installs all of it."""
    extras = [*config["options.extras_require"], ""]
    todo = [*config["options"]["install_requires"].split()]
    todo += [line for name, text in config["options.extras_require"].items() if name != APART for line in text.split()]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = Requirement(todo.pop())
        name, wanted = normalized(requirement.name), frozenset(requirement.extras)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in needs:
            marker = Requirement(line).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *wanted]):
                todo.append(line.partition(";")[0])
    # pip's own torch of a GPU needs NVIDIA's packages, which are the machine's matter.
    names = {name for name, _ in seen if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert "jinja2" in names and names - pins().keys() == set()


def test_what_is_installed_for_the_page_without_resolving_is_all_that_gradio_needs():
    """But Pillow and huggingface-hub, which other packages bring in versions that it forbids."""
    there = {"pillow", "huggingface-hub"}
    lines = [Requirement(line) for line in (ROOT / ".ci/lab.txt").read_text().splitlines() if not line.startswith("#")]
    assert {normalized(line.name) for line in lines} - pins().keys() == set()
    listed = {normalized(line.name) for line in lines if line.marker is None or line.marker.evaluate()}
    pytest.importorskip("gradio", reason="WHAT THE PAGE NEEDS WAS NOT COMPARED: gradio (extra lab) is not installed")
    todo, needed = ["gradio"], set()
    while todo:
        name = todo.pop()
        if name not in needed | there:
            needed.add(name)
            found = map(Requirement, importlib.metadata.requires(name) or [])
            todo += [normalized(one.name) for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert listed == needed


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_a_package_has_one_version_for_each_python(python):
    for name, lines in pins().items():
        fitting = [line for line in lines if line.marker is None or line.marker.evaluate({"python_version": python})]
        assert len(fitting) <= 1, f"{name} for {python}: {fitting}"
        assert all(str(line.specifier).startswith("==") for line in lines)


# Hooks


def test_hooks_run_what_make_lint_runs_with_the_pinned_tools(config):
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"], (
        "others are downloaded, at versions of their own"
    )
    hooks = [hook for repository in repositories for hook in repository["hooks"]]
    tools = [re.fullmatch(r"\.venv/bin/python -m (\w+)( .*)?", hook["entry"]) for hook in hooks]
    assert all(tools) and {hook["language"] for hook in hooks} == {"system"}
    assert {tool[1] for tool in tools} <= {*config["options.extras_require"]["dev"].split()} & pins().keys()
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    of_make = [re.sub(r" (--check|\.)(?= |$)", "", line) for line in re.findall(r"python -m (.+)", lint)]
    of_hooks = [hook["entry"].partition("-m ")[2].replace(" --force-exclude", "") for hook in hooks]
    assert of_hooks == of_make


# Wheel and sdist


def build(source: Path, out: Path, *options: str) -> Path:
    """The one file that `python -m build` makes of ``source``; nothing is downloaded."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (made,) = out.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the sdist of a copy of this tree: building leaves files behind."""
    folder = tmp_path_factory.mktemp("packaging")
    (folder / "tree").mkdir()
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, folder / "tree" / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder / "tree")
    sdist = build(folder / "tree", folder / "sdist", "--sdist")
    return build(folder / "tree", folder / "wheel", "--wheel"), sdist


def test_the_wheel_holds_the_package_its_data_and_nothing_else(built):
    files = contents(built[0])
    shipped = {
        f"kne_easyedit/{path.relative_to(ROOT / 'kne_easyedit')}" for path in (ROOT / "kne_easyedit").rglob("*.py")
    }
    shipped |= {f"kne_easyedit/facts/{name}.json" for name in ("facts", "relations")}
    shipped |= {"kne_easyedit/benchmark/published.json", "kne_easyedit/py.typed"}
    settings = {path.relative_to(ROOT / "hparams") for path in (ROOT / "hparams").rglob("*") if path.is_file()}
    shipped |= {f"kne_easyedit/shipped_hparams/{path}" for path in settings if path.suffix != ".pyc"}
    assert {name for name in files if ".dist-info/" not in name} == shipped
    assert files["kne_easyedit/facts/facts.json"] == (ROOT / "kne_easyedit/facts/facts.json").read_bytes()


def test_an_installed_package_finds_its_settings_and_data(built, tmp_path):
    """Run from the unpacked wheel, with no checkout around it."""
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(tmp_path)
    program = """
from pathlib import Path
import kne_easyedit
from kne_easyedit.cli.common import shipped
from kne_easyedit.facts import load_records
assert Path(kne_easyedit.__file__).parents[1] == Path.cwd(), kne_easyedit.__file__
print((shipped() / "KNE/smollm2-135m.yaml").is_file(), len(load_records("embedded")[0]) > 20)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert done.stdout == "True True\n", done.stderr[-2000:]


def test_the_wheel_says_what_it_needs_and_brings_the_command_and_the_licence(built, config):
    files = {
        name.partition(".dist-info/")[2]: data.decode()
        for name, data in contents(built[0]).items()
        if ".dist-info/" in name
    }
    assert "kne = kne_easyedit.cli:main" in files["entry_points.txt"]
    assert files["licenses/LICENSE"] == (ROOT / "LICENSE").read_text()
    needs = {
        normalized(Requirement(line).name)
        for line in re.findall(r"^Requires-Dist: (.+)$", files["METADATA"], re.MULTILINE)
    }
    assert {"torch", "transformers", "peft", *config["options.extras_require"]["test"].split()} <= needs
    assert "Requires-Python: >=3.10" in files["METADATA"]


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in Python 3.11.3 and before
        archive.extractall(tmp_path / "source", **safe)
    assert {"tests/test_packaging.py", "tests/conftest.py", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("outputs", "docs/results", ".venv"))]
    (source,) = (tmp_path / "source").iterdir()
    assert contents(build(source, tmp_path / "wheel", "--wheel")) == contents(wheel)


def test_cleaning_leaves_what_was_measured():
    """The documents put edits, stores and days of measurements into ``outputs``."""
    (removed,) = re.findall(r"^clean:.*\n\trm -rf (.*)\n", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"build", "dist"} <= set(removed.split()) and "outputs" not in removed
