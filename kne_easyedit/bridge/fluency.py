"""EasyEdit's fluency without a download: its word tokenizer wants nltk's punkt data, one variant needs none."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

PUNKT, NO_PUNKT = "punkt", "preserve_line"


def prepare_fluency() -> str:
    """Lets EasyEdit compute fluency on this machine; returns which variant: ``punkt`` (as is) or ``preserve_line``.

    ``preserve_line`` splits words without splitting sentences first, so that a period inside a text stays with its
    word. It is put in only if the punkt data is missing, and only where EasyEdit's evaluators look.
    """
    import nltk

    evaluators = importlib.import_module("easyeditor.evaluate.evaluate_utils")
    if getattr(evaluators.nltk, "_kne_variant", None):
        return NO_PUNKT
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
        return PUNKT
    except LookupError:
        lenient = ModuleType("nltk")
        lenient.__dict__.update({name: value for name, value in vars(nltk).items() if not name.startswith("__")})
        lenient.word_tokenize = functools.partial(nltk.word_tokenize, preserve_line=True)
        lenient._kne_variant = NO_PUNKT
        evaluators.nltk = lenient
        return NO_PUNKT
