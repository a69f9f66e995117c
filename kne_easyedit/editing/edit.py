"""The edit as EasyEdit calls it: everything is checked and computed first, the weights are written last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

from torch import Tensor, nn

from kne_easyedit._util.interrupts import defer_interrupts
from kne_easyedit.editing.adapter import rows_by_module
from kne_easyedit.editing.earlier import inherit_notes, noting
from kne_easyedit.editing.endings import endings, require_room
from kne_easyedit.editing.kne_edit import KNEEdit, kne_edit
from kne_easyedit.editing.lineage import inherit_edits
from kne_easyedit.editing.objectives import objectives_for, require_sources
from kne_easyedit.editing.optimizers import OPTIMIZERS
from kne_easyedit.editing.projection import projections_for
from kne_easyedit.editing.row_edit import RowEdit, write_rows
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.facts.encoding import Tokenizer, with_ending
from kne_easyedit.localization.data import encode_facts
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.localization.localizer import find_ensemble, inherit, require_editable_by
from kne_easyedit.models.devices import resolve_device
from kne_easyedit.models.editable import require_editable
from kne_easyedit.models.offload import is_offloaded
from kne_easyedit.models.state import default_modes, require_trainable

logger = logging.getLogger(__name__)

NAMED = 5
"""How many facts a message about a failed edit names at most; of the others it gives the number."""


class EditFailed(ValueError):
    """Training did not reach every answer (``on_failure: raise``); nothing was written."""


def compute_edit(
    model: nn.Module,
    tok: Tokenizer,
    requests: Sequence[Mapping] | Mapping,
    hparams: EditSettings,
    ensemble: NeuronEnsemble | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> KNEEdit:
    """Locates the ensemble (unless given) and trains its rows on ``requests`` together (Eq. 4-11).

    The model is not changed. Not reaching every answer is no error here: see `RowEdit.failed`.

    Args:
        model: A causal language model of transformers.
        tok: Its tokenizer.
        requests: Mappings with ``prompt``, ``target_new`` and maybe ``subject``, or one of them.
        hparams: The settings, validated first.
        ensemble: Rows to train instead of those that ``hparams`` lead to.
        on_step: Called before each training step with its number, from 1, and the cross-entropy in nats.

    Returns:
        The trained edit, not yet written.

    Raises:
        ValueError: A setting, request, model or ensemble cannot be used; the message names it.
        UnsupportedModel: Its layers cannot be replayed, and ``attribution_engine`` is ``sweep``; or it is an
            encoder-decoder. ReplayMismatch: its layers replay differently from the model itself.
        FloatingPointError: Scores or the training loss are not finite.
        OSError: A file or the score cache cannot be read or written.
    """
    requests = [requests] if isinstance(requests, Mapping) else list(requests)
    edit, ensemble = _train(model, tok, requests, hparams, ensemble, on_step)
    return kne_edit(edit, model, requests, hparams, ensemble)


def _train(
    model: nn.Module,
    tok: Tokenizer,
    requests: Sequence[Mapping],
    hparams: EditSettings,
    ensemble: NeuronEnsemble | None,
    on_step: Callable[[int, float], None] | None,
    written: bool = False,
) -> tuple[RowEdit, NeuronEnsemble]:
    """`compute_edit` without what the edit says about its base; ``written``: to be written into the weights."""
    hparams.validate()
    require_trainable(model)
    resolve_device(hparams.device)
    if not requests:
        raise ValueError("requests: there are none to edit")
    facts = encode_facts(model, tok, requests, hparams)
    require_sources(requests, hparams, tok, localised=ensemble is None)
    require_room(model, tok, facts, hparams)
    if written:
        if ensemble is None:
            require_editable_by(model, hparams)
        else:
            require_editable(model, {name: model.get_submodule(name) for name in rows_by_module(model, ensemble)})
    if ensemble is None:
        ensemble = find_ensemble(model, tok, facts, hparams)
    # After localisation: scores are those of the answers alone.
    facts = [with_ending(*each, model.config) for each in zip(facts, endings(model, tok, facts, hparams))]
    objectives = objectives_for(model, tok, requests, hparams)
    projections = projections_for(model, tok, requests, hparams, list(rows_by_module(model, ensemble)))
    return train_rows(model, facts, ensemble, hparams, objectives, on_step, projections), ensemble


def require_reached(edit: RowEdit, hparams: EditSettings) -> None:
    """Names facts that an edit did not reach, in the log; under ``on_failure: raise`` raises EditFailed."""
    shortfall = _shortfall(edit, hparams)
    if shortfall and hparams.on_failure == "raise":
        raise EditFailed(f"{shortfall}. Nothing was written (on_failure: raise)")
    if shortfall:
        # Logged, not `warnings.warn`: shown every time, in notebooks and EasyEdit's scripts alike, and by `kne run`,
        # which redirects stderr to a file while it edits.
        logger.warning("%s", shortfall)


def _shortfall(edit: RowEdit, hparams: EditSettings) -> str | None:
    """The message about an edit that did not reach all of its facts; None if it did."""
    failed = edit.failed(hparams.stop_loss)
    if not failed:
        return None
    named = [
        f"{a.fact.prompt!r} -> {a.fact.target!r} (loss {a.loss:.3f}, probability {a.probability:.2%})"
        for a in failed[:NAMED]
    ]
    more = [f"and {len(failed) - NAMED} more"] if len(failed) > NAMED else []
    state, below = f"loss {edit.losses[-1]:.3f}, stop_loss {hparams.stop_loss:g}", edit.losses[-1] < hparams.stop_loss
    if below:
        state += ", but another token is more probable"
    if below and not hparams.until_given:  # training stopped by itself
        remedy = "set until_given: true, or lower stop_loss"
    elif not below and not edit.steps:  # training ends before the first step only if that moves nothing
        remedy = "no row has moved: their gradients are 0; load the model in float32 or bfloat16"
        if hparams.input_projection:
            remedy += ", or leave more directions open (fewer neighbours, a larger projection_ridge)"
    else:
        rate = OPTIMIZERS[hparams.optimizer].rate_setting
        remedy = f"do the facts contradict each other? Else raise num_steps or {rate}, or take a larger p"
    return (
        f"{len(failed)} of {len(edit.answers)} facts not reached after {edit.steps} steps ({state}): "
        f"{', '.join(named + more)}; {remedy}"
    )


def _copied(model: nn.Module) -> nn.Module:
    with default_modes(model):  # a copy made in inference mode could not be trained
        copy = deepcopy(model)
    inherit(copy, model)
    inherit_edits(copy, model)
    inherit_notes(copy, model)
    return copy


def apply_kne_to_model(
    model: nn.Module,
    tok: Tokenizer,
    requests: Sequence[Mapping] | Mapping,
    hparams: EditSettings,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    *,
    ensemble: NeuronEnsemble | None = None,
    legacy_contract: bool = False,
    restored_by_caller: bool = False,
    on_trained: Callable[[KNEEdit], None] | None = None,
    on_rows: Callable[[RowEdit], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    **kwargs: object,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Edits ``model`` so that it gives every request's ``target_new``. This is the function that EasyEdit calls.

    torch's modes around the call (autocast, no_grad, inference_mode) have no effect.

    After any exception, Ctrl-C included, the model is what it was, bit for bit, without hooks, adapters or changed
    flags:
    Ctrl-C waits for the end of a fact, a layer, a pass or a step (`interrupts`). This holds where SIGINT has a Python
    handler. On Python 3.10 a Ctrl-C in the microseconds in which the edit is returned can still lose the originals.

    Args:
        model: A causal language model of transformers.
        tok: Its tokenizer.
        requests: Mappings with ``prompt``, ``target_new`` and maybe ``subject``, or one; all are edited together.
        hparams: The settings.
        copy: Edit a deep copy and leave ``model`` alone.
        return_orig_weights: Return the original matrices, whole, so that ``parameter[...] = original`` undoes the edit
            bit for bit; of an offloaded model, so that `restore` does.
        keep_original_weight: Read under ``legacy_contract`` only.
        ensemble: Rows to train instead of those that ``hparams`` lead to.
        legacy_contract: EasyEdit's meaning before May 2024: originals are returned only if ``keep_original_weight`` is
            true; an empty mapping makes the editor let edits accumulate. The bridge sets it for such versions.
        restored_by_caller: The caller will write the originals into the parameters itself, as EasyEdit's editor does.
            Offloaded models are refused then: their parameters hold nothing (`restore` knows where they are).
        on_trained: Called with the trained edit before it is written. For it alone the base is fingerprinted: every
            touched matrix is hashed.
        on_rows: Called with the trained rows, after ``on_trained`` and before they are written: for who undoes the
            edit.
        on_step: Called before each training step with its number, from 1, and the cross-entropy in nats.
        kwargs: What else EasyEdit passes to every method (``train_ds``); not used.

    Returns:
        The edited model, and the original weights by parameter name (empty if not asked for). Facts that were not
        reached are named in a warning of the log.

    Raises:
        EditFailed: Facts were not reached, and ``on_failure`` is ``raise``; nothing was written.
        EditLost: The written model does not have the loss that was trained; it was put back.
        ValueError: A setting, request, model or ensemble cannot be used; the message names it.
        UnsupportedModel: Its layers cannot be replayed, and ``attribution_engine`` is ``sweep``; or it is an
            encoder-decoder. ReplayMismatch: its layers replay differently from the model itself.
        FloatingPointError: Scores or the training loss are not finite.
        OSError: A file or the score cache cannot be read or written.
    """
    # All of it is deferred: Python's own locks do not survive a second Ctrl-C (a `Condition` that waits).
    with defer_interrupts():
        requests = [requests] if isinstance(requests, Mapping) else list(requests)
        if restored_by_caller and return_orig_weights and is_offloaded(model):
            raise ValueError(
                f"model: {type(model).__name__} is offloaded (accelerate), and EasyEdit's editor could not undo the "
                f"edit: it writes originals into parameters that hold nothing between passes. Edit it without EasyEdit "
                f"(kne edit, apply_kne_to_model and restore), or load it on devices that hold it"
            )
        edit, ensemble = _train(model, tok, requests, hparams, ensemble, on_step, written=True)
        if on_trained is not None:  # else nobody asks what the base was, and it is not fingerprinted
            edit = kept = kne_edit(edit, model, requests, hparams, ensemble)
            on_trained(kept)
        if on_rows is not None:
            on_rows(edit)
        require_reached(edit, hparams)  # before it is written: Ctrl-C in a call after that would lose the originals
        model = _copied(model) if copy else model
    note = noting(model, requests, edit, hparams) if hparams.spare_edited else None
    originals = write_rows(model, edit, on_written=note)
    wanted = return_orig_weights and (keep_original_weight or not legacy_contract)
    return model, originals if wanted else {}
