"""An edit or an adapter put on a model hub. Only known files are sent, and a token is never shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kne_easyedit._util.cards import card_head, has_hub_form
from kne_easyedit._util.markdown import literal
from kne_easyedit.editing.edit_files import JSON_FILE, ROWS_FILE
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.editing.lacking import lacking_note
from kne_easyedit.edits.adapter_card import facts_table, is_hub_name, shown_name
from kne_easyedit.edits.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter

CARD = "README.md"
_PATHS = re.compile(r'"((?:/|~/|\.\.?/|\.\.?\\\\|[A-Za-z]:(?:/|\\\\)|\\\\\\\\|file:)[^"\n]*)"')
"""Of files as JSON writes them, where a backslash is two: absolute ones of any system, and relative ones."""
PICTURE = "edit.png"
"""Sent where `kne show` has left it."""


class NotPushed(OSError):
    """The hub refused, or could not be reached."""


def files_to_push(folder: Path) -> dict[str, Path | bytes]:
    """What is sent of a folder: the files of an edit or of an adapter, read and checked first, and a card.

    Args:
        folder: Of `KNEEdit.save` or `save_adapter`.

    Returns:
        Name in the repository -> the file, or its content.

    Raises:
        FileNotFoundError, ValueError: The folder is neither, or damaged, or a file is a symbolic link; the message
            names it.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE, JSON_FILE, ROWS_FILE, PICTURE, CARD):
        if (folder / name).is_symlink():  # whoever made the folder would choose a file of this machine to be sent
            raise ValueError(
                f"{folder / name}: is a symbolic link, and what it points to is not sent; copy the folder with its "
                f"files (cp -rL) and push the copy"
            )
    card: Path | bytes = folder / CARD
    if (folder / CONFIG_FILE).is_file():
        read_adapter(folder)
        names = [CONFIG_FILE, WEIGHTS_FILE]
    else:
        edit = KNEEdit.load(folder)
        names = [JSON_FILE, ROWS_FILE, *([PICTURE] if (folder / PICTURE).is_file() else [])]
        if not (folder / CARD).is_file():
            card = edit_card(edit).encode()
    found: dict[str, Path | bytes] = {name: folder / name for name in names}
    if isinstance(card, bytes) or card.is_file():
        found[CARD] = card
    return found


def paths_named(folder: Path) -> list[str]:
    """Paths of this machine that the JSON files of a folder name: whoever reads the repository sees them."""
    texts = (path.read_text(encoding="utf-8") for name in (JSON_FILE, CONFIG_FILE) if (path := folder / name).is_file())
    return sorted({match for text in texts for match in _PATHS.findall(text)})


def require_repo(repo: str) -> None:
    """Raises ValueError if ``repo`` is no name of a repository."""
    if not has_hub_form(repo):
        raise ValueError(f"repo: {repo!r} is no name of a repository; write it as OWNER/NAME")


def push(files: dict[str, Path | bytes], repo: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Sends files in one commit; makes the repository if there is none.

    Args:
        files: Name in the repository -> the file, or its content.
        repo: ``owner/name``.
        private: Whether a new repository is private.
        endpoint: Address of the hub; None: that of huggingface_hub (``HF_ENDPOINT``).

    Returns:
        The address of the commit.

    Raises:
        ValueError: ``repo`` is no name of a repository.
        NotPushed: The hub refused, or could not be reached; the message does not hold the token.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    require_repo(repo)
    disable_progress_bars()
    token = get_token()
    api = HfApi(endpoint=endpoint)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done: Any = api.create_commit(repo, operations, commit_message=f"Upload by kne push: {', '.join(files)}")
    except Exception as error:  # noqa: BLE001  (the client's own errors differ from version to version)
        raise NotPushed(f"{repo}: {_without(token, error)}") from None  # the cause may hold the request's headers
    return str(done.commit_url)


def edit_card(edit: KNEEdit) -> str:
    """The text of the card of an edit, Markdown with a YAML head. Names and facts of others have no effect in it."""
    base = edit.base.name
    on_hub = is_hub_name(base) and bool(edit.base.revision)
    name = shown_name(base, on_hub)
    facts = [(str(one["prompt"]), str(one.get("target_new", ""))) for one in edit.requests]
    return "\n".join(
        [
            *card_head("kne_easyedit", base if on_hub else None, ["knowledge-editing", "kne"]),
            f"# Edited facts for {literal(name or edit.base.architecture)}",
            "",
            "Rows that are added to the weights of the base model (Knowledge Neuronal Ensemble, arXiv 2412.20637). It "
            "then gives these answers. They belong to this base, of the same revision, and to no other.",
            "",
            *facts_table(facts),
            "",
            f"- Base: {literal(name)}, {edit.base.architecture}",
            f"- {edit.size} rows of {len(edit.deltas)} modules",
            *([f"- {literal(note)}"] if (note := lacking_note([edit])) else []),
            "",
            "`kne ask FOLDER` asks the base before and after; `kne adapter FOLDER --out DIR` writes a LoRA adapter.",
            "",
        ]
    )


def _without(token: str | None, error: Exception) -> str:
    lines = list(_lines(error))
    text = " ".join(lines) or type(error).__name__
    return text.replace(token, "***") if token else text


def _lines(error: Exception) -> Iterator[str]:
    for line in str(error).splitlines():
        if line.strip():
            yield line.strip()
