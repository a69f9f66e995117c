"""A preflight check: what a planned run needs, what it lacks, and how long it will take, before hours are spent on it.

`examine` asks one question after the other and goes on after a failure, so that all faults of a plan show at once.
Only the trial loads the model; modules and memory come from its configuration.
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from kne_easyedit._util.machine import free_memory
from kne_easyedit.attribution.score_cache import scores_folder
from kne_easyedit.bridge.loaded_model import prepare_tokenizer
from kne_easyedit.bridge.methods import BY_SUBJECT, RIGHT_PADDED, require_undoable
from kne_easyedit.doctor.findings import FAILURE, OK, WARNING, Finding, failure, left_out, listed, size
from kne_easyedit.doctor.memory import (
    FORMULAE,
    TOKENS,
    adapted,
    at_layer,
    depth,
    fine_tuned,
    loaded_type,
    memory_needed,
    vocabulary,
    without_weights,
)
from kne_easyedit.doctor.surroundings import easyedit, packages
from kne_easyedit.doctor.trial import try_out
from kne_easyedit.facts.encoding import SEPARATOR, encode_request, require_length
from kne_easyedit.facts.records import load_records, require_evaluable
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization.data import localization_requests
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.devices import resolve_device
from kne_easyedit.models.editable import stored_quantisation
from kne_easyedit.models.layer_kinds import UNQUANTISED
from kne_easyedit.models.loading import SMOLLM2
from kne_easyedit.models.targets import count_parameters, nearest_templates, resolve_target

DATA = "data"


def examine(
    plan: Mapping[str, object], data: str, records: int | None = None, offset: int = 0, trial: bool = True
) -> Iterator[Finding]:
    """What is to be said about a run of ``plan`` (label of a method -> its hyperparameters) on records of ``data``.

    The trial is left out if anything has failed that it needs; bad records do not stop it as long as good ones are left.
    """
    failed: list[str] = []
    for finding in _examine(plan, data, records, offset, trial, failed):
        if finding.status == FAILURE:
            failed.append(finding.name)
        yield finding


def _examine(
    plan: Mapping, data: str, records: int | None, offset: int, trial: bool, failed: Sequence[str]
) -> Iterator[Finding]:
    yield from packages()
    yield from easyedit()
    device = folder = model = tokenizer = None
    if plan:
        device = yield from devices(plan)
        folder = yield from model_folder(plan)
    if folder is not None:
        model = yield from architecture(folder)
    if model is None:
        yield left_out("modules, tokenizer, memory", "there is no model")
    else:
        yield from modules(plan, model)
        tokenizer = yield from tokenizers(plan, folder, model)
    requests = yield from data_records(data, records, offset, tokenizer, model, plan)
    for hparams in plan.values():
        if isinstance(hparams, KNEHyperParams) and hparams.ensemble is None:
            yield from localization_facts(hparams, tokenizer, model)
            yield from cache(hparams, model, len(requests))
    if model is not None and device is not None:
        yield from memory(plan, model, device, tokenizer, requests)
    missing = [name for name in failed if name != DATA] + [DATA] * (not requests) + ["hyperparameters"] * (not plan)
    if not trial:
        yield left_out("trial", "neither the edits nor the hours of the run were tried")
    elif missing:
        yield left_out("trial", f"it needs what has failed: {', '.join(dict.fromkeys(missing))}")
    else:
        yield from try_out(plan, folder, requests)


# The software


# The model


def devices(plan: Mapping) -> Iterator[Finding]:
    """Returns the device of the run, or None."""
    found: dict[torch.device, list[str]] = {}
    for label, hparams in plan.items():
        try:
            require_undoable(hparams)
        except ValueError as error:
            yield failure(f"method {label}", error)
        try:
            device = resolve_device(hparams.device)
            found.setdefault(device if device.index else torch.device(device.type), []).append(label)  # cuda is cuda:0
        except (ValueError, RuntimeError) as error:
            yield failure(f"device of {label}", error)
    types = {label: str(loaded_type(hparams)).removeprefix("torch.") for label, hparams in plan.items()}
    first = next(iter(types.values()))
    if set(types.values()) != {first}:
        text = (
            f"fp16, bf16: the files ask for different types ({listed(types)}), and the model is loaded once, in {first}"
        )
        yield Finding("type", WARNING, text)
    if len(found) > 1:
        names = "; ".join(f"{device} for {', '.join(labels)}" for device, labels in found.items())
        yield Finding(
            "device",
            FAILURE,
            f"device: the files name different ones: {names}",
            "name one in all files: one run has one model",
        )
        return None
    for device in found:
        gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        yield Finding("device", OK, f"{device}{gpu}, model in {first}")
        return device
    return None


def model_folder(plan: Mapping) -> Iterator[Finding]:
    """Returns the folder of the model's files on this machine, or None. Nothing is downloaded."""
    names = sorted({str(hparams.model_name) for hparams in plan.values()})
    if len(names) > 1:
        text = f"model_name: the files name different models: {', '.join(names)}"
        yield Finding("model", FAILURE, text, "name one in all files: one run has one model")
        return None
    try:
        return _local_folder(names[0])
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        yield failure("model", error)
        return None


def architecture(folder: Path) -> Iterator[Finding]:
    """Returns the model without its weights, or None."""
    from transformers import AutoConfig

    try:
        model = without_weights(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        _require_weights(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        yield failure("model", f"model_name: {folder}: {error}")
        return None
    yield Finding(
        "model",
        OK,
        f"{type(model).__name__} with {depth(model)} layers and {count_parameters(model):,} parameters in {folder}",
    )
    return model


def _local_folder(name: str) -> Path:
    if name == SMOLLM2:
        from kne_easyedit.models.smollm2 import smollm2_path

        return smollm2_path()
    if Path(name).is_dir():
        return Path(name).absolute()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        from_hub = f"get it by `hf download {name}`, or " if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) else ""
        raise ValueError(
            f"model_name: {name!r} is not on this machine; {from_hub}set model_name to a folder that has it"
        ) from error


def _require_weights(folder: Path) -> None:
    """Raises ValueError for a folder that lacks weights: a download may have been broken off."""
    for index in folder.glob("*.index.json"):
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(file for file in files if not (folder / file).is_file()):
            raise ValueError(
                f"of {len(files)} files of weights {len(missing)} are missing ({missing[0]}, ...); get the whole model"
            )
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ValueError("there are no weights (*.safetensors, *.bin); get the whole model")


def modules(plan: Mapping, model: nn.Module) -> Iterator[Finding]:
    """Whether the settings name modules and layers that the model has."""
    for label, hparams in plan.items():
        name, faults = f"modules of {label}", list(_module_faults(model, hparams))
        yield from (failure(name, fault) for fault in faults)
        if not faults and isinstance(hparams, KNEHyperParams) and (stored := stored_quantisation(model)):
            yield Finding(
                name,
                WARNING,
                f"the model's files are quantised ({stored}); rows of quantised layers cannot be edited",
                UNQUANTISED,
            )
        elif not faults:
            named = (
                getattr(hparams, "target_modules", None)
                or getattr(hparams, "rewrite_module_tmp", None)
                or "those of the method"
            )
            layers = f"layers {hparams.layers}" if getattr(hparams, "layers", None) else "all layers"
            yield Finding(name, OK, f"{named if isinstance(named, str) else ', '.join(named)} in {layers}")


def _module_faults(model: nn.Module, hparams) -> Iterator[str]:
    if isinstance(hparams, KNEHyperParams):
        try:
            for template in hparams.target_modules:
                resolve_target(model, template, hparams.layers)
            if hparams.ensemble is not None:
                NeuronEnsemble.load(hparams.ensemble).targets(model)
        except ValueError as error:
            yield str(error)
        except OSError as error:
            yield f"ensemble: {error}"
        return
    known, named = dict(model.named_modules()), type(model).__name__
    layers = list(getattr(hparams, "layers", None) or [])
    for field, numbers in {"layers": layers, "v_loss_layer": [getattr(hparams, "v_loss_layer", 0)]}.items():
        if outside := [i for i in numbers if not 0 <= i < depth(model)]:
            yield f"{field}: {outside} out of range; {named} has layers 0 to {depth(model) - 1}"
    layer = next((i for i in layers if 0 <= i < depth(model)), 0)
    for field in filter(lambda field: _is_read(hparams.alg_name, field), vars(hparams)):
        template = getattr(hparams, field)
        name = at_layer(template, layer)
        if not (fine_tuned(model, name) if hparams.alg_name == "FT" else name in known):
            yield f"{field}: {template!r} names no module of {named}{_nearest(known, template)}"
    if hparams.alg_name == "LoRA" and not adapted(model, hparams):
        yield f"target_modules: {hparams.target_modules} names no module of {named} in layers {layers or 'at all'}"


def _is_read(alg_name: str, field: str) -> bool:
    """Whether a method looks for a module by this setting: EasyEdit's files name more than each method needs."""
    if alg_name == "FT":
        return field == "rewrite_module_tmp"
    if alg_name in RIGHT_PADDED and field == "attn_module_tmp":
        return False
    return field.endswith("_module_tmp") or field in ("ln_f_module", "lm_head_module")


def _nearest(known: Mapping[str, nn.Module], template: str) -> str:
    templates = sorted({re.sub(r"\.\d+\b", ".{}", name, count=1) for name in known})
    near = nearest_templates(known[""], template.removesuffix(".weight"), alike=False)  # known[""]: the model itself
    near = near or difflib.get_close_matches(template.removesuffix(".weight"), templates, n=3, cutoff=0.3)
    return f"; nearest: {', '.join(near)}" if near else ""


def tokenizers(plan: Mapping, folder: Path, model: nn.Module) -> Iterator[Finding]:
    """Returns the tokenizer, or None."""
    from transformers import AutoTokenizer

    name = "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001  (a broken file raises anything, in transformers or in tokenizers' Rust)
        yield failure(name, f"tokenizer: that in {folder} cannot be loaded: {error}")
        return None
    sides: dict[str, list[str]] = {}
    for label, hparams in plan.items():
        prepared = deepcopy(tokenizer)
        prepare_tokenizer(prepared, hparams.alg_name)
        sides.setdefault(prepared.padding_side, []).append(label)
    pad, largest, known = prepared.pad_token_id, max(tokenizer.get_vocab().values()), vocabulary(model)
    if pad is None or pad >= known:
        fault = (
            "has neither a pad token nor an end token"
            if pad is None
            else f"has pad token {pad}, the model knows those below {known}"
        )
        yield Finding(
            name, FAILURE, f"tokenizer: {fault}", f"set another pad_token in {folder / 'tokenizer_config.json'}"
        )
        return None
    if largest >= known:
        text = f"tokenizer: has tokens up to {largest}, the model knows those below {known}; records that use such tokens are bad"
        yield Finding(name, WARNING, text, "take the tokenizer that belongs to the model")
    padding = ", ".join(f"{side} for {', '.join(labels)}" for side, labels in sides.items())
    own = "its own pad token" if tokenizer.pad_token_id is not None else "its end token for padding"
    text = f"{type(tokenizer).__name__} with {own}; padding will be {padding}; its tokens end at {largest}, the model's at {known - 1}"
    yield Finding(name, OK, text)
    return tokenizer


# The data


def data_records(
    data: str, records: int | None, offset: int, tokenizer, model: nn.Module | None, plan: Mapping
) -> Iterator[Finding]:
    """Returns the usable requests."""
    by_subject = [label for label, hparams in plan.items() if hparams.alg_name in BY_SUBJECT]
    separator = next((hparams.separator for hparams in plan.values() if isinstance(hparams, KNEHyperParams)), SEPARATOR)
    try:
        requests, complaints = load_records(data, records, offset, on_bad="skip")
    except (ValueError, OSError) as error:
        yield failure(DATA, error)
        return []
    total = len(requests) + len(complaints)
    bad = {
        int(number): why
        for text in complaints
        for number, why in re.findall(r": record (\d+): (.*)", text, re.DOTALL)[:1]
    }
    for request in requests if tokenizer is not None else ():
        try:
            require_evaluable(request, tokenizer, model, separator, by_subject)  # the probes, too
        except ValueError as error:
            bad[request["index"]] = str(error)
    if bad:
        text = f"{len(bad)} of {total} records of {data} cannot be used: {', '.join(map(str, sorted(bad)))}"
        reasons = [f"record {index}: {bad[index]}" for index in sorted(bad)]
        yield Finding(
            DATA, FAILURE, "\n".join([text, *reasons]), "mend them, or leave them out by `kne run --on-bad-record skip`"
        )
    elif records is not None and total < records:
        yield Finding(
            DATA, WARNING, f"{records} records wanted, {data} has {total} from number {offset} on, all of them sound"
        )
    else:
        yield Finding(DATA, OK, f"{total} records of {data}, all of them sound")
    return [request for request in requests if request["index"] not in bad]


def _length(request: Mapping, tokenizer, model: nn.Module) -> int:
    """Tokens of prompt and answer. Raises ValueError for a fact that the model or its tokenizer cannot take."""
    fact = encode_request(tokenizer, request)
    require_length(fact, model.config)
    if max(fact.ids) >= vocabulary(model):
        raise ValueError(
            f"tokenizer: token {max(fact.ids)} of {request['prompt']!r}, the model knows those below {vocabulary(model)}"
        )
    return len(fact.ids)


def localization_facts(hparams: KNEHyperParams, tokenizer, model: nn.Module | None) -> Iterator[Finding]:
    """The facts that KNE localises on, where they are not those that it edits."""
    name, data, wanted = "localization_data", hparams.localization_data, hparams.localization_size
    if data is None:
        return
    try:
        facts = localization_requests(hparams)
        for fact in facts if tokenizer is not None else ():
            _length(fact, tokenizer, model)
        if not facts:
            raise ValueError(f"{data}: holds no usable fact")
    except (ValueError, OSError) as error:
        yield failure(name, error)
        return
    yield Finding(
        name,
        OK if len(facts) == wanted else WARNING,
        f"{len(facts)} usable facts of {data} (localization_size: {wanted})",
    )


def cache(hparams: KNEHyperParams, model: nn.Module | None, records: int) -> Iterator[Finding]:
    """Whether the score cache can take what localisation computes. Makes no folder."""
    folder = scores_folder(hparams.cache_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    way_out = "free some space, or set cache_dir or KNE_CACHE to a folder that can be written"
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        yield Finding(
            "cache", FAILURE, f"cache_dir: {folder} cannot be written ({there}: {error.strerror or error})", way_out
        )
        return
    text, needed = f"{folder} can be written, {size(free)} free", 0
    try:
        targets = (
            [resolve_target(model, template, hparams.layers) for template in hparams.target_modules]
            if model is not None
            else []
        )
        facts = records if hparams.localization_data is None else hparams.localization_size
        needed = facts * sum(4 * len(target.layers) * target.n_neurons + 4096 for target in targets)
        text += f", {size(needed)} needed at most ({facts} facts)" if targets else ""
    except ValueError:
        pass  # said where the modules are
    yield Finding("cache", FAILURE if needed > free else OK, text, way_out if needed > free else "")


# The machine


def memory(
    plan: Mapping, model: nn.Module, device: torch.device, tokenizer, requests: Sequence[Mapping]
) -> Iterator[Finding]:
    """What each method needs, against what is free now."""
    parallel = device.type == "cuda" and any(getattr(hparams, "model_parallel", False) for hparams in plan.values())
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if parallel else []
    free = sum(map(free_memory, gpus or [device]))
    tokens = (
        max((_length(request, tokenizer, model) for request in requests), default=TOKENS)
        if tokenizer is not None
        else TOKENS
    )
    for label, hparams in plan.items():
        name = f"memory of {label}"
        try:
            needed = memory_needed(model, hparams, tokens)
        except (ValueError, OSError):
            yield left_out(name, "its modules are not there")
            continue
        total, parts = (
            sum(needed.values()),
            listed({purpose: size(number) for purpose, number in needed.items() if number}),
        )
        text = f"{size(total)} needed, {size(free)} free on {'all GPUs' if gpus else device} ({parts})"
        if total > free:
            yield Finding(
                name,
                FAILURE,
                text,
                "free some, take another device or model_parallel, set bf16 or fp16, or edit fewer layers",
            )
        elif hparams.alg_name not in FORMULAE:
            yield Finding(name, WARNING, f"{text}; what {hparams.alg_name} needs beside these only a trial can show")
        else:
            yield Finding(name, OK, text)
    if device.type == "cuda":
        needed, free = (
            loaded_type(next(iter(plan.values()))).itemsize * count_parameters(model),
            free_memory(torch.device("cpu")),
        )
        text = f"{size(needed)} needed to load the model before it moves to {device}, {size(free)} free"
        yield Finding(
            "memory of the machine", FAILURE if needed > free else OK, text, "free some" if needed > free else ""
        )
