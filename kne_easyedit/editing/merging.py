"""Edits merged into a model's files: a full model that anything loads, written without loading the base.

A shard is copied, then the edited matrices are written over their places in the copy: all other bytes are those of the
base, and never more than one matrix is in memory.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kne_easyedit._util.cards import card_head, has_hub_form
from kne_easyedit._util.files import new_directory, parse_json
from kne_easyedit._util.markdown import literal, table_of_rows
from kne_easyedit._util.messages import shorten
from kne_easyedit._util.tensor_files import DTYPES, Place, places, read_tensor, write_tensor
from kne_easyedit._version import __version__
from kne_easyedit.editing.applying import Appliable, add_rows
from kne_easyedit.editing.lacking import lacking_note
from kne_easyedit.models.base import Base, BaseModule, structure_of, weight_digest
from kne_easyedit.models.weight_files import candidates

logger = logging.getLogger(__name__)

CONFIG, ONE_FILE, INDEX_FILE, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
_COPIED = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py", ".md")
"""Endings of what a model has beside its weights: configuration, tokenizer, code, texts."""
_TEXTS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_FOLDERS = ("additional_chat_templates",)
_PLAIN = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())


def merge_edits(
    edits: Sequence[Appliable],
    model_folder: str | os.PathLike[str],
    out_folder: str | os.PathLike[str],
    *,
    force: bool = False,
) -> None:
    """Writes a full model with edits merged: rows of the base's files plus the deltas, in order, rounded once.

    Args:
        edits: The edits, in the order in which they are added.
        model_folder: The base, as ``save_pretrained`` writes it, in safetensors. It is not changed.
        out_folder: Must not exist, or be empty; it appears only when it is complete. It has the base's configuration,
            tokenizer and number types, and a model card that names the edits.
        force: Merge into another base, too, with a warning. Shapes must fit all the same.

    Raises:
        FileExistsError: ``out_folder`` holds something.
        FileNotFoundError: ``model_folder`` has no configuration or no safetensors files.
        ValueError: There is no edit, one occurs twice or is of another base, or the weights are quantised; the message
            says why. Nothing was written.
        OSError: A file cannot be read or written.
    """
    source, out = Path(model_folder).expanduser(), Path(out_folder).expanduser()
    digests = [edit.digest for edit in edits]
    if not digests:
        raise ValueError("edits: there are none to merge; switch one on")
    if len(set(digests)) != len(digests):
        raise ValueError(f"edits: {max(digests, key=digests.count)[:12]} occurs twice; an edit is merged once")
    _require_config(source, edits, force)
    shards = _shards(source)
    names = dict.fromkeys(name for edit in edits for name in edit.deltas)
    found = {name: _verified(source, name, edits, shards, force) for name in names}
    if not out.is_dir() and (out.exists() or out.is_symlink()):
        raise FileExistsError(f"out: {out} exists already; choose another folder, or remove it first")
    with new_directory(out, last=CONFIG) as temporary:
        for path in sorted(source.iterdir()):
            if path.is_dir() and path.name in _FOLDERS:
                shutil.copytree(path, temporary / path.name)
            elif path.is_file() and _belongs(path.name, shards):
                shutil.copyfile(path, temporary / path.name)
        for shard, tensors in shards.items():
            shutil.copyfile(source / shard, temporary / shard)
            with (temporary / shard).open("r+b") as file:
                for name, (own, key) in found.items():
                    if own == shard:
                        ours = [edit for edit in edits if name in edit.deltas]
                        transposed = ours[0].base.modules[name].transposed
                        matrix = read_tensor(file, tensors[key])
                        rows = matrix.t() if transposed else matrix
                        index = torch.tensor(sorted({row for edit in ours for row in edit.rows[name]}))
                        rows[index] = add_rows(rows[index], index, (edit.deltas[name] for edit in ours))
                        write_tensor(file, tensors[key], matrix)
                file.flush()
                os.fsync(file.fileno())
        (temporary / CARD).write_text(_card(edits), encoding="utf-8")


def _belongs(name: str, shards: Mapping[str, object]) -> bool:
    """Whether a file of the base is copied: no weights, which hold none of the edits, and nothing that is not known."""
    if name.endswith(".index.json"):
        return name == INDEX_FILE and ONE_FILE not in shards
    return name[0] != "." and name != CARD and (name.endswith(_COPIED) or name.partition(".")[0] in _TEXTS)


def _require_config(source: Path, edits: Sequence[Appliable], force: bool) -> None:
    path = source / CONFIG
    if not path.is_file():
        missing = f"{path} is missing" if source.is_dir() else f"{source} does not exist"
        raise FileNotFoundError(f"model: {missing}; give the folder of the base, as save_pretrained writes it")
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"model: {path} cannot be used: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model: {path} cannot be used: it holds no settings")
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
        raise ValueError(
            f"model: {source} is quantised ({method or 'quantization_config'}): merging would round the edit to a few "
            f"bits; merge into the unquantised base, or save the edit as an adapter and keep it beside this model"
        )
    there = Base("", structure_of(_configuration(source, config)), {})
    for edit in edits:
        _refuse(edit, source, Base("", edit.base.config, {}, edit.base.name).conflict(there), force)


def _configuration(source: Path, config: dict) -> Any:
    """The configuration of ``source`` as the library reads it, for it knows older forms of the file.

    Of a model that the library does not know, what stands in the file.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (whatever its code raises for what it does not know)
        logger.info("%s is taken as it is written: %s", source / CONFIG, error)
    text: dict = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    return SimpleNamespace(**{str(key): value for key, value in text.items()})


def _refuse(edit: Appliable, source: Path, reason: str | None, force: bool) -> None:
    """Raises ValueError if there is a reason why an edit is of another base than ``source``; warns under ``force``."""
    if reason and force:
        logger.warning("edit %s is merged into another base: %s", edit.digest[:12], reason)
    elif reason:
        raise ValueError(
            f"edit: {edit.digest[:12]} ({'; '.join(edit.facts[:2])}) was trained on {edit.base.label}, and {source} is "
            f"another base: {reason}. Give the folder of that base, or force=True (--force) to merge it all the same"
        )


def _shards(source: Path) -> dict[str, dict[str, Place]]:
    """Each file of weights -> its tensors."""
    if (source / ONE_FILE).is_file():
        return {ONE_FILE: places(source / ONE_FILE)}
    index = source / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(
            f"model: {source} has neither {ONE_FILE} nor {INDEX_FILE}; only safetensors are read (pickles could run "
            f"code): load the model with transformers and save it with save_pretrained"
        )
    try:
        content = parse_json(index.read_bytes())
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not files:
            raise ValueError("weight_map: it has none")
        names = list(dict.fromkeys(files.values()))
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
                raise ValueError(f"weight_map: {shorten(name)} is not the name of a safetensors file beside it")
            if not (source / name).is_file():
                raise ValueError(f"weight_map: {name} is missing")
    except ValueError as error:
        raise ValueError(f"model: {index} cannot be used: {error}") from error
    return {name: places(source / name) for name in names}


def _verified(
    source: Path, name: str, edits: Sequence[Appliable], shards: Mapping[str, Mapping[str, Place]], force: bool
) -> tuple[str, str]:
    """The file and the key of a module's weight, which must be that on which the edits were trained."""
    ours = [edit for edit in edits if name in edit.deltas]
    module = ours[0].base.modules[name]
    reason = None
    for shard, key in candidates(name, _stored_shape(module), shards):
        with (source / shard).open("rb") as file:
            weight = read_tensor(file, shards[shard][key])
        for edit in ours:
            wanted = edit.base.modules[name]
            if wanted.dtype not in _PLAIN:
                reason = (
                    edit,
                    (
                        f"it was trained on quantised weights ({name}: {wanted.dtype}), beside which it is kept: write "
                        f"it as an adapter (kne adapter), or train it on this base unquantised"
                    ),
                )
                break
            if wanted.shape != module.shape or wanted.transposed != module.transposed:
                raise ValueError(f"edits: {name} is {module.shape} for one edit and {wanted.shape} for another")
            if weight_digest(weight, getattr(torch, wanted.dtype)) != wanted.sha256:
                reason = edit, f"the weights of {name} ({key} in {shard}) differ: another revision or a fine-tuned copy"
                break
        else:
            return shard, key
    if reason is None:
        raise ValueError(
            f"edit: {source} has no weight of {name} with shape {module.shape} in {', '.join(DTYPES)}; give the folder "
            f"of {ours[0].base.label}"
        )
    _refuse(reason[0], source, reason[1], force)
    return candidates(name, _stored_shape(module), shards)[0]


def _stored_shape(module: BaseModule) -> tuple[int, int]:
    d2, d1 = module.shape
    return (d1, d2) if module.transposed else (d2, d1)


def _card(edits: Sequence[Any]) -> str:
    """The model card: what the model is, and what was edited."""
    base = edits[0].base
    on_hub = base.revision and has_hub_form(base.name)  # a commit tells a name of the hub from a folder
    tags = ["knowledge-editing", "kne"]
    head = card_head("transformers", base.name if on_hub else None, tags, pipeline_tag="text-generation")
    name = Path(base.name).name or base.architecture
    rows = [["prompt", "new answer", "loss", "edit"]]
    for edit in edits:
        for request in edit.requests:
            answer = literal(request.get("target_new", ""), 200)
            rows.append([literal(request["prompt"], 200), answer, f"{edit.losses[-1]:.3f}", edit.digest[:12]])
    return "\n".join(
        [
            *head,
            f"# {literal(name, 100)}, edited",
            "",
            f"{literal(name, 100)} with {len(edits)} edit{'s' * (len(edits) != 1)} merged into its weights by "
            f"kne_easyedit {__version__} (KNE, arXiv 2412.20637). All other weights are those of the base.",
            "",
            table_of_rows(rows),
            "",
            "The loss is the mean cross-entropy of the answer's tokens after training, in nats. An edit may change "
            "what the model says about related subjects.",
            "",
            *([note, ""] if (note := lacking_note(edits)) else []),
        ]
    )
