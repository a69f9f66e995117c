"""Scores on disk: one safetensors file per fact and module type.

A file is named by a digest of all that its scores depend on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from kne_easyedit._util.claims import claimed
from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import atomic_write, cache_home, expand_path
from kne_easyedit._util.messages import shorten
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.models.fingerprint import model_digest
from kne_easyedit.models.targets import Target

logger = logging.getLogger(__name__)

FORMAT = "kne-scores-2"
"""Part of every key. Its number changes when the same inputs would give other scores."""
HALF = "kne-scores-3"
"""`FORMAT` of models with weights in half precision: before, scores of modules within a layer could be wrong there."""
LARGEST = 2**30
"""Bytes of an entry at most: ten times as many as the largest models need."""


def scores_folder(folder: str | Path | None = None) -> Path:
    """The folder with the scores of all models.

    Args:
        folder: The cache, with ``~`` and variables; None: the user's.

    Returns:
        Its folder ``scores``, which need not exist.
    """
    return (expand_path(folder) if folder else cache_home()) / "scores"


class ScoreCache:
    """The scores of one model under one sum of Eq. 5.

    Several processes may write to it at once. A damaged entry counts as missing; one that cannot be read (no
    permission, too many open files) is left as it is and raises OSError. An entry holds the layers that were attributed
    so far, so that any facts and layers are read from it, in any order, for any selection.

    Args:
        folder: The cache; None: the user's.
        model: The model, identified by a digest of its configuration and weights.
        steps: ``m`` of the sum.
        quadrature: The name of the sum.
    """

    def __init__(
        self, folder: str | Path | None, model: nn.Module, steps: int = 20, quadrature: str = "riemann"
    ) -> None:
        self.model_digest = model_digest(model)
        self.model_name = str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
        self.steps, self.quadrature = steps, quadrature
        types = {p.dtype for p in model.parameters()}
        self.score_bytes = 8 if torch.float64 in types else 4
        self.format = HALF if types & {torch.float16, torch.bfloat16} else FORMAT
        self.folder = scores_folder(folder) / self.model_digest[:16]

    def path(self, target: Target, fact: Fact) -> Path:
        """The file of ``fact``. Its token ids identify both the fact and the tokenizer."""
        return self.folder / f"{digest(self._key(target, fact))}.safetensors"

    def entry(self, target: Target, fact: Fact) -> Entry | None:
        """Reads and checks the entry of ``fact``.

        Returns:
            The entry; None if there is none, or a damaged one, which is removed with a warning.

        Raises:
            OSError: It cannot be read or, if it is damaged, cannot be removed.
        """
        path = self.path(target, fact)
        try:
            entry = read_entry(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DamagedEntry as error:
            self._remove(path, error)
            return None
        if entry.scores.shape[1] != target.n_neurons:
            shape = tuple(entry.scores.shape)
            self._remove(path, DamagedEntry(f"{path}: its scores have shape {shape}", entry.file))
            return None
        return entry

    def get(self, target: Target, fact: Fact) -> Tensor | None:
        """The scores ``(layers, d2)``, or None if a layer of ``target`` is missing. Reads the entry."""
        entry = self.entry(target, fact)
        return None if entry is None or entry.missing(target) else entry.scores_of(target)

    def missing(self, target: Target, fact: Fact) -> tuple[int, ...]:
        """The layers of ``target`` that are not stored for ``fact``. Reads the entry."""
        entry = self.entry(target, fact)
        return target.layers if entry is None else entry.missing(target)

    def put(self, target: Target, fact: Fact, scores: Tensor, seconds: float = 0.0) -> None:
        """Stores scores atomically. Other layers of the entry stay in it.

        Args:
            target: The module type and its layers.
            fact: The fact.
            scores: ``(layers, d2)``, in probability.
            seconds: How long they took.

        Raises:
            OSError: The folder cannot be written; the message says what to do.
        """
        by_layer: dict[int, Tensor] = {}
        before = self.entry(target, fact)
        if before is not None and not set(before.layers) <= set(target.layers):
            by_layer, seconds = dict(zip(before.layers, before.scores)), seconds + before.seconds
        by_layer |= dict(zip(target.layers, scores, strict=True))
        metadata = {
            "key": json.dumps(self._key(target, fact)),
            "model": self.model_digest,
            "model_name": self.model_name,
            "prompt": fact.prompt,
            "target": fact.target,
            "seconds": f"{seconds:.4f}",
        }
        try:
            write_entry(self.path(target, fact), by_layer, metadata)
        except OSError as error:
            raise _unusable(self.folder, error) from error

    @contextlib.contextmanager
    def claim(self, targets: Sequence[Target], facts: Sequence[Fact]) -> Iterator[bool]:
        """As long as the block lasts, no other process that shares the cache attributes these facts (`claimed`).

        Args:
            targets: Their module types.
            facts: The facts.

        Yields:
            Whether they are this process's; False: another one attributes at least one of them now.

        Raises:
            OSError: The folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                names = [self.path(target, fact).stem for target in targets for fact in facts]
                ours = stack.enter_context(claimed(self.folder, names))
            except OSError as error:
                raise _unusable(self.folder, error) from error
            yield ours

    def require_space(self, facts: int, *targets: Target) -> None:
        """Checks before anything is computed that the scores of ``facts`` facts fit into the folder.

        Raises:
            OSError: There is too little space, or the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise _unusable(self.folder, error) from error
        needed = facts * sum(self.score_bytes * len(target.layers) * target.n_neurons + 4096 for target in targets)
        if needed > free:
            full = OSError(errno.ENOSPC, f"{needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free")
            raise _unusable(self.folder, full) from full

    def _remove(self, path: Path, error: DamagedEntry) -> None:
        logger.warning("score cache: damaged (%s); it is computed again", error)
        try:
            remove_damaged(path, error)
        except OSError as failed:
            raise _unusable(self.folder, failed) from failed

    def _key(self, target: Target, fact: Fact) -> list:
        return [self.format, target.template, self.quadrature, self.steps, list(fact.ids), fact.prompt_length]


class DamagedEntry(ValueError):
    """A file of the score cache whose content is not what was written; the message names the file and the reason.

    Args:
        message: The message.
        file: The file that was read. Another process may have replaced it since.
    """

    def __init__(self, message: str, file: os.stat_result) -> None:
        super().__init__(message)
        self.file = file


@dataclass(frozen=True)
class Entry:
    """One file of the score cache."""

    scores: Tensor
    """``(layers, d2)``"""
    layers: list[int]
    template: str
    quadrature: str
    steps: int
    model: str
    """Digest of the model (`model_digest`)."""
    model_name: str
    prompt: str
    target: str
    seconds: float
    """How long the scores took to compute."""
    file: os.stat_result
    """The file that was read."""

    def missing(self, target: Target) -> tuple[int, ...]:
        """The layers of ``target`` that are not in it."""
        return tuple(i for i in target.layers if i not in self.layers)

    def scores_of(self, target: Target) -> Tensor:
        """The scores ``(layers, d2)`` of the layers of ``target``, none of which may be missing."""
        return self.scores[[self.layers.index(i) for i in target.layers]]


def read_entry(path: Path) -> Entry:
    """Reads one file and checks every bit of its scores and metadata, its name and its folder.

    Args:
        path: A file of the cache.

    Returns:
        Its content.

    Raises:
        DamagedEntry: The file was read, and its content is wrong.
        FileNotFoundError: There is no such file.
        OSError: The file could not be read, which says nothing about its content; the message says what to do.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            # Not mapped into memory: what has been checked must not change with the file.
            content = file.read() if found.st_size <= LARGEST else b""
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        _require(found.st_size <= LARGEST, f"{found.st_size} bytes are more than any entry has")
        scores = load(content)["scores"]
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        _require(scores.dtype in (torch.float32, torch.float64), f"its scores are of type {scores.dtype}")
        key = json.loads(metadata["key"])
        _require(isinstance(key, list) and len(key) == 6, "its key is no key")
        _require(key[0] in (FORMAT, HALF), f"it was written by another version ({shorten(key[0])})")
        _require(metadata.pop("sha256", None) == scores_digest(scores, metadata), "its digest does not match")
        layers, seconds = json.loads(metadata["layers"]), float(metadata["seconds"])
        _require(
            path.stem == digest(key) and metadata["model"].startswith(path.parent.name),
            "it is of another fact or model",
        )
        # The digest matches, but another program may have written it: types and values are checked as well.
        _, template, quadrature, steps, _, _ = key
        _require(
            isinstance(layers, list) and all(type(i) is int and i >= 0 for i in layers),
            f"layers: {shorten(layers)} are no layers",
        )
        _require(layers == sorted(set(layers)), f"layers: {shorten(layers)} are not ascending and distinct")
        _require(isinstance(template, str) and isinstance(quadrature, str) and type(steps) is int, "its key is no key")
        _require(0 <= seconds < math.inf, f"seconds: {shorten(metadata['seconds'])} is no duration")
        sound = scores.ndim == 2 and len(scores) == len(layers) and bool(scores.isfinite().all())
        _require(sound, f"its scores have shape {tuple(scores.shape)} or are not finite")
        return Entry(
            scores,
            layers,
            template,
            quadrature,
            steps,
            metadata["model"],
            metadata["model_name"],
            metadata["prompt"],
            metadata["target"],
            seconds,
            found,
        )
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedEntry(f"{path}: {error}", found) from error
    except RecursionError as error:
        raise DamagedEntry(f"{path}: nested too deeply", found) from error


def remove_damaged(path: Path, error: DamagedEntry) -> bool:
    """Removes a damaged file, unless another process has replaced it meanwhile.

    Args:
        path: The file.
        error: What `read_entry` raised for it.

    Returns:
        Whether it was removed.
    """
    with contextlib.suppress(FileNotFoundError):
        now, then = path.stat(), error.file
        if (now.st_ino, now.st_size, now.st_mtime_ns) == (then.st_ino, then.st_size, then.st_mtime_ns):
            path.unlink()
            return True
    return False


def entry_files(folder: str | Path | None = None) -> Iterator[Path]:
    """The files of all entries of all models, sorted; ``folder``: as in `scores_folder`."""
    yield from sorted(scores_folder(folder).glob("*/*.safetensors"))


def leftover_files(folder: str | Path | None = None) -> Iterator[Path]:
    """Temporary files of processes that were killed while writing: hidden, and older than an hour."""
    for path in sorted(scores_folder(folder).glob("*/.*.tmp")):
        if (found := stat_of(path)) and time.time() - found.st_mtime > 3600:
            yield path


def stat_of(path: Path) -> os.stat_result | None:
    """What is known of a file of the cache; None if another process has removed it."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def entry_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a sound entry (`read_entry`), without its digest."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: text for name, text in header["__metadata__"].items() if name != "sha256"}


def write_entry(path: Path, by_layer: Mapping[int, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file of the cache, atomically.

    Args:
        path: The file.
        by_layer: Number of a layer -> its scores ``(d2,)``.
        metadata: The other texts of its header; those that tell layers and digest are made here.
    """
    layers = sorted(by_layer)
    scores = torch.stack([by_layer[i] for i in layers]).contiguous()
    texts = {**metadata, "layers": json.dumps(layers)}
    atomic_write(path, save({"scores": scores}, {**texts, "sha256": scores_digest(scores, texts)}))


def scores_digest(scores: Tensor, metadata: dict[str, str]) -> str:
    """SHA-256 of scores and metadata."""
    return hashlib.sha256(
        scores.contiguous().numpy().tobytes() + json.dumps(metadata, sort_keys=True).encode()
    ).hexdigest()


def _require(ok: bool, complaint: str) -> None:
    if not ok:
        raise ValueError(complaint)


def _unreadable(path: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"score cache: {path} cannot be read ({error.strerror or error}); it is left as it is: fix that (permissions, "
        f"open files, the disk) and try again, or set cache_dir or KNE_CACHE to another folder",
    )


def _unusable(folder: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"score cache: {folder} cannot be written ({error.strerror or error}); free some space, or set cache_dir or "
        f"KNE_CACHE",
    )
