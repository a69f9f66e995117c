"""README and docs do what they say: every Python block runs as printed, every command exists."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from kne_easyedit import cli
from kne_easyedit.facts.download import FILES

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(str(p.relative_to(ROOT)) for folder in ("docs", "docs/api") for p in (ROOT / folder).glob("*.md")),
]
FEW_NEIGHBOURS = {
    "neighbour_relation_size": 4,
    "neighbour_subject_size": 2,
    "subject_variants": 1,
    "spare_continuation": 0,
    "continuation_weight": 0.0,
}
PROMISE = re.compile(r"#\s*->\s*(.+)$")
"""Stands behind a ``print``: what its line holds."""


def blocks(page: str, language: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse((ROOT / page).read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def run_block(block: str, namespace: dict) -> None:
    """Runs a block statement by statement; what a line promises must stand in what it prints."""
    lines = block.splitlines()
    for statement in ast.parse(block).body:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module([statement], []), "<block>", "exec"), namespace)
        promises = [
            found[1].strip()
            for line in lines[statement.lineno - 1 : statement.end_lineno]
            if (found := PROMISE.search(line))
        ]
        for promise in promises:
            assert promise in printed.getvalue(), (
                f"{ast.unparse(statement)} printed {printed.getvalue()!r}, promised is {promise!r}"
            )


@pytest.mark.model
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run_as_printed(page, real_folder, tmp_path, monkeypatch):
    """On the real model; blocks of a page build on those before, and run in a folder where they may leave files.

    README has the shipped settings; other pages spare fewer neighbours, which takes a third of the time.
    """
    monkeypatch.chdir(tmp_path)
    if page == "README.md":
        (tmp_path / "hparams").symlink_to(ROOT / "hparams")
    else:
        shutil.copytree(ROOT / "hparams", tmp_path / "hparams")
        settings = tmp_path / "hparams/KNE/smollm2-135m.yaml"
        settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | FEW_NEIGHBOURS))
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        run_block(block, namespace)


def test_python_blocks_promise_something():
    promising = [
        page
        for page in PAGES
        if any(PROMISE.search(line) for block in blocks(page, "python") for line in block.splitlines())
    ]
    assert {"README.md", "docs/easyedit.md"} <= set(promising)


def test_a_promise_that_is_not_kept_is_told():
    with pytest.raises(AssertionError, match="promised is 'Rome'"):
        run_block('print("Paris")  # -> Rome\n', {})
    run_block('answer = "Rome."\nprint(\n    answer\n)  # -> Rome\n', {})


def commands(page: str) -> list[str]:
    """The commands of a page's blocks without a language, or of shell: continued lines joined, comments gone."""
    found = []
    for language in ("", "bash", "sh", "console"):
        for block in blocks(page, language):
            joined = re.sub(r"\\\n\s*", " ", block)
            found += [
                line for line in (re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines()) if line
            ]
    return found


OURS = sorted(
    {(page, command) for page in PAGES for command in commands(page) if re.match(r"([A-Z_]+=\S+ )*kne ", command)}
)


@pytest.mark.parametrize("page, command", OURS)
def test_commands_exist_with_these_options(page, command, capsys):
    words = shlex.split(command)
    words = words[next(i for i, word in enumerate(words) if word == "kne") + 1 :]
    assert not set(words) & {"|", "...", ">"}, "as pasted a shell would take it for something else"
    try:
        cli._parser().parse_args(words)
    except SystemExit as error:
        assert error.code == 0, capsys.readouterr().err


FIRST_PAGES = ("README.md", "docs/get-started.md", "docs/compare.md")
"""Their commands work as they stand."""
MADE = ("outputs/", "output/", "data/KnowEdit")
"""Folders that commands of the same page make."""


@pytest.mark.parametrize("page, command", [(page, command) for page, command in OURS if page in FIRST_PAGES])
def test_files_that_the_first_pages_name_are_there(page, command):
    """A file comes with the project, from the publisher by `kne data fetch`, or from a command before."""
    for word in shlex.split(command):
        path = word.partition("=")[2] if word.startswith("--") and "=" in word else word
        if not re.search(r"\.(json|jsonl|yaml|csv|py)$", path):
            continue
        published = any(path == f"data/KnowEdit/{name}" for name in FILES)
        elsewhere = path.startswith(("EasyEdit/", *MADE[:2]))
        assert published or elsewhere or (ROOT / path).is_file(), f"{path} comes from nowhere"


def test_commands_of_one_block_write_into_folders_of_their_own():
    for page in PAGES:
        for block in blocks(page, ""):
            runs = [
                line
                for line in re.sub(r"\\\n\s*", " ", block).splitlines()
                if line.startswith(("kne run", "kne localize", "kne explain"))
            ]
            folders = [
                re.search(r"--out (\S+)", line)[1] if "--out " in line else f"outputs/{line.split()[1]}"
                for line in runs
            ]
            assert len(folders) == len(set(folders)), f"{page}: {runs}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_targets_exist():
    for page in PAGES:
        for command in commands(page):
            for name in re.findall(r"\bmake ([\w-]+)", command):
                assert name in make_targets(), f"{page}: make {name}"


def test_make_targets_named_in_a_text_exist():
    for page in PAGES:
        for name in re.findall(r"`make ([\w-]+)[^`]*`", (ROOT / page).read_text(encoding="utf-8")):
            assert name in make_targets(), f"{page}: make {name}"


def test_scripts_exist():
    for page in PAGES:
        for name in re.findall(r"python (scripts/[\w/]+\.py)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page}: {name}"


# The site


def site() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def navigation(entries) -> list[str]:
    """The pages that a navigation names."""
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [page for value in values for page in navigation(value)]


def test_every_page_is_in_the_navigation_once():
    named = navigation(site()["nav"])
    assert len(named) == len(set(named))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    pages |= {page.lower() for page in PAGES if "/" not in page}
    pages |= {f"examples/{path.stem}.md" for path in (ROOT / "examples").glob("*.ipynb")}
    assert pages <= set(named), "mkdocs.yml"


def test_every_room_with_a_public_interface_is_in_the_reference():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    documented = set(re.findall(r"^::: kne_easyedit\.(\w+)$", text, re.MULTILINE))
    rooms = {p.parent.name for p in (ROOT / "kne_easyedit").glob("*/__init__.py") if "__all__" in p.read_text("utf-8")}
    assert documented == {*rooms, "hparams", "metrics"}


def test_the_reference_lists_the_whole_public_interface():
    import kne_easyedit

    text = (ROOT / "docs/api/index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\[`(\w+)`\]\[kne_easyedit", text)) == {*kne_easyedit.__all__} - {"__version__"}


def test_the_notation_defines_the_symbols_of_shapes():
    symbols = set(re.findall(r"^\| `([\w ]+)`", (ROOT / "docs/notation.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"d1", "d2", "s", "n", "m", "p", "layers"} <= symbols


def test_extras_that_pages_name_exist():
    import configparser

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    known = set(config["options.extras_require"])
    sources = [*PAGES, *(str(p.relative_to(ROOT)) for p in (ROOT / "kne_easyedit").rglob("*.py"))]
    for source in sources:
        for names in re.findall(r"(?:kne_easyedit|\.)\[([a-z0-9,]+)\]'", (ROOT / source).read_text(encoding="utf-8")):
            assert set(names.split(",")) <= known, f"{source}: [{names}]"
