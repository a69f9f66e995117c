"""A model that is already loaded, in the form in which EasyEdit accepts it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.facts.encoding import Tokenizer


class LoadedModel(str):
    """A model's name that carries the loaded model: a value for ``model_name``.

    EasyEdit's editor loads a model only if this is exactly a ``str``; anything else it unpacks as ``model, tokenizer``.
    The evaluators use string methods only. So one model serves all methods, under any name.
    """

    model: nn.Module
    tokenizer: Tokenizer

    def __new__(cls, name: str, model: nn.Module, tokenizer: Tokenizer) -> LoadedModel:
        """The name, with the model and its tokenizer attached."""
        self = super().__new__(cls, name)
        self.model, self.tokenizer = model, tokenizer
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return str.__str__(self)  # results and settings are copied; the model never should be

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str.__str__(self),)


def prepare_tokenizer(tokenizer: Tokenizer, alg_name: str) -> None:
    """Sets padding side and pad token as EasyEdit does when it loads a model for this method."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    tokenizer.padding_side = traits_of(alg_name).padding_side
