"""Values as messages show them."""

from __future__ import annotations


def shorten(value: object, longest: int = 120) -> str:
    """The repr of ``value``, cut to a readable length, for messages."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
        return f"a {type(value).__name__} that is too large to print"
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"
