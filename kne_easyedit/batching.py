"""From facts to token ids, label masks and padded batches: the only place that calls a tokenizer.

Prompt and target are joined by one blank, and the target's tokens are those beyond the length of the
prompt tokenised alone. This is the rule of EasyEdit's evaluators, so that what is scored is what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that does not count in the loss (the convention of torch's cross-entropy)."""

_MARK = "\u2402"
"""A character that no template holds."""


@dataclass(frozen=True)
class Fact:
    """A tokenised fact."""

    prompt: str
    target: str
    ids: tuple[int, ...]
    """Tokens of prompt and target together."""
    prompt_length: int
    """Number of tokens of the prompt."""

    @property
    def answer(self) -> tuple[int, ...]:
        """Tokens ``y_1..y_s`` of the target."""
        return self.ids[self.prompt_length :]

    @property
    def positions(self) -> range:
        """The positions that predict ``y_1..y_s``: the last prompt token and all answer tokens but the last."""
        return range(self.prompt_length - 1, len(self.ids) - 1)


@dataclass(frozen=True)
class Batch:
    """Padded facts: tensors of shape ``(facts, longest)``."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    """The answer's token ids where they stand in ``input_ids``, ``IGNORE`` elsewhere."""

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def encode(tokenizer, prompt: str, target: str) -> Fact:
    """Tokenises one fact.

    Raises ValueError for an empty or blank prompt or target, a target of no tokens, or a tokenizer that
    appends an end token to every text (the answer would begin behind it).
    """
    for field, value in (("prompt", prompt), ("target_new", target)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{field}: {value!r} is empty; a fact needs a text with at least one visible character")
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token not in prompt:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} appends {tokenizer.eos_token!r} to every text, so the answer cannot "
            f"follow the prompt; load it with add_eos_token=False"
        )
    if not prompt_ids:
        raise ValueError(f"prompt: {prompt!r} has no tokens; nothing predicts the answer's first token")
    if len(ids) <= len(prompt_ids):
        raise ValueError(f"target_new: {target!r} has no tokens of its own after the prompt {prompt!r}; choose another target")
    return Fact(prompt, target, tuple(ids), len(prompt_ids))


def encode_request(tokenizer, request: Mapping, chat: bool = False) -> Fact:
    """Tokenises an EasyEdit request (``prompt``, ``target_new``, maybe ``subject``), checking it first.

    ``chat``: the prompt in the tokenizer's chat template, see `chat_prompt`.
    """
    check_request(request)
    return encode(tokenizer, chat_prompt(tokenizer, request["prompt"]) if chat else request["prompt"], request["target_new"])


def chat_prompt(tokenizer, prompt: str) -> str:
    """The prompt as a user's message in the tokenizer's chat template, up to where the answer begins.

    A prompt that is in it already stays as it is. Raises ValueError for a tokenizer without a template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"use_chat_template: {type(tokenizer).__name__} of this model has no chat template; leave the setting out")

    def rendered(text: str) -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)

    before, _, after = rendered(_MARK).partition(_MARK)
    return prompt if prompt.startswith(before) and prompt.endswith(after) else rendered(prompt)


def demand_length(fact: Fact, config) -> None:
    """Raises ValueError for a fact longer than the model (its ``config.max_position_embeddings``) can take."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and len(fact.ids) > limit:
        raise ValueError(f"prompt: {fact.prompt[:40]!r}... has {len(fact.ids)} tokens with its target, the model takes {limit}")


def check_request(request: Mapping) -> None:
    """Raises ValueError (naming field and value) for a request that cannot be edited."""
    for field in ("prompt", "target_new"):
        if not isinstance(request.get(field), str) or not request[field].strip():
            raise ValueError(f"request.{field}: {request.get(field)!r} is not a text with at least one visible character")
    subject = request.get("subject")
    if subject is not None and subject not in request["prompt"]:
        raise ValueError(
            f"request.subject: {subject!r} does not stand in the prompt {request['prompt']!r}; EasyEdit demands it "
            f"(spell it as in the prompt, or leave 'subject' out)"
        )


def collate(facts: Sequence[Fact], pad_id: int = 0, padding_side: str = "right") -> Batch:
    """Pads facts to one batch. The mask, not the pad token, decides what counts: a pad id may be any id."""
    input_ids, attention_mask = pad([fact.ids for fact in facts], pad_id, padding_side)
    labels = torch.full_like(input_ids, IGNORE)
    for i, fact in enumerate(facts):
        start = input_ids.shape[1] - len(fact.ids) if padding_side == "left" else 0
        labels[i, start + fact.prompt_length : start + len(fact.ids)] = torch.tensor(fact.answer)
    return Batch(input_ids, attention_mask, labels)


def pad(texts: Sequence[Sequence[int]], pad_id: int = 0, padding_side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of texts as one tensor ``(texts, width)``, and the mask (1: a token, 0: padding) of the same shape."""
    width = max(map(len, texts))
    input_ids = torch.full((len(texts), width), pad_id)
    attention_mask = torch.zeros((len(texts), width), dtype=torch.long)
    for i, ids in enumerate(texts):
        where = slice(width - len(ids), width) if padding_side == "left" else slice(len(ids))
        input_ids[i, where] = torch.tensor(ids)
        attention_mask[i, where] = 1
    return input_ids, attention_mask
