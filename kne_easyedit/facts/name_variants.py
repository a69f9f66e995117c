"""Other spellings of a subject's name, by rules alone: shortened, with an initial, without diacritics."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kne_easyedit.facts.index import FactIndex, prompts_of
from kne_easyedit.facts.templates import content_words, fill, normalised, stands_in, subject_key, template_of, without

_OTHERS = frozenset(
    re.findall(
        r"\w+",
        """new old north south east west northern southern eastern western central upper lower inner outer great greater
        little equatorial anti non pre post not""",
    )
)
"""First words that name something else than what follows them: New Mexico is not Mexico."""
_HYPHENS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014", "-"))


def name_variants(name: str) -> list[str]:
    """Variants of a name, each once, the name itself left out.

    In this order: without the first word (but New Mexico is not called Mexico), the first word as an initial, without
    the last word, first and last word of three or more, with "the", without diacritics, with plain hyphens, with a
    middle initial. None begins or ends with a function word that stood inside the name ("of England"), or has one
    letter.

    Args:
        name: A subject's name.

    Returns:
        The variants; a name of one word has few.
    """
    found: dict[str, str] = {}
    for variant in _by_rules(" ".join(name.split())):
        if normalised(variant) != normalised(name) and len(variant) > 1 and content_words(variant):
            found.setdefault(normalised(variant), variant)
    return list(found.values())


def _by_rules(name: str) -> Iterator[str]:
    words = name.split(" ")
    if len(words) > 1:
        if content_words(words[1]):
            if normalised(words[0]) not in _OTHERS:
                yield " ".join(words[1:])
            if words[0][0].isupper() and content_words(words[0]):
                yield " ".join([f"{words[0][0]}.", *words[1:]])
        if content_words(words[-2]):
            yield " ".join(words[:-1])
    if len(words) > 2:
        yield f"{words[0]} {words[-1]}"
    if normalised(words[0]) not in ("the", "a", "an"):
        yield f"the {name}"
    decomposed = unicodedata.normalize("NFD", name)
    yield unicodedata.normalize("NFC", "".join(c for c in decomposed if not unicodedata.combining(c)))
    yield name.translate(_HYPHENS)
    if len(words) == 2 and all(word[0].isupper() and content_words(word) for word in words):
        yield f"{words[0]} {words[1][0]}. {words[1]}"


def variant_prompts(
    request: Mapping[str, Any],
    n: int,
    exclude: Iterable[str] = (),
    known: Iterable[FactIndex] = (),
    asked: Iterable[str] = (),
) -> list[str]:
    """The request's prompt with variants of its subject's name, ``n`` at most.

    Left out is a variant that stands anywhere in the request beside the subject itself (an alias that is asked), that
    the request names as another subject (``neighbours``), that names what another fact is about, or that stands in a
    prompt about other subjects that is asked later.

    Args:
        request: An EasyEdit request.
        n: How many at most.
        exclude: Prompts and subjects of other facts (`run_exclusions`).
        known: Facts whose subjects are no variants of this one.
        asked: Prompts about other subjects, in any words, that are asked later.

    Returns:
        The prompts; none for a request without a subject.
    """
    template = template_of(request)
    if template is None:
        return []
    prompts, exclude, known = prompts_of(request), tuple(exclude), tuple(known)
    own = subject_key(request["subject"])
    texts = [normalised(without(prompt, request["subject"]) or prompt) for prompt in (*prompts, *asked)]
    taken = {normalised(prompt) for prompt in (*prompts, *exclude)}
    others = {subject_key(name) for name in (*exclude, *(request.get("neighbours") or ()))}

    def another(name: str) -> bool:
        return name != own and (name in others or any(facts.knows(name) for facts in known))

    found = []
    for variant in name_variants(request["subject"]):
        prompt = fill(template, variant)
        if (
            normalised(prompt) not in taken
            and not another(subject_key(variant))
            and not any(stands_in(normalised(variant), text) for text in texts)
        ):
            found.append(prompt)
    return found[:n]
