"""Write the comments of hparams/KNE/*.yaml: at each setting the first sentence of its docstring in `KNEHyperParams`.

python scripts/comment_settings.py            # rewrites the files; values and all other lines stay
python scripts/comment_settings.py --check    # only names the files that would change; exit code 1 if there are any
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from itertools import pairwise
from pathlib import Path

from kne_easyedit.hparams import KNEHyperParams

FOLDER = Path(__file__).resolve().parents[1] / "hparams" / "KNE"
COLUMN = 27
"""Where comments begin, if the setting is not longer."""


def field_help() -> dict[str, str]:
    """Setting -> the first sentence of its docstring, as plain text (null for None) without a full stop."""
    body = [node for tree in ast.parse(inspect.getsource(KNEHyperParams)).body for node in getattr(tree, "body", [])]
    found = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            first = re.split(r"\.(?=\s+[A-Z]|\s*$)", " ".join(str(text.value.value).split()))[0]
            found[ast.unparse(field.target)] = re.sub(r"\bNone\b", "null", first.replace("`", ""))
    return found


_SETTING = re.compile(r"""(?:"[^"]*"|[^"#])*""")
"""A line up to its comment; texts in quotes may hold the sign of a comment."""


def commented(text: str) -> str:
    """The text of a settings file with the comment of each setting replaced, and all else as it is."""
    helps, lines = field_help(), []
    for line in text.splitlines():
        name = line.split(":", 1)[0]
        if name in helps:
            setting = _SETTING.findall(line)[0].rstrip()
            line = f"{setting.ljust(COLUMN - 2)}  # {helps[name]}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrites or checks the files. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a file would change")
    check = parser.parse_args().check
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yaml"))}
    stale = [path for path, text in texts.items() if commented(text) != text]
    for path in stale:
        print(f"{path.relative_to(FOLDER.parents[1])}: {'comments differ from KNEHyperParams' if check else 'written'}")
        if not check:
            path.write_text(commented(texts[path]), encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
