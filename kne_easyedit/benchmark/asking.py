"""What a model says of many prompts at once: greedy continuations, predicted tokens, probabilities of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from kne_easyedit.bridge.layer_patches import at_position, reads_whole_texts
from kne_easyedit.facts.encoding import Fact, Tokenizer, encode, pad, require_known, require_length
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.generation import plain_generation

AT_ONCE = 16
"""Texts in one pass: a record's probes with their answers fit, and the logits of large vocabularies stay small."""
Item = TypeVar("Item")


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    length: int,
    *,
    at_once: int = AT_ONCE,
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """The greedy continuations of some prompts: at each place the most probable token (`plain_generation`).

    Args:
        model: Its ``config.max_position_embeddings`` limits the length.
        tokenizer: Of the model.
        prompts: Texts, any number of them.
        length: Tokens of a continuation at most.
        at_once: Prompts in one pass. A prompt is asked together with the same others only if the list is the same.
        ended: Whether a continuation, as tokens, need not go on; None: only the end token ends it.

    Returns:
        The tokens of each continuation, the end token included where the model gave it.
    """
    found: list[list[int]] = []
    whole = reads_whole_texts(model)
    for some in _chunks(prompts, 1 if whole else at_once):
        ids, mask = pad([tokenizer(prompt)["input_ids"] for prompt in some], tokenizer.eos_token_id or 0, "left")
        start = ids.shape[1]
        limit = getattr(model.config, "max_position_embeddings", None)
        device = device_of(model)
        options: dict[str, Any] = {} if ended is None else {"stopping_criteria": [_criterion(ended, start)]}
        if whole:
            options["use_cache"] = False
        with plain_generation(model), at_position(model, start - 1):
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=min(length, limit - start) if limit else length,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
                **options,
            )
        ends = _end_tokens(model, tokenizer)
        found += [_up_to_end(row, ends) for row in out[:, start:].tolist()]
    return found


@torch.no_grad()
def predicted(model: Any, facts: Sequence[Fact], *, at_once: int = AT_ONCE) -> list[list[int]]:
    """The tokens that a model predicts at the positions of each answer, the answer's tokens before given.

    Args:
        model: A model of transformers.
        facts: Prompts with answers.
        at_once: Facts in one pass.

    Returns:
        One token id for each token of each answer.
    """
    return [logits.argmax(-1).tolist() for logits in _logits(model, facts, at_once)]


@torch.no_grad()
def probabilities(model: Any, facts: Sequence[Fact], *, at_once: int = AT_ONCE) -> list[float]:
    """The probability of each whole answer after its prompt: the product over its tokens, no end token behind."""
    found = []
    for fact, logits in zip(facts, _logits(model, facts, at_once)):
        answer = torch.tensor(fact.answer, device=logits.device)
        of_tokens = logits.double().log_softmax(-1).gather(-1, answer[:, None])
        found.append(of_tokens.sum().exp().item())
    return found


def askable(model: Any, tokenizer: Tokenizer, prompt: str, answer: str | None, separator: str) -> Fact | None:
    """Prompt and answer as a fact; None if there is no answer, or tokenizer or model cannot take them."""
    try:
        fact = encode(tokenizer, prompt, answer or "", separator)
        require_length(fact, model.config)
        require_known(fact, model)
    except ValueError:
        return None
    return fact


def _logits(model: Any, facts: Sequence[Fact], at_once: int) -> Iterator[torch.Tensor]:
    """For each fact the logits ``(answer's tokens, vocabulary)`` at the positions of its answer."""
    device = device_of(model)
    for some in _chunks(facts, at_once):
        ids, mask = pad([fact.ids for fact in some])  # padded at the right: positions are those of a single text
        with at_position(model, some[0].positions.start):  # methods whose layer looks at one place are asked one by one
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        for row, fact in zip(logits, some):
            yield row[fact.positions.start : fact.positions.stop]


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _criterion(ended: Callable[[list[int]], bool], start: int) -> Any:
    def stop(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor([ended(row) for row in ids[:, start:].tolist()], device=ids.device)

    return stop


def _end_tokens(model: Any, tokenizer: Tokenizer) -> set[int]:
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id} - {None}


def _up_to_end(ids: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first end token, that included; what follows it in a batch is padding."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)
