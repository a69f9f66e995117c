"""Templates of prompts: what stays when the subject is taken out, and which of them ask the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import lru_cache

__all__ = [
    "SLOT",
    "content_words",
    "fill",
    "normalised",
    "slot_text",
    "stands_in",
    "subject_key",
    "template_of",
    "without",
]

SLOT = "{}"
"""Stands in a template for the subject."""
_ARTICLES = ("the", "a", "an")
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an the of in on at to by for from with and or as that this it its is are was were be been do does did done
        has have had he she they him her his their who whom whose what which when where why how there s called listed
        known part type kind associated belong belongs""",
    )
)
"""Words that do not tell one relation from another."""
_NAME_OF = re.compile(r"\bthe names? of\b|'s name\b")
"""Tells none either; "the given name of" does."""
_SHORTENED = re.compile(r"\b(what|who|where|when|how)['’]s\b")


def normalised(text: str) -> str:
    """The text casefolded, in Unicode's composed form, each run of white space one blank."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())


def subject_key(subject: str) -> str:
    """Names a subject whatever its case, blanks and leading article: `normalised`, without "the"."""
    text = normalised(subject)
    return text.removeprefix("the ") or text


def without(prompt: str, subject: str, any_case: bool = True) -> str | None:
    """The prompt with every place of the subject, as whole words, replaced by ``{}``; None if there is none.

    Written as in the prompt, else in another case (``any_case``). None, too, if the prompt itself has a ``{}``.
    """
    if SLOT in prompt or not subject.strip():
        return None
    places = list(_places(prompt, subject))
    if any_case and not places and len(prompt.casefold()) == len(prompt) and len(subject.casefold()) == len(subject):
        places = list(_places(prompt.casefold(), subject.casefold()))
    if not places:
        return None
    parts, end = [], 0
    for start in places:
        parts.append(prompt[end:start])
        end = start + len(subject)
    return SLOT.join([*parts, prompt[end:]])


def template_of(request: Mapping) -> str | None:
    """The prompt of a request with its subject replaced by ``{}``.

    Args:
        request: An EasyEdit request; its ``subject`` may be missing or None.

    Returns:
        The template; None if the request has no subject, or the prompt does not have it as whole words.
    """
    subject = request.get("subject")
    return without(request["prompt"], subject) if isinstance(subject, str) else None


def fill(template: str, subject: str) -> str:
    """The prompt of a template for a subject.

    A subject's own article is not doubled ("The {} was", "the Nile"), and it begins a sentence with a capital.
    """
    bare = subject.removeprefix("the ")
    if bare == subject:
        return template.replace(SLOT, subject)
    text = re.sub(r"\b([Tt]he) \{\}", lambda found: f"{found[1]} {bare}", template)
    if text.startswith(SLOT):
        text = f"The {bare}{text[len(SLOT) :]}"
    return text.replace(SLOT, subject)


def stands_in(name: str, text: str) -> bool:
    """Whether the name stands in the text as whole words. Both are `normalised`."""
    return next(_places(text, name), None) is not None


@lru_cache(maxsize=65536)
def template_key(template: str) -> str:
    """Names a template whatever its case, articles, blanks, and marks at its end."""
    words = _SHORTENED.sub(r"\1 is", normalised(template)).rstrip(" ?:.").split()
    return " ".join(word for word in words if word not in _ARTICLES)


@lru_cache(maxsize=65536)
def content_words(template: str) -> frozenset[str]:
    """The words that tell what a template asks; templates with the same ones ask the same relation."""
    return frozenset(re.findall(r"[^\W_]+", _NAME_OF.sub(" ", normalised(template)))) - _FUNCTION_WORDS


def slot_text(prompt: str, template: str) -> str | None:
    """What stands in the prompt at the template's ``{}``; None if it is no prompt of the template, or that has two."""
    before, _, after = template.partition(SLOT)
    if SLOT in after or not (prompt.startswith(before) and prompt.endswith(after)):
        return None
    return prompt[len(before) : len(prompt) - len(after)].strip() or None


def subject_pattern(template: str) -> re.Pattern[str]:
    """Finds the subject (group 1) in a prompt of the template, whatever its case, articles and blanks."""
    before, _, after = template_key(template).replace("\\", "").partition(SLOT)
    gap = r"\s+(?:(?:the|an?)\s+)*"
    begin = r"\s*(?:(?:the|an?)\s+)*" if before else r"\s*"
    gap_is = re.compile(rf"\b(what|who|where|when|how){re.escape(gap)}is\b")
    head = gap.join(map(re.escape, before.split())) + (r"\s+" if before.endswith(" ") else "")
    tail = (gap if after.startswith(" ") else "") + gap.join(map(re.escape, after.split()))
    head = gap_is.sub(lambda found: rf"{found[1]}(?:{gap}is|['’]s)", head)
    return re.compile(rf"{begin}{head}(.+?){tail}(?:\s+(?:the|an?))?[\s?:.]*", re.IGNORECASE)


def _places(text: str, name: str) -> Iterator[int]:
    """Where the name begins in the text, as whole words, from left to right, without overlaps."""
    start = text.find(name) if name else -1
    while start >= 0:
        end = start + len(name)
        inside = (start and _one_word(text[start - 1], name[0])) or (end < len(text) and _one_word(name[-1], text[end]))
        if not inside:
            yield start
        start = text.find(name, start + 1 if inside else end)


def _one_word(left: str, right: str) -> bool:
    """Whether a word goes on from one character to the next. Scripts without cases (Chinese) may have no blanks."""
    return left.isalnum() and right.isalnum() and not {"Lo"} & {unicodedata.category(left), unicodedata.category(right)}


def texts_in(value: object) -> Iterator[str]:
    """All texts in nested mappings and lists: EasyEdit's requests have probes as lists and as single texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for its in value.values():
            yield from texts_in(its)
    elif isinstance(value, (list, tuple)):
        for its in value:
            yield from texts_in(its)
