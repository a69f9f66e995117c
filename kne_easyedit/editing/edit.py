"""The edit as EasyEdit calls it: everything is checked and computed first, the weights are written last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

from torch import Tensor, nn

from kne_easyedit._util.interrupts import defer_interrupts
from kne_easyedit.editing.objectives import Divergence, unrelated_prompts
from kne_easyedit.editing.row_edit import RowEdit, write_rows
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.facts.encoding import chat_prompt
from kne_easyedit.localization.data import encode_facts
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.localization.localizer import find_ensemble, inherit
from kne_easyedit.models.devices import resolve_device
from kne_easyedit.models.state import default_modes, preserve_state, require_trainable

logger = logging.getLogger(__name__)

NAMED = 5
"""Facts that a message about a failed edit names; of more it gives the number."""


class EditFailed(ValueError):
    """Training did not reach every answer (``on_failure: raise``); nothing was written."""


def compute_edit(
    model: nn.Module,
    tok,
    requests: Sequence[Mapping],
    hparams: EditSettings,
    ensemble: NeuronEnsemble | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> RowEdit:
    """Locates the ensemble (unless given) and trains its rows on ``requests`` together. Changes nothing in the model.

    Does not judge what it found: `RowEdit.failed` does.
    """
    hparams.validate()
    require_trainable(model)
    resolve_device(hparams.device)
    if not requests:
        raise ValueError("requests: there are none to edit")
    facts = encode_facts(model, tok, requests, hparams)
    if ensemble is None:
        ensemble = find_ensemble(model, tok, facts, hparams)
    divergence = None
    if hparams.kl_weight:
        with preserve_state(model):
            divergence = Divergence(model, tok, _unrelated(tok, hparams, requests))
    return train_rows(model, facts, ensemble, hparams, divergence, on_step)


def _shortfall(edit: RowEdit, hparams: EditSettings) -> str | None:
    """What is to be said of an edit that did not reach all of its facts; None if it did."""
    failed = edit.failed(hparams.stop_loss)
    if not failed:
        return None
    named = [
        f"{a.fact.prompt!r} -> {a.fact.target!r} (loss {a.loss:.3f}, probability {a.probability:.2%})"
        for a in failed[:NAMED]
    ]
    more = [f"and {len(failed) - NAMED} more"] if len(failed) > NAMED else []
    return (
        f"{len(failed)} of {len(edit.answers)} facts not reached after {edit.steps} steps (loss {edit.losses[-1]:.3f}, stop_loss "
        f"{hparams.stop_loss:g}): {', '.join(named + more)}; do the facts contradict each other? Else raise num_steps or lr, lower "
        f"stop_loss, or take a larger p"
    )


def _unrelated(tok, hparams: EditSettings, requests: Sequence[Mapping]) -> list[str]:
    prompts = unrelated_prompts(hparams, [request["prompt"] for request in requests])
    return [chat_prompt(tok, prompt) for prompt in prompts] if hparams.use_chat_template else prompts


def _copied(model: nn.Module) -> nn.Module:
    with default_modes(model):  # in inference mode it would be a model that cannot be trained any more
        copy = deepcopy(model)
    inherit(copy, model)
    return copy


def apply_kne_to_model(
    model: nn.Module,
    tok,
    requests: Sequence[Mapping] | Mapping,
    hparams: EditSettings,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    *,
    ensemble: NeuronEnsemble | None = None,
    legacy_contract: bool = False,
    on_trained: Callable[[RowEdit], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    **kwargs,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Edits ``model`` so that it gives every request's ``target_new``: EasyEdit's entry point of a method.

    Parameters
    ----------
    requests:
        Mappings with ``prompt``, ``target_new`` and maybe ``subject``; all are edited together.
    copy:
        Edit a deep copy and leave ``model`` alone.
    return_orig_weights:
        Return the original matrices, whole, so that ``parameter[...] = original`` undoes the edit bit by bit.
    keep_original_weight:
        Counts only under ``legacy_contract``.
    ensemble:
        Rows to train instead of those that ``hparams`` lead to.
    legacy_contract:
        EasyEdit's meaning before May 2024: originals are returned only if ``keep_original_weight`` is true; an
        empty mapping tells the editor to let edits accumulate. The bridge sets it for such versions.
    on_trained:
        Is given the trained rows and their losses before they are written.
    on_step:
        Is told each training step's number and the loss before it.
    kwargs:
        What else EasyEdit passes to every method (``train_ds``); not used.

    Returns the edited model and the original weights by parameter name (empty if not asked for). Facts that were
    not reached are named in a warning of the log; under ``on_failure: raise`` EditFailed is raised instead. Raises EditLost
    if the written model does not have the loss that was trained. torch's modes around the call (autocast, no_grad,
    inference_mode) do not count.

    After any exception, Ctrl-C included, the model is bit by bit what it was, without hooks, adapters or changed flags:
    Ctrl-C waits for the end of a fact, a layer, a pass or a step (`interrupts`). This holds where SIGINT has a Python
    handler; a process that is killed keeps nothing. On Python 3.10 a Ctrl-C in the very microseconds in which the edit is
    handed over can still lose the originals.
    """
    requests = [requests] if isinstance(requests, Mapping) else list(requests)
    with (
        defer_interrupts()
    ):  # Python's own locks do not survive a second Ctrl-C (a `Condition` that waits): hold all of it
        edit = compute_edit(model, tok, requests, hparams, ensemble, on_step)
        if on_trained is not None:
            on_trained(edit)
        shortfall = _shortfall(edit, hparams)
        if shortfall and hparams.on_failure == "raise":
            raise EditFailed(f"{shortfall}. Nothing was written (on_failure: raise)")
        if shortfall:
            # Logged, not `warnings.warn`: seen in a notebook and in EasyEdit's scripts alike, every time, and by `kne run`, too, which
            # sends stderr to a file while it edits. Before the edit is handed over: a call after it would be a place for Ctrl-C.
            logger.warning("%s", shortfall)
        model = _copied(model) if copy else model
    originals = write_rows(model, edit)
    wanted = return_orig_weights and (keep_original_weight or not legacy_contract)
    return model, originals if wanted else {}
