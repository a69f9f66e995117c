"""The edit as EasyEdit calls it: everything is checked and computed first, the weights are written last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

from torch import Tensor, nn

from kne_easyedit.batching import chat_prompt, demand_length, encode_request
from kne_easyedit.divergence import Divergence, unrelated_prompts
from kne_easyedit.ensemble import NeuronEnsemble
from kne_easyedit.hparams import KNEHyperParams, resolve_device
from kne_easyedit.localization import find_ensemble
from kne_easyedit.state import undisturbed
from kne_easyedit.training import RowEdit, train_rows, write_rows


def compute_edit(
    model: nn.Module, tok, requests: Sequence[Mapping], hparams: KNEHyperParams, ensemble: NeuronEnsemble | None = None
) -> RowEdit:
    """Locates the ensemble (unless given) and trains its rows on ``requests`` together. Changes nothing in the model."""
    hparams.validate()
    resolve_device(hparams.device)
    if not requests:
        raise ValueError("requests: there are none to edit")
    facts = [encode_request(tok, request, hparams.use_chat_template) for request in requests]
    for fact in facts:
        demand_length(fact, model.config)
    if ensemble is None:
        ensemble = find_ensemble(model, tok, requests, hparams)
    divergence = None
    if hparams.kl_weight:
        with undisturbed(model):
            divergence = Divergence(model, tok, _unrelated(tok, hparams, requests))
    return train_rows(model, facts, ensemble, hparams, divergence)


def _unrelated(tok, hparams: KNEHyperParams, requests: Sequence[Mapping]) -> list[str]:
    prompts = unrelated_prompts(hparams, [request["prompt"] for request in requests])
    return [chat_prompt(tok, prompt) for prompt in prompts] if hparams.use_chat_template else prompts


def apply_kne_to_model(
    model: nn.Module,
    tok,
    requests: Sequence[Mapping] | Mapping,
    hparams: KNEHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    *,
    ensemble: NeuronEnsemble | None = None,
    legacy_contract: bool = False,
    on_trained: Callable[[RowEdit], None] | None = None,
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
    kwargs:
        What else EasyEdit passes to every method (``train_ds``); not used.

    Returns the edited model and the original weights by parameter name (empty if not asked for). After any
    exception, Ctrl-C included, the model is bit by bit what it was, without hooks, adapters or changed flags.
    """
    requests = [requests] if isinstance(requests, Mapping) else list(requests)
    if copy:
        model = deepcopy(model)
    edit = compute_edit(model, tok, requests, hparams, ensemble)
    if on_trained is not None:
        on_trained(edit)
    originals = write_rows(model, edit)
    wanted = return_orig_weights and (keep_original_weight or not legacy_contract)
    return model, originals if wanted else {}
