"""Values as messages show them."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def shorten(value: object, longest: int = 120) -> str:
    """The repr of ``value``, cut to a readable length, for messages."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
        return f"a {type(value).__name__} that is too large to print"
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"


def printable(value: object) -> str:
    """Any value's ``str`` as one line without effect on a terminal: blanks are merged, what is not printed is one.

    Escape sequences and marks that turn the direction of text are not printed.
    """
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def without_effects(text: str) -> str:
    """A text of several lines without effect on a terminal: what is not printed is a blank each, line feeds stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage with two digits; "-" for None."""
    return "-" if share is None else f"{share:.2%}"


def require_one_of(name: str, value: object, known: Collection[str]) -> None:
    """Raises ValueError, with the nearest valid name, if ``value`` of the setting ``name`` is not one of ``known``."""
    if not isinstance(value, str) or value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: {value!r} must be one of {tuple(known)}{hint}")


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: half a surrogate pair, and bytes of another encoding, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
