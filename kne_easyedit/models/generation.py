"""Text as the caller asks for it, whatever the model's own generation settings are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ELSEWHERE = {*_TOKENS, "transformers_version", "_from_model_config", "use_cache", "do_sample", "temperature"}
_ELSEWHERE |= {"top_k", "top_p", "min_p", "max_length", "max_new_tokens", "output_attentions", "output_hidden_states"}
"""Settings without effect on greedy text of a length that the caller gives."""


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Inside, ``model.generate`` follows its arguments; of the model's own generation settings only the special tokens.

    Many models come with a repetition penalty or the like (``generation_config.json``), which ``do_sample=False`` does
    not switch off: greedy text is then not what the model predicts.

    Args:
        model: A model of transformers, or one that PEFT has wrapped. Its generation settings are back in their place
            afterwards.
    """
    from transformers import GenerationConfig

    # PEFT's `generate` gives the model below it the wrapper's settings, and leaves them there.
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in _TOKENS})
    try:
        yield
    finally:
        model.generation_config = own


def own_generation(model: Any) -> dict[str, Any]:
    """The model's own generation settings that `plain_generation` takes away, by name; most models have none."""
    own = getattr(model, "generation_config", None)
    found = {} if own is None else own.to_diff_dict()
    return {name: value for name, value in sorted(found.items()) if name not in _ELSEWHERE and value is not None}
