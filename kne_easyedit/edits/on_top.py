"""What an edit on top of a store's edits begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from kne_easyedit.edits.stack import EditStack
from kne_easyedit.edits.store import EditStore
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.localization.localizer import find_ensemble
from kne_easyedit.localization.settings import LocalizationSettings


def localized_and_applied(
    store: EditStore,
    model: nn.Module,
    tokenizer: Tokenizer,
    requests: Sequence[Mapping],
    hparams: LocalizationSettings,
) -> None:
    """Localises on the base, then gives the model the store's active edits: what is edited now is on top of them.

    Localised is on the base, whatever was edited before, so that the ensemble is that of a process of its own; it is
    found once for a loaded model (`find_ensemble`). Without ``localization_data`` each edit localises by itself.

    Args:
        store: The store.
        model: The model; it has the store's active edits afterwards.
        tokenizer: Its tokenizer.
        requests: What will be edited.
        hparams: The settings.

    Raises:
        ValueError, OSError, FloatingPointError: As `find_ensemble`, `EditStore.apply` and `EditStore.require_base`.
    """
    with EditStack(()).applied(model):
        store.require_base(model)  # before anything is localised or trained
        if hparams.localization_data is not None:
            find_ensemble(model, tokenizer, requests, hparams)
    store.apply(model)
