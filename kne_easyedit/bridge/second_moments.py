"""Second moments of layer inputs, for MEMIT and related methods, from local text.

EasyEdit computes them from a download of Wikipedia. If its file does not exist, this module computes one. Its name
contains digests of the text and of the weights: files of different texts, sizes or weights are never confused.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
import weakref
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn

from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.bridge.patches import applied
from kne_easyedit.bridge.runtime_patches import forget_second_moments
from kne_easyedit.bridge.text_source import BATCH, TextSource, batches
from kne_easyedit.facts.encoding import Tokenizer, pad
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.fingerprint import model_digest
from kne_easyedit.models.state import preserve_state

logger = logging.getLogger(__name__)

PATCH = "second-moments"
ENOUGH = 10
"""Tokens for each input of a layer, at least: of fewer, the moments' inverse is too large by a tenth and more."""


def needs_second_moments(hparams: Any) -> bool:
    """Whether a method uses second moments: MEMIT and related methods always, ROME by ``mom2_adjustment``.

    Args:
        hparams: Settings of any method.
    """
    if not hasattr(hparams, "mom2_dataset"):
        return False
    setting = traits_of(hparams.alg_name).moments_setting
    return setting is None or bool(getattr(hparams, setting))


@torch.no_grad()
def second_moments(
    model: nn.Module, texts: Sequence[list[int]], modules: Sequence[str], dtype: torch.dtype
) -> dict[str, tuple[int, torch.Tensor]]:
    """Sums of ``x xᵀ`` over all tokens, ``x`` the input of a module, ``(d1,)``. One pass serves all modules.

    Args:
        model: Its state is preserved.
        texts: One list of token ids per text.
        modules: Names of linear modules.
        dtype: The type of the sums.

    Returns:
        Module name -> (number of tokens, sum of shape ``(d1, d1)``).
    """
    from tqdm import tqdm

    found: dict[str, tuple[int, torch.Tensor]] = {}
    device = device_of(model)
    body = getattr(model, "base_model", model)  # without the head, whose logits are not needed
    mask: torch.Tensor

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0][mask].to(dtype)
            count, total = found.get(name, (0, 0))
            found[name] = (count + len(rows), total + rows.T @ rows)

        return add

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        handles += [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
        with preserve_state(model):
            for batch in tqdm(list(batches(sorted(texts, key=len), BATCH)), desc="second moments", unit="batch"):
                safe_point()
                ids, attention = (tensor.to(device) for tensor in pad(batch))
                mask = attention.bool()
                body(input_ids=ids, attention_mask=attention, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


# The files


class Wanted(NamedTuple):
    """What a method asks for: the moments of some layers, under the settings that EasyEdit's file names contain."""

    layers: Sequence[str]
    folder: Path
    dataset: str
    precision: str
    size: int | None

    @classmethod
    def by(cls, hparams: Any, folder: Path) -> Wanted:
        """What a method will ask for under its settings; ``folder`` is its ``stats_dir``."""
        layers = [hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers]
        return cls(layers, folder, hparams.mom2_dataset, hparams.mom2_dtype, hparams.mom2_n_samples)


class Found(NamedTuple):
    """The file of a layer's moments, and the arguments by which EasyEdit's ``layer_stats`` finds it."""

    path: Path
    model: str
    text: str


def prepare(model: nn.Module, tokenizer: Tokenizer, hparams: Any, folder: Path, source: TextSource) -> dict[str, Any]:
    """Computes the second moments that a method will use, if they are missing.

    If the patch is switched off, nothing is computed: EasyEdit does it in the first edit.

    Args:
        model: The model before any edit.
        tokenizer: That of the model.
        hparams: Settings of a method that `needs_second_moments`.
        folder: What a relative ``stats_dir`` of the settings is relative to.
        source: The text.

    Returns:
        ``source`` (a description), ``files``, and ``seconds``: the time of the computation, now or in an earlier run
        (None for files of the user's own).

    Raises:
        ValueError: The text file contains no text, or a file of the user's own is damaged.
    """
    if PATCH not in applied():
        return {"source": f"EasyEdit's own, of {hparams.mom2_dataset}", "files": [], "seconds": None}
    wanted = Wanted.by(hparams, folder / hparams.stats_dir)
    files = files_of(model, tokenizer, known_weights(model), wanted, source)
    seconds = [_seconds(file.path) for file in files]
    sources = dict.fromkeys(wanted.dataset if file.text == wanted.dataset else source.describe() for file in files)
    return {
        "source": "; ".join(sources),
        "files": [str(file.path) for file in files],
        "seconds": None if None in seconds else sum(filter(None, seconds)),
    }


def own_files(model: nn.Module, hparams: Any, folder: Path) -> list[Path]:
    """The user's own files of second moments, or EasyEdit's, which take precedence over computed ones.

    Args:
        model: The loaded model.
        hparams: Settings of a method that `needs_second_moments`.
        folder: The absolute path of ``stats_dir``.

    Returns:
        Existing files.
    """
    wanted = Wanted.by(hparams, folder)
    return [file.path for layer in wanted.layers for file in _own(model, layer, wanted) if file.path.is_file()]


def files_of(
    model: nn.Module, tokenizer: Tokenizer, weights: KnownWeights, wanted: Wanted, source: TextSource
) -> list[Found]:
    """One file per layer: the user's own (or EasyEdit's) if there is one, else ours, computed now if it is missing.

    Args:
        model: The loaded model.
        tokenizer: That of the model.
        weights: What is known of the model's weights.
        wanted: The layers, and the settings in the file names.
        source: The text.

    Returns:
        Files in the order of the layers. One of ours that is damaged is made anew, with a warning.

    Raises:
        ValueError: One of the user's own is damaged, or the text file contains no text.
    """
    digest = source.digest(tokenizer)
    key = (digest, str(wanted.folder), *wanted[2:])
    if weights.last_wanted != key:  # EasyEdit may have cached the moments of another text
        forget_second_moments()
        weights.last_wanted = key
    ours, missing = f"kne-{weights.digest[:12]}", {}
    found: list[Found] = []
    for layer in wanted.layers:
        local = Found(wanted.folder / ours / f"{digest}_stats" / _file_name(layer, wanted), ours, digest)
        found.append(next((file for file in _own(model, layer, wanted) if file.path.is_file()), local))
        if found[-1] is not local:
            _require_sound(found[-1], source)
        elif not local.path.is_file():
            missing[layer] = local.path
        elif reason := _damage(local.path):
            logger.warning("%s cannot be read (%s), and is made anew", local.path, reason)
            missing[layer] = local.path
    if missing:
        _compute(model, tokenizer, missing, getattr(torch, wanted.precision), wanted.size, source)
    return found


def _file_name(layer: str, wanted: Wanted) -> str:
    return f"{layer}_{wanted.precision}_mom2{'' if wanted.size is None else f'_{wanted.size}'}.npz"


def _own(model: Any, layer: str, wanted: Wanted) -> list[Found]:
    """Where EasyEdit looks for a layer's moments: its versions name the folder differently."""
    path = model.config._name_or_path
    names = dict.fromkeys((path.rsplit("/")[-1], path.replace("/", "_")))
    file = _file_name(layer, wanted)
    return [Found(wanted.folder / name / f"{wanted.dataset}_stats" / file, name, wanted.dataset) for name in names]


def _compute(
    model: nn.Module,
    tokenizer: Tokenizer,
    files: Mapping[str, Path],
    dtype: torch.dtype,
    size: int | None,
    source: TextSource,
) -> None:
    """Writes the moments of some layers, atomically: one pass over the text serves them all."""
    folder = next(iter(files.values())).parent
    logger.warning("second moments of %s layers: from %s, kept in %s", len(files), source.describe(), folder)
    start = time.perf_counter()
    found = second_moments(model, source.texts(model, tokenizer), list(files), dtype)
    seconds = (time.perf_counter() - start) / len(files)
    for layer, (count, moments) in found.items():
        if count < ENOUGH * len(moments):
            logger.warning(
                "second moments of %s: %d tokens for %d inputs say little of most directions, and edits come out "
                "stronger than their settings say; give more text (--stats-samples, statistics.samples: some %d)",
                layer,
                count,
                len(moments),
                ENOUGH * len(moments) // source.length,
            )
        # The layout of EasyEdit's CombinedStat(mom2=SecondMoment()), which ignores other entries.
        state: dict[str, Any] = {
            "mom2.count": count,
            "mom2.mom2": moments.cpu().numpy(),
            "mom2.constructor": "easyeditor.util.runningstats.SecondMoment()",
            "seconds": seconds,
            **({} if size is None else {"sample_size": size}),
        }
        whole = io.BytesIO()
        numpy.savez(whole, **state)
        atomic_write(files[layer], whole.getvalue())


_SOUND: dict[Path, tuple[int, int]] = {}
"""Files that were read once, by absolute path, with their size and time of change.

One may have half a GiB, and is asked for at every edit.
"""


def _damage(path: Path) -> str | None:
    """What is wrong with a file of moments, read in pieces; None if it is complete."""
    path, status = path.absolute(), path.stat()
    version = (status.st_size, status.st_mtime_ns)
    if _SOUND.get(path) == version:
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                return f"{broken} in it is damaged"
            missing = {"mom2.count.npy", "mom2.mom2.npy"} - set(archive.namelist())
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        return str(error) or type(error).__name__
    if missing:
        return f"{min(missing).removesuffix('.npy')} is not in it"
    _SOUND[path] = version
    return None


def _require_sound(file: Found, source: TextSource) -> None:
    """Raises ValueError for a file of the user's own that cannot be read."""
    if reason := _damage(file.path):
        raise ValueError(
            f"stats_dir: {file.path} cannot be read ({reason}), and it is no file of this package; replace it, or "
            f"delete it or move it away, then second moments are computed from {source.describe()}"
        )


def _seconds(path: Path) -> float | None:
    """A layer's share of the time of one pass for all; EasyEdit's own files do not record it."""
    with numpy.load(path) as stored:
        return float(stored["seconds"]) if "seconds" in stored else None


# The weights


@dataclass
class KnownWeights:
    """The weights of a loaded model before any edit, of which its moments are computed."""

    digest: str
    seen: set[bytes] = field(default_factory=set)
    """`checksums` before any edit, and before and after every edit: an edit may be kept or undone, in any order."""
    last_wanted: tuple | None = None
    editing: bool = False
    """A method is running: some layers may be changed already."""


_KNOWN: weakref.WeakKeyDictionary[nn.Module, KnownWeights] = weakref.WeakKeyDictionary()


def known_weights(model: nn.Module, editing: bool = False) -> KnownWeights:
    """What is known of the model's weights: a new object if they are neither the original nor any edited ones.

    Args:
        model: The loaded model.
        editing: The call comes from a method that may be running: then its weights are not compared.
    """
    known = _KNOWN.get(model)
    if editing and known is not None and known.editing:
        return known
    sums = checksums(model)
    if known is None or sums not in known.seen:
        forget_second_moments()
        known = _KNOWN[model] = KnownWeights(model_digest(model), {sums})
    return known


@torch.no_grad()
def checksums(model: nn.Module) -> bytes:
    """A digest of sums of up to 4096 values of every parameter: detects other weights faster than one of all values."""
    sums = []
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        sums.append(flat[:: max(1, len(flat) // 4096)].double().sum().cpu())
    return hashlib.sha256(torch.stack(sums).numpy().tobytes()).digest()
