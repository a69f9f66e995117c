"""What mkdocs does not do by itself: pages from outside docs, links to files of the repository, notebooks as pages."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files, config):
    """Adds the pages that are made of files outside docs; leaves pages that do not exist out of the navigation."""
    for name, page in PAGES.items():
        if (ROOT / name).is_file():
            text = (ROOT / name).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=_linked(text, "", page)))
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        page = f"examples/{path.stem}.md"
        text = _linked(_notebook(json.loads(path.read_text(encoding="utf-8"))), "examples", page)
        files.append(File.generated(config, page, content=text))
    config.nav = _existing(config.nav, {file.src_uri for file in files})
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of a page in docs to files outside of it."""
    if (ROOT / "docs" / page.file.src_uri).is_file():
        return _linked(markdown, posixpath.join("docs", posixpath.dirname(page.file.src_uri)), page.file.src_uri)
    return markdown


def _linked(text: str, folder: str, page: str) -> str:
    """The text with links to pages of the site as links from ``page``; of a link to another file the words stay."""

    def link(found: re.Match) -> str:
        image, words, target, anchor = found[1], found[2], found[3], found[4] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            site = PAGES[path]
        elif path.startswith("docs/") and not (ROOT / path).is_dir():
            site = path.removeprefix("docs/")
        elif path.startswith("examples/") and path.endswith(".ipynb"):
            site = f"{path.removesuffix('.ipynb')}.md"
        else:
            return words
        return f"{image}[{words}]({posixpath.relpath(site, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, text)


def _existing(nav: list, known: set[str]) -> list:
    kept = []
    for entry in nav:
        title, value = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(value, list):
            value = _existing(value, known)
        if value and (isinstance(value, list) or value in known):
            kept.append(value if title is None else {title: value})
    return kept


def _notebook(notebook: dict) -> str:
    """A notebook's texts, code and stored outputs as Markdown; pictures are part of the page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        if printed.strip():
            parts.append(f"```text\n{printed.rstrip()}\n```")
        images = [output.get("data", {}).get("image/png") for output in cell["outputs"]]
        parts += [f'<img alt="output" src="data:image/png;base64,{"".join(i.split())}">' for i in images if i]
    return "\n\n".join(parts) + "\n"
