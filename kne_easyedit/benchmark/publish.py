"""The files of a report: Markdown, the same as a self-contained HTML page, figures, and the numbers as JSON."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from kne_easyedit._util.files import atomic_write
from kne_easyedit.benchmark import collect
from kne_easyedit.benchmark.markdown_report import report_text
from kne_easyedit.benchmark.records import record_lines
from kne_easyedit.benchmark.sources import MANIFESTS, RECORDS
from kne_easyedit.benchmark.tables import figures


def publish(found: collect.Collection, folder: Path, title: str = "KnowEdit comparison") -> Path:
    """Writes ``report.md``, ``report.html``, ``report.json``, the runs' ``manifests.json``, their ``records.jsonl``
    without the texts of the data (`records.record_lines`), and the figures.

    Args:
        found: The result lines.
        folder: Where the files are written.
        title: Of the report.

    Returns:
        The path of the page.

    Raises:
        ImportError: If matplotlib, scipy or markdown-it-py is missing.
    """
    from kne_easyedit.benchmark.figures import draw_all

    pictures = draw_all(found, folder)
    text = report_text(found, title, pictures)
    atomic_write(folder / "report.md", text)
    atomic_write(folder / "report.html", page(text, title, folder, pictures))
    atomic_write(folder / "report.json", json.dumps(figures(found), indent=1) + "\n")
    atomic_write(folder / MANIFESTS, json.dumps(found.manifests, indent=1, ensure_ascii=False) + "\n")
    encode = json.JSONEncoder(ensure_ascii=False).encode
    atomic_write(folder / RECORDS, (encode(its) + "\n" for its in record_lines(found)))
    return folder / "report.html"


def page(text: str, title: str, folder: Path, pictures: Collection[str] = ()) -> str:
    """The Markdown as one self-contained HTML page. HTML in the text stays text, except ``<u>``; there are no links.

    Args:
        text: The report.
        title: Of the page.
        folder: Where the pictures are.
        pictures: Names of the files that are embedded; other images of the text become their captions.

    Raises:
        ImportError: If markdown-it-py is missing.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ImportError("report: the HTML page needs markdown-it-py: pip install 'kne_easyedit[report]'") from error
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink", "reference"])
    renderer.inline.ruler.push("underline", _underline)

    def image(self: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        name, caption = str(tokens[index].attrs["src"]), html.escape(tokens[index].content)
        return f'<img src="{_embedded(folder / name)}" alt="{caption}">' if name in pictures else caption

    renderer.add_render_rule("image", image)
    body = renderer.render(text)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return PAGE.format(title=html.escape(title), body=body)


def _underline(state: Any, silent: bool) -> bool:
    """A rule of markdown-it: ``<u>`` and ``</u>``, which Markdown has no mark for."""
    for tag, kind, nesting in (("<u>", "underline_open", 1), ("</u>", "underline_close", -1)):
        if state.src.startswith(tag, state.pos):
            if not silent:
                state.push(kind, "u", nesting)
            state.pos += len(tag)
            return True
    return False


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">\
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 86rem; margin: 2rem auto; padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 2.5rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; }}
th, td {{ padding: 0.25rem 0.6rem; text-align: left; border-bottom: 1px solid #8884; vertical-align: top; }}
td[style*="right"] {{ white-space: nowrap; }}
th {{ border-bottom: 2px solid #888; white-space: nowrap; }}
img {{ max-width: 100%; height: auto; background: #fff; }}
</style></head><body>
{body}</body></html>
"""
