"""Where a word ends, in scripts with and without blanks between words."""

from __future__ import annotations

import unicodedata


def continues_word(following: str) -> bool:
    """Whether a text that begins with ``following`` goes on with the word that ends before it.

    Args:
        following: A character, or nothing: the end of a text.
    """
    return following.isalnum() and not is_unspaced_script(following)


def is_unspaced_script(character: str) -> bool:
    """Whether a character is of a script without blanks between words: Chinese, Japanese, Thai and related ones."""
    return unicodedata.east_asian_width(character) in "WF" or unicodedata.name(character, "").startswith(
        ("THAI ", "LAO ", "KHMER ", "MYANMAR ")
    )
