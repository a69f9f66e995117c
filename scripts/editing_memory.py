"""The command ``memory`` of bench_editing.py: what an edit needs beside the weights, and what the doctor says."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from kne_easyedit import KNEHyperParams, compute_edit, restore
from kne_easyedit._util.machine import PeakMemory, free_memory, hardware
from kne_easyedit._util.settings import replace_settings
from kne_easyedit.doctor import memory_needed
from kne_easyedit.editing.row_edit import write_rows
from kne_easyedit.facts.encoding import Tokenizer, encode_request
from kne_easyedit.localization.localizer import find_ensemble
from kne_easyedit.models.base import base_of
from kne_easyedit.models.devices import environment

MIB = 2**20


def memory(model: Any, tokenizer: Tokenizer, request: Mapping, hparams: KNEHyperParams) -> dict[str, Any]:
    """One edit of a model with random weights: localised with all layers, trained, written, taken back.

    Args:
        model: What `random_model` gave; it is left as it is.
        tokenizer: One that fits it.
        request: The fact.
        hparams: The settings (`settings_of`). Memory does not grow with ``num_steps``.

    Returns:
        ``phases``: for each phase ``seconds``, ``bytes`` measured above what was in use when it began (None where that
        is unknown) and ``stated`` by `memory_needed`; ``above``: the largest of both; and what it depends on.

    Raises:
        RuntimeError: The weights are not what they were after the edit was taken back.
    """
    where, (template,) = model.device, hparams.target_modules
    with tempfile.TemporaryDirectory() as cache:
        hparams = replace_settings(hparams, cache_dir=cache)
        fact = encode_request(tokenizer, request)
        free = free_memory(where)
        needed = memory_needed(model, hparams, len(fact.ids), len(fact.answer), free=free, device=where.type)
        print(
            f"{hparams.model_name}, {model.dtype} on {where}, random weights: {needed.weights / MIB:.0f} MiB, "
            f"{free / MIB:.0f} MiB free beside them; {fact.prompt_length} + {len(fact.answer)} tokens; {hardware()}"
        )
        stated = {phase: sum(parts.values()) for phase, parts in needed.phases.items()}
        phases: dict[str, dict[str, Any]] = {}

        def measured(name: str, work: Callable[[], Any], held: int = 0) -> Any:
            start = time.perf_counter()
            with PeakMemory(where) as peak:
                result = work()
            most = None if peak.bytes is None else peak.bytes + held
            phases[name] = {"seconds": time.perf_counter() - start, "bytes": most, "stated": stated.get(name)}
            of = f", {stated[name] / MIB:.0f} stated" if name in stated else ""
            shown = "unknown" if most is None else f"{most / MIB:.0f} MiB"
            print(f"{name:>12}: {phases[name]['seconds']:7.1f} s, {shown}{of}", flush=True)
            return result

        # Neighbours are prepared inside the training's call: the larger of both counts.
        stated["training"] = max(stated["training"], stated.get("neighbours", 0))
        ensemble = measured("localising", lambda: find_ensemble(model, tokenizer, [request], hparams))
        base = base_of(model, [template.format(layer) for layer in (0, model.config.num_hidden_layers - 1)])
        edit = measured("training", lambda: compute_edit(model, tokenizer, [request], hparams, ensemble))
        deltas = sum(delta.numel() * delta.element_size() for _, delta in edit.deltas.values())
        originals = measured("writing", lambda: write_rows(model, edit), deltas)
        measured("restoring", partial(restore, model, originals))
        originals.clear()
        measured("applying", lambda: edit.apply(model), deltas)
        measured("taking back", lambda: edit.take_back(model), deltas)
    if conflict := base.conflict(base_of(model, list(base.modules))):
        raise RuntimeError(f"not taken back: {conflict}")
    found = [most for phase in phases.values() if (most := phase["bytes"]) is not None]
    above = max(stated.values())
    if found:
        print(
            f"peak above the weights: {max(found) / MIB:.0f} MiB, {above / MIB:.0f} stated "
            f"({above / max(found) - 1:+.0%})"
        )
    return {
        "model": str(hparams.model_name),
        "free": free,
        "weights": needed.weights,
        "rows": edit.size,
        "losses": list(edit.losses),
        "phases": phases,
        "above": {"measured": max(found, default=None), "stated": above},
        "environment": environment(model),
    }
