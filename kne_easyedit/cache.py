"""Attributions on disk: one safetensors file a fact, named by a digest of everything the scores depend on."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kne_easyedit.batching import Fact
from kne_easyedit.layout import Target
from kne_easyedit.paths import atomic_write, cache_home

logger = logging.getLogger(__name__)

FORMAT = "kne-scores-1"
"""Part of every key: raised when the same inputs would give other scores."""
_NOT_IN_CONFIG = ("_name_or_path", "transformers_version", "use_cache", "architectures", "dtype", "torch_dtype")


def model_digest(model: nn.Module) -> str:
    """SHA-256 of all weights (names, types, shapes, bits), buffers and the configuration.

    It tells models apart, not files: the same path with other weights, or an edited model, has another digest.
    """

    def of_tensor(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + hashlib.sha256(data).digest()).hexdigest()

    tensors = [*model.named_parameters(), *model.named_buffers()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets other threads run
        digests = list(pool.map(of_tensor, tensors))
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_IN_CONFIG}
    return _digest([type(model).__name__, sorted(digests), config])


class ScoreCache:
    """The folder of scores of one model. Safe to fill by several processes at once; a damaged entry counts as missing."""

    def __init__(self, folder: str | Path | None, model: nn.Module):
        self.model_digest = model_digest(model)
        root = Path(folder).expanduser() if folder else cache_home()
        self.folder = root / "scores" / self.model_digest[:16]

    def path(self, target: Target, steps: int, fact: Fact) -> Path:
        """Where the scores of ``fact`` are. Token ids stand for both the fact and the tokenizer."""
        return self.folder / f"{_digest(self._key(target, steps, fact))}.safetensors"

    def get(self, target: Target, steps: int, fact: Fact) -> Tensor | None:
        """The scores ``(layers, d2)``, or None. A damaged entry is reported as a warning and removed."""
        path = self.path(target, steps, fact)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata, scores = file.metadata() or {}, file.get_tensor("scores")
            if metadata.get("key") != json.dumps(self._key(target, steps, fact)):
                raise ValueError("it is of another fact")
            if metadata.get("sha256") != _bits(scores):
                raise ValueError("its digest does not match")
            if scores.shape != (len(target.layers), target.n_neurons) or not scores.isfinite().all():
                raise ValueError(f"its scores have shape {tuple(scores.shape)} or are not finite")
            float(metadata["seconds"])  # `seconds` relies on it
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("score cache: %s is damaged (%s); it is computed again", path, error)
            path.unlink(missing_ok=True)
            return None
        return scores

    def seconds(self, target: Target, steps: int, fact: Fact) -> float:
        """How long the stored scores of ``fact`` took to compute, in seconds, on the machine that did it."""
        with safe_open(self.path(target, steps, fact), framework="pt") as file:
            return float(file.metadata()["seconds"])

    def put(self, target: Target, steps: int, fact: Fact, scores: Tensor, seconds: float = 0.0) -> None:
        """Stores scores, complete or not at all. Raises OSError (with the way out) if the folder cannot take them."""
        scores = scores.contiguous()
        metadata = {
            "key": json.dumps(self._key(target, steps, fact)),
            "sha256": _bits(scores),
            "model": self.model_digest,
            "prompt": fact.prompt,
            "target": fact.target,
            "seconds": f"{seconds:.4f}",
        }
        try:
            atomic_write(self.path(target, steps, fact), save({"scores": scores}, metadata))
        except OSError as error:
            raise _unusable(self.folder, error) from error

    def demand_space(self, entries: int, target: Target) -> None:
        """Raises OSError before anything is computed if ``entries`` more would not fit, or the folder cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise _unusable(self.folder, error) from error
        needed = entries * (4 * len(target.layers) * target.n_neurons + 4096)
        if needed > free:
            full = OSError(errno.ENOSPC, f"{needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free")
            raise _unusable(self.folder, full) from full

    @staticmethod
    def _key(target: Target, steps: int, fact: Fact) -> list:
        return [FORMAT, target.template, list(target.layers), steps, list(fact.ids), fact.prompt_length]


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _bits(scores: Tensor) -> str:
    return hashlib.sha256(scores.contiguous().numpy().tobytes()).hexdigest()


def _unusable(folder: Path, error: OSError) -> OSError:
    return OSError(
        error.errno, f"score cache: {folder} cannot be written ({error.strerror or error}); free some space, or set cache_dir or KNE_CACHE"
    )
