"""Edits as LoRA adapters in PEFT's format (an edit of rows is one: docs/serving.md), in two forms.

*portable*: one rank for all modules, zero-padded, the scale in ``A``, ``lora_alpha = r``, no patterns: PEFT, vLLM,
SGLang and llama.cpp read it alike. *exact*: each module's own rank (``rank_pattern``) and rank-stabilised scaling, as
in training; smaller, for PEFT alone.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from kne_easyedit._util.files import new_directory
from kne_easyedit._util.messages import require_one_of, shorten
from kne_easyedit._util.tensor_files import write_tensors
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.editing.lacking import lacking_note
from kne_easyedit.editing.lineage import edited
from kne_easyedit.editing.row_edit import RowEdit
from kne_easyedit.edits.adapter_card import adapter_card, is_hub_name
from kne_easyedit.edits.adapter_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from kne_easyedit.edits.kept_answers import KeptAnswer, kept_answers
from kne_easyedit.edits.low_rank import SERVED_RANKS, Factors, Rows, factorised, served_rank, summed, total_error
from kne_easyedit.models.base import Base, base_of
from kne_easyedit.models.targets import in_features, is_linear, out_features

logger = logging.getLogger(__name__)

FORMS = ("portable", "exact")
_FUSED = {"up_proj": ("gate_proj",), "k_proj": ("q_proj",), "v_proj": ("q_proj",)}
"""Name of a module -> names of those beside it without which SGLang does not stack it, and so leaves it out."""


class AnswersLost(ValueError):
    """A reduced adapter does not give every answer that the whole edit gives; nothing was written."""


@dataclass(frozen=True)
class AdapterReport:
    """A saved adapter."""

    folder: Path
    form: str
    rank: int
    """``r``: of all modules (portable), the largest one (exact)."""
    ranks: Mapping[str, int]
    """Module name -> its rank without padding."""
    errors: Mapping[str, float]
    """Module name -> Frobenius norm of what a reduction left out, relative to the module's change; 0: none."""
    error: float
    """The same of all modules together."""
    bytes: int
    """Of the folder's files together."""
    answers: tuple[KeptAnswer, ...]
    """The facts with the whole and with the reduced edit; empty if nothing was reduced, or no model was given."""
    notes: tuple[str, ...]
    """Sentences that say what was decided, for people."""


@dataclass(frozen=True)
class _Place:
    """Of one module: output units, and whether its weight is stored as ``(d1, d2)`` (GPT-2's Conv1D)."""

    width: int
    transposed: bool


def save_adapter(
    edits: Sequence[RowEdit] | RowEdit,
    folder: str | os.PathLike[str],
    *,
    form: str = "portable",
    max_rank: int | None = None,
    base_name: str | None = None,
    model: nn.Module | None = None,
    force: bool = False,
) -> AdapterReport:
    """Saves edits as one LoRA adapter: their sum. It loads where kne_easyedit is not installed.

    Args:
        edits: One edit or several of the same base model.
        folder: To be made; it must not exist, or be empty.
        form: ``portable`` or ``exact`` (above).
        max_rank: Largest rank of a module; more rows are reduced by singular value decomposition.
        base_name: Hub name or path of the base model, for adapter_config.json and the card; None: as ``edits`` or
            ``model`` say.
        model: The base model; edits applied to it count as taken back, and it stays as it is. Needed for edits that
            are no `KNEEdit`; with it, a reduction is checked: the answers of the whole edit are asked again with the
            reduced one.
        force: Take edits of different bases, or another ``model`` than theirs, with a warning. Shapes must fit.

    Returns:
        What was written: rank, errors, answers.

    Raises:
        AnswersLost: The reduction loses an answer; nothing was written.
        ValueError: An edit cannot be used, needs a higher rank than is served, or is of a module that PEFT would not
            find (some of mixtures of experts); the message says the way out.
        FileExistsError: The folder holds something, or another process was faster.
    """
    edits = [edits] if isinstance(edits, RowEdit) else list(edits)
    require_one_of("form", form, FORMS)
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
        raise ValueError(f"max_rank: must be a positive integer, got {shorten(max_rank)}")
    folder = Path(folder)
    if folder.exists() and not _is_empty(folder):
        raise FileExistsError(f"{folder}: holds something; give a folder that is to be made, or is empty")
    changed = summed(edits)
    _require_one_base(edits, model, force)
    _require_read_by_peft(edits, changed, model)
    places = _places(edits, changed, model)
    rank, notes = _rank(form, max(len(rows) for rows, _ in changed.values()), max_rank)
    factors = {name: factorised(rows, rank if form == "portable" else max_rank) for name, rows in changed.items()}
    answers = _checked_answers(edits, changed, factors, model)
    base = _base_name(edits, model) if base_name is None else base_name
    # Of the base that the edits name: a commit of one repository is none of another.
    revision = _revision(edits, model) if base == _base_name(edits, model) else None
    config = _config(form, rank, factors, places, base, revision)
    notes += [*_served_notes(form, factors), *([note] if (note := lacking_note(edits)) else [])]
    card = adapter_card(
        base=base,
        on_hub=is_hub_name(base) and (base_name is not None or config["revision"] is not None),
        facts=_facts(edits),
        config=config,
        form=form,
        ranks={name: one.rank for name, one in factors.items()},
        error=total_error(factors),
        notes=notes,
    )
    size = _write(folder, config, _tensors(form, rank, factors, places), card)
    return AdapterReport(
        folder,
        form,
        max(one.rank for one in factors.values()) if form == "exact" else rank,
        {name: one.rank for name, one in factors.items()},
        {name: one.error for name, one in factors.items()},
        total_error(factors),
        size,
        answers,
        tuple(notes),
    )


def _rank(form: str, largest: int, max_rank: int | None) -> tuple[int, list[str]]:
    """``r``, and what is said of it."""
    if form == "exact":
        return min(largest, max_rank or largest), []
    rank = served_rank(largest, max_rank)
    if rank < largest:
        above = next((one for one in SERVED_RANKS if one >= largest), None)
        exactly = f"; {above} would keep all of it" if above else ""
        wanted = f" (max_rank {max_rank} is not a rank that vLLM accepts)" if max_rank not in (rank, None) else ""
        return rank, [f"Rank {rank} for all modules, reduced from up to {largest}{wanted}{exactly}."]
    return rank, [f"Rank {rank} for all modules, the nearest that vLLM accepts and that holds up to {largest} rows."]


def _served_notes(form: str, factors: Mapping[str, Factors]) -> list[str]:
    if form == "exact":
        largest = max(one.rank for one in factors.values())
        above = (
            f" Rank {largest} is more than any server takes ({SERVED_RANKS[-1]})." if largest > SERVED_RANKS[-1] else ""
        )
        return [f"Each module has its own rank, and the scaling is rank-stabilised: for PEFT alone.{above}"]
    alone = [
        name
        for name in factors
        for other in _FUSED.get(name.rpartition(".")[2], ())
        if f"{name.rpartition('.')[0]}.{other}" not in factors
    ]
    if alone:
        return [
            f"{len(alone)} modules such as {alone[0]} are changed without the module that SGLang fuses them with, and "
            f"its loader then leaves them out: check the answers there, or use vLLM, llama.cpp or PEFT."
        ]
    return []


def _bases(edits: Sequence[RowEdit]) -> list[Base]:
    return [edit.base for edit in edits if isinstance(edit, KNEEdit)]


def _require_one_base(edits: Sequence[RowEdit], model: nn.Module | None, force: bool) -> None:
    """Raises ValueError if edits that record their base are of different ones, or of another one than ``model``.

    Under ``force`` that is a warning.
    """
    bases = _bases(edits)
    for other in bases[1:]:
        if reason := bases[0].conflict(other):
            _refuse(f"edits: one was trained on {bases[0].label}, another on {other.label}: {reason}", force)
    if model is None:
        return
    for base in bases:
        dtypes = {name: module.dtype for name, module in base.modules.items()}
        if reason := base.conflict(base_of(model, list(base.modules), edited(model).originals, dtypes)):
            _refuse(
                f"edits: one was trained on {base.label}, and the model given is another one: {reason}. Load that "
                f"model, leave model= out (the answers are not checked then; --no-check), or give force=True (--force)",
                force,
            )


def _refuse(message: str, force: bool) -> None:
    if not force:
        raise ValueError(message)
    logger.warning("%s", message)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _places(edits: Sequence[RowEdit], changed: Mapping[str, Rows], model: nn.Module | None) -> dict[str, _Place]:
    """Widths and orientations, of the model or as the edits recorded them."""
    found = {name: _place(name, edits, model) for name in changed}
    for name, (chosen, delta) in changed.items():
        if chosen[-1] >= found[name].width:
            raise ValueError(
                f"edits: row {chosen[-1]} of {name} is beyond its {found[name].width} rows; the edit is of another "
                f"model"
            )
        if model is not None:
            wanted = in_features(model.get_submodule(name))
            if delta.shape[1] != wanted:
                raise ValueError(
                    f"edits: {name} has {delta.shape[1]} inputs, in {type(model).__name__} it has {wanted}; it is "
                    f"of another model"
                )
    return found


def _place(name: str, edits: Sequence[RowEdit], model: nn.Module | None) -> _Place:
    if model is not None:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"edits: {type(model).__name__} has no module {name!r}; the edit is of another model"
            ) from None
        if not is_linear(module):
            raise ValueError(f"edits: {name} is a {type(module).__name__} in this model, not a linear layer")
        return _Place(out_features(module), not isinstance(module, nn.Linear))
    recorded = {
        _Place(base.modules[name].shape[0], base.modules[name].transposed)
        for base in _bases(edits)
        if name in base.modules
    }
    if not recorded:
        raise ValueError(f"edits: they do not say how many rows {name} has; give the base model (model=)")
    if len(recorded) > 1:
        widths = sorted(place.width for place in recorded)
        raise ValueError(f"edits: {name} has {widths} rows in them; they are of different models")
    return recorded.pop()


def _checked_answers(
    edits: Sequence[RowEdit], changed: Mapping[str, Rows], factors: Mapping[str, Factors], model: nn.Module | None
) -> tuple[KeptAnswer, ...]:
    facts = list({answer.fact: None for edit in edits for answer in edit.answers})
    if model is None or not facts or all(one.left is None for one in factors.values()):
        return ()
    answers = kept_answers(model, facts, changed, {name: (one.rows, one.delta) for name, one in factors.items()})
    lost = [one for one in answers if one.lost]
    if lost:
        named = ", ".join(f"{one.prompt!r} -> {one.target!r} ({one.reduced:.2%})" for one in lost[:5])
        raise AnswersLost(
            f"max_rank: reduced to rank {max(one.rank for one in factors.values())} (relative error "
            f"{total_error(factors):.2g}), {len(lost)} of {len(answers)} answers are lost: {named}; raise the rank, "
            f"or leave out max_rank"
        )
    return answers


def _base_name(edits: Sequence[RowEdit], model: Any) -> str:
    named = [base.name for base in _bases(edits) if base.name]
    return str(named[0] if named else getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _revision(edits: Sequence[RowEdit], model: Any) -> str | None:
    named = [base.revision for base in _bases(edits) if base.revision]
    return str(named[0] if named else getattr(getattr(model, "config", None), "_commit_hash", "") or "") or None


def _facts(edits: Sequence[RowEdit]) -> list[tuple[str, str]]:
    """Prompts and answers, as they were requested where that is recorded."""
    found: list[tuple[str, str]] = []
    for edit in edits:
        if isinstance(edit, KNEEdit) and edit.requests:
            found += [(str(one.get("prompt", "")), str(one.get("target_new", ""))) for one in edit.requests]
        else:
            found += [(answer.fact.prompt, answer.fact.target) for answer in edit.answers]
    return list(dict.fromkeys(found))


def _config(
    form: str,
    rank: int,
    factors: Mapping[str, Factors],
    places: Mapping[str, _Place],
    base: str,
    revision: str | None,
) -> dict[str, Any]:
    """adapter_config.json. Only fields that PEFT has had for long: an older one refuses those that it does not know."""
    exact = form == "exact"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "revision": revision,
        "inference_mode": True,
        # In the exact form r is the largest rank, for readers that look at nothing else.
        "r": max(one.rank for one in factors.values()) if exact else rank,
        "lora_alpha": 1 if exact else rank,
        "lora_dropout": 0.0,
        "use_rslora": exact,
        "use_dora": False,
        # Full names, as a list: SGLang takes no regular expression, and a mere `down_proj` would be all layers.
        "target_modules": sorted(factors),
        "rank_pattern": {f"^{re.escape(name)}": one.rank for name, one in sorted(factors.items())} if exact else {},
        "alpha_pattern": {},
        "fan_in_fan_out": any(place.transposed for place in places.values()),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _tensors(form: str, rank: int, factors: Mapping[str, Factors], places: Mapping[str, _Place]) -> dict[str, Tensor]:
    tensors = {}
    for name, one in factors.items():
        own = one.rank if form == "exact" else rank
        # Rank-stabilised: PEFT multiplies by 1 / sqrt(rank).
        factor = math.sqrt(own) if form == "exact" else 1.0
        tensors[f"{PREFIX}{name}.lora_A.weight"] = one.a(own, factor)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = one.b(own, places[name].width)
    return tensors


def _require_read_by_peft(edits: Sequence[RowEdit], names: Iterable[str], model: nn.Module | None) -> None:
    """Raises ValueError for modules that PEFT, when it loads, refuses (Mamba) or takes for others (of experts)."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    try:  # private tables: where they are not, nothing is known, and nothing is said
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return
    kinds = [edit.base.config.get("model_type") for edit in edits if isinstance(edit, KNEEdit)]
    kind = getattr(getattr(model, "config", None), "model_type", kinds[0] if kinds else None)
    pattern = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind, kind)
    exchanged = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(pattern, {})
    refused = getattr(tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None)
    for name in names:
        try:
            refused(LoraConfig(), SimpleNamespace(config=SimpleNamespace(model_type=kind)), name.rpartition(".")[2])
        except ValueError as error:  # noqa: PERF203  (it says no by an exception)
            raise ValueError(f"edit: {name} cannot be served as an adapter ({error}); merge it (kne merge)") from error
    if lost := [name for name in names if name.rpartition(".")[2] in exchanged]:
        raise ValueError(
            f"edit: {lost[0]} cannot be served as an adapter: PEFT takes the {lost[0].rpartition('.')[2]} of a {kind} "
            f"for one of its experts, and the adapter would do nothing; merge the edit (kne merge), or edit the "
            f"attention's output"
        )


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> int:
    """Writes the files into a folder that appears when it is complete; returns their bytes."""
    with new_directory(folder, last=CONFIG_FILE) as unfinished:
        (unfinished / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(unfinished / WEIGHTS_FILE, tensors, {})
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    return sum(path.stat().st_size for path in folder.iterdir())
