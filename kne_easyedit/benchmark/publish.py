"""The report of a comparison: one Markdown text, the same as a self-contained HTML page, its pictures and figures."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path

from kne_easyedit.benchmark.collect import Collection
from kne_easyedit.benchmark.figures import figures
from kne_easyedit.benchmark.text import report_text
from kne_easyedit.paths import atomic_write


def publish(found: Collection, folder: Path, title: str = "KnowEdit comparison") -> Path:
    """Writes ``report.md``, ``report.html``, ``report.json``, the runs' ``manifests.json`` and the pictures into ``folder``.

    Returns the page's path.
    """
    from kne_easyedit.benchmark.pictures import draw_all

    pictures = draw_all(found, folder)
    text = report_text(found, title, pictures)
    atomic_write(folder / "report.md", text)
    atomic_write(folder / "report.html", page(text, title, folder))
    atomic_write(folder / "report.json", json.dumps(figures(found), indent=1) + "\n")
    atomic_write(folder / "manifests.json", json.dumps(found.manifests, indent=1, ensure_ascii=False) + "\n")
    return folder / "report.html"


def page(text: str, title: str, folder: Path) -> str:
    """The Markdown as one HTML file that needs no other: pictures are inside. Raises ImportError without markdown-it-py."""
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ImportError("report: the HTML page needs markdown-it-py: pip install 'kne_easyedit[report]'") from error
    body = MarkdownIt("commonmark").enable("table").render(text)
    body = re.sub(r'src="([^":]+)"', lambda m: f'src="{_embedded(folder / m[1])}"', body)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return PAGE.format(title=html.escape(title), body=body)


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
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
