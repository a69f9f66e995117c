"""The text that second moments are computed from: a file, or samples of the model.

A `TextSource` is passed as an argument. EasyEdit calls ``layer_stats`` without our arguments: its patch uses the source
of the enclosing `use_text_source`.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kne_easyedit._util.files import expand_path
from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.generation import plain_generation
from kne_easyedit.models.state import preserve_state

BATCH = 32
"""Texts in one forward pass."""
LONGEST = 512
"""Tokens of a line of a text file that are used."""


@dataclass(frozen=True)
class TextSource:
    """A text file, or samples from the model that continue prompts.

    ``samples`` texts of ``length`` new tokens are drawn at temperature 1 under ``seed``. They continue the prompts in
    turn (the model's start or end token if there are no prompts). The prompts themselves count as texts, too.

    Raises:
        ValueError: The file does not exist, or ``samples`` or ``length`` is below 1.
    """

    file: Path | None = None
    """A text file, one text per line. If it is given, nothing is sampled. A relative path is made absolute."""
    samples: int = 512
    length: int = 64
    seed: int = 42
    prompts: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.file is not None:
            path = expand_path(self.file)  # EasyEdit works in another folder
            if not path.is_file():
                raise ValueError(f"statistics text {self.file} does not exist")
            object.__setattr__(self, "file", path)
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"statistics {name}: {getattr(self, name)} must be at least 1")
        object.__setattr__(self, "prompts", tuple(self.prompts))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> TextSource:
        """The source that a mapping of settings describes. Raises ValueError for an unknown setting, too."""
        names = [field.name for field in fields(cls)]
        if unknown := set(settings) - set(names):
            raise ValueError(f"statistics: no setting {min(unknown)!r}; there are {', '.join(names)}")
        return cls(**settings)

    def describe(self) -> str:
        """What a user reads about the text."""
        if self.file is not None:
            return f"text file {self.file}"
        return (
            f"{self.samples} texts of {self.length} tokens sampled from the model (seed {self.seed}) "
            f"after {len(self.prompts)} prompts"
        )

    def digest(self, tokenizer: Tokenizer | None = None) -> str:
        """Identifies the text in file names: of a file its content, of samples how they are drawn.

        Args:
            tokenizer: If it adds tokens of its own, that is said: versions before left them out. None: it adds none.
        """
        content = (
            self.file.read_bytes()
            if self.file is not None
            else repr((self.samples, self.length, self.seed, list(self.prompts))).encode()
        )
        kind = "file-" if self.file is not None else "sampled-"
        return (
            kind
            + hashlib.sha256(content).hexdigest()[:12]
            + ("-special" if tokenizer and _adds_tokens(tokenizer) else "")
        )

    def texts(self, model: nn.Module, tokenizer: Tokenizer) -> list[list[int]]:
        """The texts as token ids.

        Args:
            model: Draws the samples. Its state is preserved.
            tokenizer: That of the model.

        Returns:
            One list of token ids per text, with the tokens that the tokenizer adds: edits are asked with them, too.

        Raises:
            ValueError: The file contains no text, or is no UTF-8.
        """
        if self.file is not None:
            return [tokenizer(line)["input_ids"][:LONGEST] for line in _lines_of(self.file)]
        return [*self._prompt_ids(tokenizer), *self._sampled(model, tokenizer)]

    def _prompt_ids(self, tokenizer: Tokenizer) -> list[list[int]]:
        return [ids for prompt in self.prompts if (ids := tokenizer(prompt)["input_ids"])]

    @torch.no_grad()
    def _sampled(self, model: Any, tokenizer: Tokenizer) -> list[list[int]]:
        from tqdm import tqdm

        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        starts = self._prompt_ids(tokenizer) or [[start]]
        # Prompts of one length form a batch without padding; every text gets the same number of new tokens.
        chosen = sorted((starts[i % len(starts)] for i in range(self.samples)), key=len)
        device = device_of(model)
        sampled: list[list[int]] = []
        forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with forked, preserve_state(model), plain_generation(model):
            torch.manual_seed(self.seed)
            for batch in tqdm(
                list(batches(chosen, BATCH, same_length=True)), desc="text for second moments", unit="batch"
            ):
                safe_point()
                ids = torch.tensor(batch, device=device)
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    top_k=0,
                    temperature=1.0,
                    top_p=1.0,
                    max_new_tokens=self.length,
                    pad_token_id=tokenizer.eos_token_id,
                    use_cache=True,
                )
                sampled += [_cut(row, tokenizer.eos_token_id, len(batch[0])) for row in out.tolist()]
        return sampled


_DEFAULT = TextSource()
_current: contextvars.ContextVar[TextSource] = contextvars.ContextVar("text for second moments", default=_DEFAULT)


def current_text_source() -> TextSource:
    """The source of the innermost `use_text_source`, else the default one."""
    return _current.get()


@contextlib.contextmanager
def use_text_source(source: TextSource) -> Iterator[TextSource]:
    """Inside, EasyEdit's methods take their second moments from ``source``.

    Args:
        source: Replaces that of an enclosing context until this one is left.

    Yields:
        ``source``.
    """
    token = _current.set(source)
    try:
        yield source
    finally:
        _current.reset(token)


def batches(texts: Sequence[list[int]], size: int, same_length: bool = False) -> Iterator[list[list[int]]]:
    """Up to ``size`` consecutive texts at a time; with ``same_length``, only texts of one length together."""
    batch: list[list[int]] = []
    for text in texts:
        if len(batch) == size or (batch and same_length and len(text) != len(batch[0])):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _lines_of(file: Path) -> list[str]:
    """The lines of a text file that are not blank. Other separators (U+2028, form feeds) stand within a text."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"statistics text {file}: no UTF-8 text ({error.reason}); save it as UTF-8") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"statistics text {file}: holds no text")
    return lines


def _adds_tokens(tokenizer: Tokenizer) -> bool:
    return len(tokenizer("a")["input_ids"]) != len(tokenizer("a", add_special_tokens=False)["input_ids"])


def _cut(ids: list[int], end: int | None, start: int) -> list[int]:
    """Up to the first end token after ``start``: what follows is padding."""
    new = ids[start:]
    return ids[:start] + (new[: new.index(end) + 1] if end in new else new)
