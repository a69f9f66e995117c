"""A model that is already loaded, as EasyEdit takes it in the place of a name."""

from __future__ import annotations

from torch import nn

from kne_easyedit.bridge.methods import traits_of


class LoadedModel(str):
    """A model's name that carries the loaded model: what EasyEdit takes in the place of ``model_name``.

    Its editor loads only what is exactly a ``str``; anything else it unpacks as ``model, tokenizer``. The
    evaluators ask for text methods only. So one model serves all methods, under any name.
    """

    model: nn.Module
    tokenizer: object

    def __new__(cls, name: str, model: nn.Module, tokenizer) -> LoadedModel:
        self = super().__new__(cls, name)
        self.model, self.tokenizer = model, tokenizer
        return self

    def __iter__(self):
        return iter((self.model, self.tokenizer))

    def __deepcopy__(self, memo) -> str:
        return str.__str__(self)  # results and settings are copied; the model never should be

    def __reduce__(self):
        return str, (str.__str__(self),)


def prepare_tokenizer(tokenizer, alg_name: str) -> None:
    """Padding as EasyEdit sets it when it loads a model for this method."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    tokenizer.padding_side = traits_of(alg_name).padding_side
