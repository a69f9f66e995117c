"""Neighbours that the unedited model names itself: for a fact whose kind no data file and no packaged relation has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.facts.neighbours import FactPool, KnownFact, packaged_pool, prompts_of
from kne_easyedit.facts.templates import SLOT, content_words, normalised, slot_text, stands_in, subject_key
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.generation import plain_generation
from kne_easyedit.models.state import preserve_state

__all__ = ["named_subjects", "own_pool"]

EXAMPLES = (
    ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna"),
    ("cat", "dog", "horse", "cow", "sheep", "goat"),
    ("Mozart", "Bach", "Haydn", "Verdi", "Chopin", "Liszt"),
    ("iron", "copper", "tin", "zinc", "lead", "nickel"),
)
"""Lines of names of one kind that show the model what is wanted."""
_SHOWN = "Each line is a list of names of one kind.\n" + "".join(f"{', '.join(line)}\n" for line in EXAMPLES)
PATTERNS = (f"{_SHOWN}{SLOT},", f"1. {SLOT}\n2.", f"Examples of the same kind are {SLOT},")
"""What the model is asked to continue. The last two do without examples: what these show colours what it names."""
LENGTH = 28
"""Tokens of a continuation."""
WORDS, CHARACTERS = 5, 40
"""Longest name."""
FEWEST = 2
"""Names that a continuation must give, or it is no list."""
_SENTENCE = re.compile(
    r"\b(is|are|was|were|has|have|had|be|been|which|who|whose|that|this|these|those|where|when|because|its|their|his|her|"
    r"also|etc|can|will|such|so|it|they|he|she|you|we|i)\b",
    re.IGNORECASE,
)
"""Words of sentences, not of names."""


def own_pool(model: Any, tokenizer: Tokenizer, request: Mapping, n: int = 24) -> FactPool:
    """A pool of the request's template with subjects that the model itself names as being of the subject's kind.

    To be asked by `FactPool.relation_prompts` with ``request``, which leaves out aliases, answers and what is held out.

    Args:
        model: The unedited model; it is left exactly as it was.
        tokenizer: Of the model.
        request: An EasyEdit request; without ``subject`` it is found as `FactPool.locate` does.
        n: Number of subjects at most.

    Returns:
        The pool; it is empty where the model names nothing sensible, or the request has no subject.
    """
    place = packaged_pool().locate(request)
    if place is None:
        return FactPool([])
    subject, template = place
    aliases = {found for prompt in prompts_of({**request, "locality": {}}) if (found := slot_text(prompt, template))}
    names = named_subjects(model, tokenizer, subject, n, aliases - {subject})
    return FactPool([KnownFact(name, template, kind="named by the model") for name in names])


def named_subjects(
    model: Any, tokenizer: Tokenizer, subject: str, n: int = 24, aliases: frozenset[str] | set[str] = frozenset()
) -> list[str]:
    """Names that the model gives as being of a subject's kind, by greedy continuation of `PATTERNS`.

    Args:
        model: The model; it is left exactly as it was.
        tokenizer: Of the model.
        subject: The subject.
        n: How many at most.
        aliases: Other names of the subject.

    Returns:
        The names, those that several patterns give first; none where what the model writes is no list of names.
    """
    found: Counter[str] = Counter()
    with preserve_state(model):
        for pattern in PATTERNS:
            safe_point()
            text = _continued(model, tokenizer, pattern.replace(SLOT, subject))
            found.update(names_in(text, subject, aliases))
    return [name for name, _ in found.most_common(n)]


def names_in(text: str, subject: str, aliases: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """The names of a list that a model wrote after the subject, without those that are no names of its kind.

    A list stands in one line, separated by commas, or in numbered lines. The last entry may be cut off, and is left
    out unless the list ends before the text does. Left out are, too: the subject, its aliases, what has them as a part
    or is a part of them; the names of `EXAMPLES`; sentences; names that begin otherwise than the subject (capital or
    not).

    Returns:
        The names in their order; none if they are fewer than `FEWEST`.
    """
    lines = [line.strip() for line in text.split("\n")]
    if len(lines) > 1 and re.match(r"\d+\.", lines[1]):
        parts = [re.sub(r"^\d+\.\s*", "", line) for line in lines if line][:-1]
    else:
        first = re.split(r"(?<=[^.\s]{3})[.;:!?](?:\s|$)", lines[0])
        ended = len(first) > 1 or len(lines) > 1
        parts = re.split(r",|\band\b|\bor\b", first[0])[: None if ended else -1]
    shown = {subject_key(name) for line in EXAMPLES for name in line}
    own = {subject_key(name) for name in (subject, *aliases)}
    found: dict[str, str] = {}
    for part in parts:
        name = re.sub(r"^(?:and|or)\s+", "", part.split("(")[0].strip(" \t-*\"'“”()[].;:"))
        key = subject_key(name)
        if key in found or key in shown or not _is_name(name, subject):
            continue
        # "ToyotaCorp", too, is no neighbour of Toyota
        if not any(stands_in(key, other) or key.startswith(other) or stands_in(other, key) for other in own):
            found[key] = name
    return list(found.values()) if len(found) >= FEWEST else []


def _is_name(text: str, subject: str) -> bool:
    """Whether a text looks like a name of the subject's kind: short, no sentence, with the same first letter's case."""
    if not text or len(text) > CHARACTERS or len(text.split()) > WORDS or _SENTENCE.search(text):
        return False
    bare, other = (re.sub(r"^(?:the|an?)\s+", "", name, flags=re.IGNORECASE) for name in (text, subject))
    if not content_words(bare) or not any(letter.isalpha() for letter in bare):
        return False
    # A name of digits throughout, or none at all: "HD 85622" has kin of its own form
    if any(letter.isdigit() for letter in bare) != any(letter.isdigit() for letter in other):
        return False
    return bare[0].isupper() == other[0].isupper() and normalised(bare) != normalised(other)


def _continued(model: Any, tokenizer: Tokenizer, prompt: str) -> str:
    """The greedy continuation of a prompt."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device_of(model))
    longest = getattr(model.config, "max_position_embeddings", None)
    length = LENGTH if longest is None else min(LENGTH, longest - ids.shape[1])
    if length < 1:
        return ""
    with plain_generation(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            no_repeat_ngram_size=3,  # a name with the comma after it, so that a list goes on
            pad_token_id=tokenizer.eos_token_id,
            use_cache=True,
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
