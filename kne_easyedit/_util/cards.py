"""Cards of models and adapters (README.md): the hub's names, and the YAML head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def has_hub_form(name: str) -> bool:
    """Whether a name has the form ``owner/model`` of the hub. So has a relative path."""
    return _HUB_NAME.fullmatch(name) is not None


def card_head(library: str, base: str | None, tags: Sequence[str], **more: str) -> list[str]:
    """The YAML head of a card, ``base`` the hub's name of the base model, if it has one."""
    head: dict[str, Any] = {"library_name": library, **more}
    if base is not None:
        head["base_model"] = base
    head["tags"] = list(tags)
    return ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(), "---", ""]
