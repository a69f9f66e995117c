"""Second moments of layer inputs, for MEMIT and its kin, from text that is at hand.

EasyEdit computes them from a download of Wikipedia. Where its file is not there, ours is made and put under a name
that says what it was made of, so that statistics of different texts, sizes or weights are never taken for each other.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy
import torch
from torch import nn

from kne_easyedit._util.files import expand_path
from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.patches import applied, runtime_patch
from kne_easyedit.bridge.runtime_patches import forget_second_moments
from kne_easyedit.facts.encoding import pad
from kne_easyedit.models.state import preserve_state

logger = logging.getLogger(__name__)

PATCH = "second-moments"
BATCH = 32
BY_ADJUSTMENT = ("ROME", "R-ROME")
"""Methods that use second moments only if ``mom2_adjustment`` is set."""


@dataclass
class TextSource:
    """Where the text comes from: a file of the user's, or samples from the model itself after the data's prompts.

    ``samples`` texts of ``length`` tokens are drawn at temperature 1, under ``seed``, as continuations of the
    prompts in turn (of the model's start or end token if there are none); the prompts count as texts, too.
    """

    file: Path | None = None
    """A text file, one text a line; it is taken as it is."""
    samples: int = 512
    length: int = 64
    seed: int = 42
    prompts: Sequence[str] = ()

    def describe(self) -> str:
        if self.file is not None:
            return f"text file {self.file}"
        return f"{self.samples} texts of {self.length} tokens sampled from the model (seed {self.seed}) after {len(self.prompts)} prompts of the data"

    def digest(self) -> str:
        """Stands for the text in file names."""
        content = (
            self.file.read_bytes()
            if self.file is not None
            else repr((self.samples, self.length, self.seed, list(self.prompts))).encode()
        )
        return ("file-" if self.file is not None else "sampled-") + hashlib.sha256(content).hexdigest()[:12]

    def texts(self, model: nn.Module, tokenizer) -> list[list[int]]:
        """The texts as token ids. Raises ValueError for a file without text."""
        if self.file is not None:
            lines = [line for line in self.file.read_text(encoding="utf-8").splitlines() if line.strip()]
            if not lines:
                raise ValueError(f"statistics text {self.file}: holds no text")
            return [tokenizer(line, add_special_tokens=False)["input_ids"][:512] for line in lines]
        return [*self._prompt_ids(tokenizer), *self._sampled(model, tokenizer)]

    def _prompt_ids(self, tokenizer) -> list[list[int]]:
        return [ids for prompt in self.prompts if (ids := tokenizer(prompt, add_special_tokens=False)["input_ids"])]

    @torch.no_grad()
    def _sampled(self, model: nn.Module, tokenizer) -> list[list[int]]:
        from tqdm import tqdm

        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        starts = self._prompt_ids(tokenizer) or [[start]]
        # Prompts of one length make a batch without padding; every text gets the same number of new tokens.
        chosen = sorted((starts[i % len(starts)] for i in range(self.samples)), key=len)
        device = next(model.parameters()).device
        sampled, batches = [], list(_batches(chosen, same_length=True))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), preserve_state(model):
            torch.manual_seed(self.seed)
            for batch in tqdm(batches, desc="text for second moments", unit="batch"):
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


SOURCE = TextSource()
"""What the patch takes; `configure` changes it."""


def needs_second_moments(hparams) -> bool:
    """Whether a method asks for second moments under these settings: MEMIT and its kin always, ROME by ``mom2_adjustment``."""
    return hasattr(hparams, "mom2_dataset") and (hparams.alg_name not in BY_ADJUSTMENT or hparams.mom2_adjustment)


def configure(**settings) -> TextSource:
    """Sets the text source of this process. Raises ValueError for a file that is not there or a size below 1, and sets nothing then."""
    unknown = set(settings) - {"file", "samples", "length", "seed", "prompts"}
    if unknown:
        raise ValueError(f"statistics: no setting {min(unknown)!r}; there are file, samples, length, seed, prompts")
    if settings.get("file") is not None:
        given, settings["file"] = (
            settings["file"],
            expand_path(settings["file"]),
        )  # it is read where EasyEdit works, in another folder
        if not settings["file"].is_file():
            raise ValueError(f"statistics text {given} does not exist")
    for name, value in settings.items():
        if name in ("samples", "length") and value < 1:
            raise ValueError(f"statistics {name}: {value} must be at least 1")
    for name, value in settings.items():
        setattr(SOURCE, name, value)
    return SOURCE


@torch.no_grad()
def second_moments(
    model: nn.Module, texts: Sequence[Sequence[int]], modules: Sequence[str], dtype: torch.dtype
) -> dict[str, tuple[int, torch.Tensor]]:
    """Module name -> (number of tokens, sum of ``x xᵀ`` over them), ``x`` the module's input ``(d1,)``; one pass for all."""
    from tqdm import tqdm

    found: dict[str, tuple[int, torch.Tensor]] = {}
    device = next(model.parameters()).device
    body = getattr(model, "base_model", model)  # without the head, whose logits nobody reads
    mask = None

    def hook(name):
        def add(_, inputs):
            rows = inputs[0][mask].to(dtype)
            count, total = found.get(name, (0, 0))
            found[name] = (count + len(rows), total + rows.T @ rows)

        return add

    handles = []
    try:
        handles += [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
        with preserve_state(model):
            for batch in tqdm(list(_batches(sorted(texts, key=len))), desc="second moments", unit="batch"):
                safe_point()
                ids, attention = (tensor.to(device) for tensor in pad(batch))
                mask = attention.bool()
                body(input_ids=ids, attention_mask=attention, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@runtime_patch(PATCH, "MEMIT: second moments are computed from a download of Wikipedia")
def _local_second_moments(easyeditor: ModuleType) -> bool:
    holders = [
        m
        for name, m in sorted(sys.modules.items())
        if name.startswith("easyeditor.models.") and hasattr(m, "layer_stats")
    ]
    for original in {m.layer_stats for m in holders if callable(m.layer_stats)}:
        replacement = _with_local_text(original)
        for holder in holders:
            if holder.layer_stats is original:
                holder.layer_stats = replacement
    methods = module("util.alg_dict").ALG_DICT
    for name, apply in list(methods.items()):
        if inspect.isfunction(apply) and apply.__module__.startswith("easyeditor."):
            methods[name] = _prepared(apply)
    return bool(holders)


def prepare(model: nn.Module, tokenizer, hparams, folder: Path) -> dict:
    """Makes the second moments that a method (one that `needs_second_moments`) will ask for, where they are missing.

    ``folder``: where ``stats_dir`` of the settings is, if it is relative. Returns ``source``,
    ``files``, and ``seconds``: what making them took, now or in an earlier run (None where the user's own files serve).
    Raises ValueError for a text file without text. With the patch switched off EasyEdit makes its own in the first edit.
    """
    if PATCH not in applied():
        return {"source": f"EasyEdit's own, of {hparams.mom2_dataset}", "files": [], "seconds": None}
    _, files = _all_files(model, tokenizer, hparams, folder / hparams.stats_dir)
    seconds = [_seconds(file.path) for file in files]
    sources = dict.fromkeys(
        hparams.mom2_dataset if file.text == hparams.mom2_dataset else SOURCE.describe() for file in files
    )
    return {
        "source": "; ".join(sources),
        "files": [str(file.path) for file in files],
        "seconds": None if None in seconds else sum(seconds),
    }


def _all_files(model: nn.Module, tokenizer, hparams, folder: Path) -> tuple[_Lineage, list[_Found]]:
    lineage = _lineage_of(model)
    layers = [hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers]
    return lineage, _files(
        model, tokenizer, lineage, layers, folder, hparams.mom2_dataset, hparams.mom2_dtype, hparams.mom2_n_samples
    )


def _seconds(path: Path) -> float | None:
    """A layer's share of what one pass for all took; EasyEdit's own files do not say."""
    with numpy.load(path) as stored:
        return float(stored["seconds"]) if "seconds" in stored else None


def _prepared(apply):
    """The method with all second moments made before it changes anything: between its layers it asks for the next ones."""

    @functools.wraps(apply)
    def prepared(model, tok, requests, hparams, *args, **kwargs):
        if not isinstance(model, nn.Module) or not needs_second_moments(hparams):
            return apply(model, tok, requests, hparams, *args, **kwargs)
        lineage, _ = _all_files(model, tok, hparams, Path(hparams.stats_dir))
        lineage.editing = True
        try:
            return apply(model, tok, requests, hparams, *args, **kwargs)
        finally:
            lineage.editing, lineage.edited = False, _sketch(model)

    return prepared


def _with_local_text(original):
    @functools.wraps(original)
    def layer_stats(model, tokenizer, layer_name, stats_dir, ds_name, to_collect, *args, **kwargs):
        if to_collect != ["mom2"]:
            return original(model, tokenizer, layer_name, stats_dir, ds_name, to_collect, *args, **kwargs)
        precision, size = kwargs.get("precision") or "float64", kwargs.get("sample_size")
        known = _LINEAGES.get(model)
        lineage = known if known is not None and known.editing else _lineage_of(model)
        layers = _modules(layer_name, kwargs.get("hparams"))
        found = _files(model, tokenizer, lineage, layers, Path(stats_dir), ds_name, precision, size)[
            layers.index(layer_name)
        ]
        return original(
            model,
            tokenizer,
            layer_name,
            stats_dir,
            found.text,
            to_collect,
            *args,
            **{**kwargs, "model_name": found.model},
        )

    return layer_stats


@dataclass(frozen=True)
class _Found:
    """Where the moments of a layer lie: what EasyEdit's ``layer_stats`` must be told to find them."""

    path: Path
    model: str
    text: str


def own_files(model: nn.Module, hparams, folder: Path) -> list[Path]:
    """The files in ``folder`` that are not ours but EasyEdit's own, or the user's: where they are, they serve."""
    layers = [hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers]
    named = (
        _own(model, layer, folder, hparams.mom2_dataset, hparams.mom2_dtype, hparams.mom2_n_samples)[1]
        for layer in layers
    )
    return [file.path for of_layer in named for file in of_layer if file.path.is_file()]


def _own(
    model: nn.Module, layer: str, folder: Path, ds_name: str, precision: str, size: int | None
) -> tuple[str, list[_Found]]:
    """The file name of a layer's moments, and where EasyEdit would look for it: its versions name the folder differently."""
    path, end = model.config._name_or_path, f"{layer}_{precision}_mom2{'' if size is None else f'_{size}'}.npz"
    names = dict.fromkeys((path.rsplit("/")[-1], path.replace("/", "_")))
    return end, [_Found(folder / name / f"{ds_name}_stats" / end, name, ds_name) for name in names]


def _files(
    model,
    tokenizer,
    lineage: _Lineage,
    layers: Sequence[str],
    folder: Path,
    ds_name: str,
    precision: str,
    size: int | None,
) -> list[_Found]:
    """The files of some layers: EasyEdit's own where they are, else ours, made now where they are missing (one pass for all)."""
    key = (SOURCE.digest(), str(folder), ds_name, precision, size)
    if lineage.asked != key:  # what EasyEdit remembers may be of another text
        forget_second_moments()
        lineage.asked = key
    ours, found, missing = f"kne-{lineage.digest[:12]}", [], {}
    for layer in layers:
        end, own = _own(model, layer, folder, ds_name, precision, size)
        local = _Found(folder / ours / f"{SOURCE.digest()}_stats" / end, ours, SOURCE.digest())
        found.append(next((file for file in own if file.path.is_file()), local))
        if found[-1] is local and not local.path.is_file():
            missing[layer] = local.path
    if missing:
        _compute(model, tokenizer, missing, getattr(torch, precision), size)
    return found


def _compute(model, tokenizer, files: Mapping[str, Path], dtype: torch.dtype, size: int | None) -> None:
    """Writes the moments of some layers, beside and renamed: one pass over the text serves them all."""
    logger.warning(
        "second moments of %s layers: from %s, kept in %s",
        len(files),
        SOURCE.describe(),
        next(iter(files.values())).parent,
    )
    start = time.perf_counter()
    found = second_moments(model, SOURCE.texts(model, tokenizer), list(files), dtype)
    seconds = (time.perf_counter() - start) / len(files)
    for layer, (count, moments) in found.items():
        # The layout of EasyEdit's own CombinedStat(mom2=SecondMoment()), which leaves other entries alone.
        state = {
            "mom2.count": count,
            "mom2.mom2": moments.cpu().numpy(),
            "mom2.constructor": "easyeditor.util.runningstats.SecondMoment()",
        }
        target = files[layer]
        target.parent.mkdir(parents=True, exist_ok=True)
        torn = target.with_name(f"{target.stem}.{os.getpid()}.npz")
        numpy.savez(torn, **state, seconds=seconds, **({} if size is None else {"sample_size": size}))
        os.replace(torn, target)


def _modules(layer_name: str, hparams) -> list[str]:
    """The layer and its sisters in the settings: one pass over the text serves them all."""
    template, layers = getattr(hparams, "rewrite_module_tmp", None), getattr(hparams, "layers", None)
    names = [template.format(layer) for layer in layers] if template and layers else []
    return names if layer_name in names else [layer_name]


@dataclass
class _Lineage:
    """A loaded model and what edits have made of it: its moments are those of the weights as they came."""

    digest: str
    original: tuple
    edited: tuple | None = None
    asked: tuple | None = None
    editing: bool = False
    """A method is at work: some layers may be changed already."""


_LINEAGES: weakref.WeakKeyDictionary[nn.Module, _Lineage] = weakref.WeakKeyDictionary()


def _lineage_of(model: nn.Module) -> _Lineage:
    """The model's lineage; a new one if its weights are neither those it came with nor those that its last edit left."""
    from kne_easyedit.models.fingerprint import model_digest

    known, sketch = _LINEAGES.get(model), _sketch(model)
    if known is None or sketch not in (known.original, known.edited):
        forget_second_moments()
        known = _LINEAGES[model] = _Lineage(model_digest(model), sketch)
    return known


@torch.no_grad()
def _sketch(model: nn.Module) -> tuple:
    """Tells other weights at a glance: up to 4096 values of every parameter, added up. A digest of all would cost a second an edit."""
    sums = []
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        sums.append(flat[:: max(1, len(flat) // 4096)].double().sum().cpu())
    return tuple(torch.stack(sums).tolist())


def _batches(texts: Sequence[Sequence[int]], same_length: bool = False) -> Iterator[list]:
    batch: list = []
    for text in texts:
        if len(batch) == BATCH or batch and same_length and len(text) != len(batch[0]):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _cut(ids: list[int], end: int | None, start: int) -> list[int]:
    """Up to the first end token after ``start``: what follows is padding."""
    new = ids[start:]
    return ids[:start] + (new[: new.index(end) + 1] if end in new else new)
