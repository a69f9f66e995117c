"""EasyEdit's fluency without a download: its word tokenizer needs nltk's punkt data, one variant does not."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.patches import runtime_patch

PUNKT, NO_PUNKT = "punkt", "preserve_line"


@runtime_patch("fluency-without-punkt", "the fluency metric needs nltk's punkt data, a download: LookupError")
def _split_without_punkt(easyeditor: ModuleType) -> bool:
    if _has_punkt():
        return False
    evaluators = module("evaluate.evaluate_utils")
    nltk = evaluators.nltk
    lenient: Any = ModuleType("nltk")  # only EasyEdit's evaluators see it
    lenient.__dict__.update({name: value for name, value in vars(nltk).items() if not name.startswith("__")})
    lenient.word_tokenize = functools.partial(nltk.word_tokenize, preserve_line=True)
    evaluators.nltk = lenient
    return True


def fluency_variant() -> str:
    """How EasyEdit's evaluators split words here.

    Returns:
        ``punkt`` (unchanged), or ``preserve_line``: without splitting sentences first, so that a period inside a text
        stays with its word.

    Raises:
        ImportError: nltk's data is missing, and the patch is switched off.
    """
    tokenize = module("evaluate.evaluate_utils").nltk.word_tokenize
    if isinstance(tokenize, functools.partial):
        return NO_PUNKT
    if not _has_punkt():
        raise ImportError(
            "fluency: nltk's punkt data is missing and the patch fluency-without-punkt is switched off; "
            "get it by nltk.download('punkt_tab')"
        )
    return PUNKT


def _has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
        return True
    except LookupError:
        return False
