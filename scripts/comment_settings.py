"""Write the comments of hparams/KNE/*.yaml: at each setting the first sentence of its docstring in `KNEHyperParams`.

python scripts/comment_settings.py            # rewrites the files; values and all other lines stay
python scripts/comment_settings.py --check    # only names the files that would change; exit code 1 if there are any
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kne_easyedit._util import settings_text
from kne_easyedit._util.files import atomic_write
from kne_easyedit.hparams import KNEHyperParams

FOLDER = Path(__file__).resolve().parents[1] / "hparams" / "KNE"


def field_help() -> dict[str, str]:
    """Setting of `KNEHyperParams` -> its comment."""
    return settings_text.field_help(KNEHyperParams)


def commented(text: str) -> str:
    """The text of a settings file with the comment of each setting replaced, and all else as it is."""
    return settings_text.commented(text, field_help())


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
            atomic_write(path, commented(texts[path]))
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
