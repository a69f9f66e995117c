"""Encodes facts as token ids, label masks and padded batches.

Prompt and target are joined by the separator alone (by default a blank): neither has blanks where they meet. The
target's tokens are those after the length of the prompt tokenised alone. EasyEdit's evaluators follow the same rule, so
that what is scored is what is trained; where it would split at a wrong place, the fact is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kne_easyedit._util.messages import shorten

Tokenizer: TypeAlias = Any
"""A tokenizer of transformers. Not its class: importing that for a type would cost a second."""

IGNORE = -100
"""Label of a position that does not count in the loss (the convention of torch's cross-entropy)."""

SEPARATOR = " "
"""Default text between prompt and target; empty for scripts without blanks between words."""
BLANKS = " \t\u00a0\u3000"
"""Removed from the end of a prompt. Line ends are kept: a template may need them."""

_MARK = "\u2402"
"""A character that no template contains."""


@dataclass(frozen=True)
class Fact:
    """An encoded fact."""

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
    """The answer's token ids at their places in ``input_ids``, ``IGNORE`` elsewhere."""

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def natural(prompt: str) -> str:
    """The prompt without blanks at its end."""
    return prompt.rstrip(BLANKS)


def natural_answer(text: str) -> str:
    """The answer without white space at its ends."""
    return text.strip()


def require_text(value: object, field: str) -> str:
    """Returns ``value`` if it is a text that can be tokenised; raises ValueError, naming ``field``, otherwise."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field}: {shorten(value)} is not a text with at least one visible character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field}: {shorten(value)} has half a surrogate pair at place {error.start}, which is no character; "
            f"write the whole character (json.dumps and UTF-8 do)"
        ) from error
    return value


def encode(tokenizer: Tokenizer, prompt: str, target: str, separator: str = SEPARATOR) -> Fact:
    """Tokenises one fact.

    Args:
        tokenizer: A tokenizer of transformers.
        prompt: The prompt; blanks at its end are removed.
        target: The answer; white space at its ends is removed.
        separator: Joins the two.

    Returns:
        The fact: the token ids of both, and the prompt's length in tokens.

    Raises:
        ValueError: Prompt or target is blank; the target has no tokens; the prompt is tokenised differently before the
            target, so that its length would split at a wrong place; or the tokenizer appends an end token to every
            text.
    """
    prompt = natural(require_text(prompt, "prompt"))
    target = natural_answer(require_text(target, "target_new"))
    prompt_ids = tokenizer(prompt)["input_ids"]
    text = f"{prompt}{separator}{target}"
    ids = tokenizer(text)["input_ids"]
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token not in prompt:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} appends {tokenizer.eos_token!r} to every text, so the answer "
            f"cannot follow the prompt; load it with add_eos_token=False"
        )
    if not prompt_ids:
        raise ValueError(f"prompt: {shorten(prompt)} has no tokens; nothing predicts the answer's first token")
    if len(ids) <= len(prompt_ids):
        raise ValueError(
            f"target_new: {shorten(target)} has no tokens of its own after the prompt {shorten(prompt)}; choose "
            f"another target"
        )
    if ids[: len(prompt_ids)] != prompt_ids and not _begins_at(
        tokenizer, text, len(prompt_ids), len(prompt), len(prompt + separator)
    ):
        raise ValueError(
            f"prompt: {shorten(prompt)} is tokenised differently where the answer {shorten(target)} follows it "
            f"(separator {separator!r}), so that EasyEdit's evaluators would cut at a wrong place; end the prompt "
            f"elsewhere or choose another separator"
        )
    return Fact(prompt, target, tuple(ids), len(prompt_ids))


def end_token(tokenizer: Tokenizer) -> int:
    """The tokenizer's end token. Raises ValueError if it has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"append_eos: True, but {type(tokenizer).__name__} of this model has no end token; set "
            f"tokenizer.eos_token, or append_eos: false"
        )
    return tokenizer.eos_token_id


def with_ending(fact: Fact, token: int | None, config: Any) -> Fact:
    """The fact with ``token`` as its answer's last: as an id, so that no other token changes.

    Args:
        fact: The fact; one that ends with the token already is returned as it is.
        token: The token; None: nothing is added.
        config: The model's configuration, for the longest text.

    Raises:
        ValueError: The model does not take a longer text.
    """
    if token is None or fact.ids[-1] == token:
        return fact
    ended = Fact(fact.prompt, fact.target, (*fact.ids, token), fact.prompt_length)
    require_length(ended, config)
    return ended


def _begins_at(tokenizer: Tokenizer, text: str, cut: int, prompt_end: int, answer_start: int) -> bool:
    """Whether the text's tokens from number ``cut`` on are the answer's, although the prompt's last token differs.

    It may include the separator (a line end and the blank before a number are one token of SmolLM2). Needs a tokenizer
    that gives offsets.
    """
    if not tokenizer.is_fast:
        return False
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return offsets[cut - 1][1] <= answer_start and offsets[cut][0] >= prompt_end


def encode_request(tokenizer: Tokenizer, request: Mapping, chat: bool = False, separator: str = SEPARATOR) -> Fact:
    """Checks and tokenises an EasyEdit request (``prompt``, ``target_new``, maybe ``subject``).

    Args:
        tokenizer: A tokenizer of transformers.
        request: The request.
        chat: Put the prompt into the tokenizer's chat template (`chat_prompt`).
        separator: See `encode`.

    Returns:
        The fact.

    Raises:
        ValueError: The request cannot be edited (`check_request`) or encoded (`encode`).
    """
    check_request(request)
    prompt = chat_prompt(tokenizer, request["prompt"]) if chat else request["prompt"]
    return encode(tokenizer, prompt, request["target_new"], separator)


def chat_prompt(tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt as a user's message in the tokenizer's chat template, up to where the answer begins.

    A prompt that is in the template already is returned unchanged. Where the tokenizer itself adds its start token, the
    template's is left out, so that tokenising the text gives it once.

    Raises:
        ValueError: The tokenizer has no template.
    """
    start, before, after = _template(tokenizer)
    given = prompt.removeprefix(start)
    return given if given.startswith(before) and given.endswith(after) else _rendered(tokenizer, natural(prompt), start)


def plain_prompt(tokenizer: Tokenizer, prompt: str) -> str:
    """What the user says in a prompt that is in the tokenizer's chat template (`chat_prompt`); any other unchanged.

    Raises:
        ValueError: The tokenizer has no template.
    """
    start, before, after = _template(tokenizer)
    given = prompt.removeprefix(start)
    if not (given.startswith(before) and given.endswith(after)):
        return prompt
    return given[len(before) : len(given) - len(after)]


def _template(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """The start token, where the tokenizer itself adds it, and what the template has before and after a prompt."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"use_chat_template: {type(tokenizer).__name__} of this model has no chat template; leave the setting out"
        )
    start = tokenizer.bos_token if _adds_start(tokenizer) else ""
    before, _, after = _rendered(tokenizer, _MARK, start).partition(_MARK)
    return start, before, after


def _rendered(tokenizer: Tokenizer, text: str, start: str) -> str:
    said = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    return natural(text).removeprefix(start)


def _adds_start(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer itself begins every text with its start token."""
    start = tokenizer.bos_token_id
    return start is not None and tokenizer("a")["input_ids"][:1] == [start]


def longest_text(config: Any) -> float:
    """Tokens that a model takes at most (``config.max_position_embeddings``); infinity if none are named."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None) or math.inf


def require_length(fact: Fact, config: Any) -> None:
    """Raises ValueError for a fact that is longer than the model takes (``config.max_position_embeddings``)."""
    if len(fact.ids) > (limit := longest_text(config)):
        raise ValueError(
            f"prompt: {shorten(fact.prompt)} has {len(fact.ids)} tokens with its target, the model takes {limit}"
        )


def require_known(fact: Fact, model: Any) -> None:
    """Raises ValueError for a fact with a token that the model has no embedding of: the tokenizer is not its own."""
    known = model.get_input_embeddings().weight.shape[0]
    if (largest := max(fact.ids)) >= known:
        raise ValueError(
            f"tokenizer: token {largest} of {shorten(fact.prompt)} with its target, the model knows those below "
            f"{known}; take the model's own tokenizer"
        )


def check_request(request: Mapping) -> None:
    """Raises ValueError, naming field and value, for a request that cannot be edited."""
    if not isinstance(request, Mapping):
        raise ValueError(
            f"request: {shorten(request)} is a {type(request).__name__}; a request is a mapping with 'prompt' and "
            f"'target_new'"
        )
    for name in request:
        if not isinstance(name, str):
            raise ValueError(f"request: {shorten(name)} is a {type(name).__name__}; fields are named by texts")
    for field in ("prompt", "target_new"):
        require_text(request.get(field), f"request.{field}")
    _check_probes(request)
    subject = request.get("subject")
    if subject is None:
        return
    if not isinstance(subject, str) or not subject.strip():
        raise ValueError(
            f"request.subject: {shorten(subject)} is not a text with at least one visible character; leave 'subject' "
            f"out if there is none"
        )
    if require_text(subject, "request.subject") not in request["prompt"]:
        raise ValueError(
            f"request.subject: {shorten(subject)} does not stand in the prompt {shorten(request['prompt'])}; EasyEdit "
            f"demands it (spell it as in the prompt, or leave 'subject' out)"
        )


def _check_probes(request: Mapping) -> None:
    """Raises ValueError for probes and neighbours of which nothing could be read, or something else than was meant."""
    for section, kinds in (("portability", (Mapping, list, tuple)), ("locality", Mapping)):
        probes = request.get(section) or {}
        if not isinstance(probes, kinds):
            raise ValueError(
                f"request.{section}: {shorten(probes)} is a {type(probes).__name__}, not a mapping of categories to "
                f"probes; leave it out if there are none"
            )
        for name in probes if isinstance(probes, Mapping) else ():
            if not isinstance(name, str):
                raise ValueError(
                    f"request.{section}: {shorten(name)} is a {type(name).__name__}; name categories by texts"
                )
    names = request.get("neighbours") or []
    if not isinstance(names, (list, tuple)):
        raise ValueError(
            f"request.neighbours: {shorten(names)} is a {type(names).__name__}, not a list of the names of other "
            f"subjects"
        )
    for i, name in enumerate(names):
        require_text(name, f"request.neighbours[{i}]")


def collate(facts: Sequence[Fact], pad_id: int = 0, padding_side: str = "right") -> Batch:
    """Pads facts to one batch.

    Args:
        facts: The facts.
        pad_id: Any token id: the mask decides what counts.
        padding_side: ``right`` or ``left``.

    Returns:
        Ids, mask and labels, each ``(facts, longest)``.
    """
    input_ids, attention_mask = pad([fact.ids for fact in facts], pad_id, padding_side)
    labels = torch.full_like(input_ids, IGNORE)
    for i, fact in enumerate(facts):
        start = input_ids.shape[1] - len(fact.ids) if padding_side == "left" else 0
        labels[i, start + fact.prompt_length : start + len(fact.ids)] = torch.tensor(fact.answer)
    return Batch(input_ids, attention_mask, labels)


def pad(
    texts: Sequence[Sequence[int]], pad_id: int = 0, padding_side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of texts as one tensor ``(texts, longest)``, and the mask of the same shape (1: token, 0: padding)."""
    width = max(map(len, texts))
    input_ids = torch.full((len(texts), width), pad_id)
    attention_mask = torch.zeros((len(texts), width), dtype=torch.long)
    for i, ids in enumerate(texts):
        where = slice(width - len(ids), width) if padding_side == "left" else slice(len(ids))
        input_ids[i, where] = torch.tensor(ids)
        attention_mask[i, where] = 1
    return input_ids, attention_mask
