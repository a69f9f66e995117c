"""What commands on finished edits share: an edit's folder or a store's, and the model that it belongs to."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kne_easyedit.cli.common import add_set, overrides_of
from kne_easyedit.hparams import KNEHyperParams

if TYPE_CHECKING:
    from kne_easyedit.editing.kne_edit import KNEEdit
    from kne_easyedit.edits.store import EditStore
    from kne_easyedit.facts.encoding import Tokenizer

logger = logging.getLogger(__name__)

LOADING = ("model_name", "device", "model_parallel", "max_memory", "offload_folder", "fp16", "bf16", "load_in")
"""Settings that say how a model is loaded."""


class Edits(Protocol):
    """An edit, or a store of several."""

    def applied(self, model: Any, *, force: bool = False) -> AbstractContextManager[Any]:
        """Inside, the model has the edit; afterwards it is what it was, bit for bit."""


@dataclass(frozen=True)
class Opened:
    """An edit or a store, opened."""

    edits: Edits
    facts: tuple[str, ...]
    note: str | None
    """What they were trained on and have not beside them (`lacking_note`)."""
    hparams: Mapping[str, Any]
    """The settings with which the (first) edit was made."""
    base: str
    """The base's name, as the edit has it."""
    active: tuple[KNEEdit, ...]
    """The edits that are applied."""

    def applied(self, model: Any, *, force: bool = False) -> AbstractContextManager[Any]:
        """As `Edits.applied`."""
        return self.edits.applied(model, force=force)


def open_edits(folder: Path) -> Opened:
    """The edit in a folder, or the active edits of a store's.

    Raises:
        FileNotFoundError, ValueError: It is neither, or damaged; the message names it.
    """
    from kne_easyedit.editing.lacking import lacking_note

    if not is_store(folder):
        edit = load_edit(folder)
        return Opened(edit, edit.facts, lacking_note([edit]), edit.hparams, edit.base.name, (edit,))
    store = open_store(folder)
    entries = store.list()
    if not entries:
        raise ValueError(f"store: {folder} holds no edit; add one: kne edits add {folder} DIR")
    active = [entry for entry in entries if entry.on]
    first = store.edit((active or entries)[0].id)
    edits = store.active().edits
    return Opened(
        store,
        tuple(fact for one in active for fact in one.facts),
        lacking_note(edits),
        first.hparams,
        first.base.name,
        edits,
    )


def load_edit(folder: Path) -> KNEEdit:
    """The edit in a folder. Raises FileNotFoundError and ValueError as `KNEEdit.load`; a store is told apart."""
    from kne_easyedit.editing.kne_edit import KNEEdit

    if is_store(folder):
        raise ValueError(f"edit: {folder} is a store of edits; name one of them, {folder}/edits/ID (kne edits list)")
    return KNEEdit.load(folder)


def load_active(folder: Path) -> list[KNEEdit]:
    """The edit in a folder, or the active edits of a store's, at least one. Raises as `open_edits`."""
    if not is_store(folder):
        return [load_edit(folder)]
    edits = list(open_store(folder).active().edits)
    if not edits:
        raise ValueError(f"store: no edit of {folder} is on; switch one on: kne edits on {folder} ID")
    return edits


def is_store(folder: Path) -> bool:
    """Whether a folder is a store of edits."""
    from kne_easyedit.edits.listing import LIST_FILE

    return (folder / LIST_FILE).is_file()


def open_store(folder: Path) -> EditStore:
    """The store in a folder. Raises FileNotFoundError if there is none, and ValueError as `EditStore`."""
    from kne_easyedit.edits.store import EditStore

    if not is_store(folder):
        what = "is no store of edits" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"store: {folder} {what}; `kne edits add {folder} DIR` makes one")
    return EditStore(folder)


def add_base(parser: argparse.ArgumentParser) -> None:
    """The options that say which model is loaded, and how."""
    parser.add_argument("--model", help="path or hub name of the base (default: as the edit names it)")
    add_set(parser, f"how it is loaded: {', '.join(LOADING[1:])}")
    parser.add_argument("--force", action="store_true", help="apply it to another base, too, with a warning")


def load_base(opened: Opened, arguments: argparse.Namespace) -> tuple[Any, Tokenizer]:
    """The model and tokenizer of an edit's base, as the options of `add_base` say.

    Raises:
        ValueError: An option is no setting of loading; the device or the model does not exist.
    """
    from kne_easyedit.models.loading import load_model

    given = overrides_of(arguments.set)
    if unknown := sorted(given.keys() - set(LOADING)):
        raise ValueError(f"--set {unknown[0]}: only {', '.join(LOADING)} say how a model is loaded")
    settings = {name: opened.hparams[name] for name in LOADING if name in opened.hparams}
    # Weights are written to that folder: an edit, which may be somebody else's, does not choose it.
    if (folder := settings.pop("offload_folder", None)) and "offload_folder" not in given:
        logger.warning(
            "offload_folder: the edit was made with %s, which is not used here; --set offload_folder=DIR names one",
            folder,
        )
    if isinstance(places := settings.get("max_memory"), Mapping):  # JSON has made texts of the GPUs' numbers
        settings["max_memory"] = {int(one) if str(one).isdigit() else one: size for one, size in places.items()}
    settings = {"model_name": opened.base, "device": "cpu", **settings, **given}
    if arguments.model:
        settings["model_name"] = arguments.model
    if not settings["model_name"]:
        raise ValueError("--model: the edit does not name its base; say which model it is")
    try:
        # Checked as where an edit is made; which modules would be edited plays no part.
        return load_model(KNEHyperParams.from_dict({"target_modules": ["layers.{}"], **settings}))
    except (ValueError, OSError) as error:
        if arguments.model or not str(error).startswith("model_name: "):
            raise
        raise ValueError(f"{error}; the edit names this base: say where it is by --model") from error
