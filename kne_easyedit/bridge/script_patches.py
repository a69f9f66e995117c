"""Patches for EasyEdit's example scripts: records that it refuses without naming them, and outdated files."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import atomic_write
from kne_easyedit.bridge.fluency import fluency_variant
from kne_easyedit.bridge.importing import module
from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.bridge.patches import runtime_patch
from kne_easyedit.models.fingerprint import model_digest

SHOWN = 3
"""Bad records that a message shows in full; it lists all their numbers."""


@runtime_patch(
    "subject-in-prompt",
    "a subject that does not stand in its prompt is an AssertionError: None, which does not say which record it is",
)
def _subject_in_prompt(easyeditor: ModuleType) -> bool:
    editors = module("editors.editor")
    # A method in 2023, later a function that is imported into the editor's module.
    owner = editors if hasattr(editors, "_prepare_requests") else easyeditor.BaseEditor
    original = owner._prepare_requests
    signature = inspect.signature(original)

    @functools.wraps(original)
    def prepare_requests(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        subjects = given.get("kwargs", {}).get("subject")
        if subjects is not None:
            _require_subjects(subjects, given["prompts"])
        return original(*args, **kwargs)

    owner._prepare_requests = prepare_requests
    return True


def _require_subjects(subjects: str | Sequence[str], prompts: str | Sequence[str]) -> None:
    subjects, prompts = ([value] if isinstance(value, str) else value for value in (subjects, prompts))
    if len(subjects) != len(prompts):
        raise ValueError(f"subject: {len(subjects)} for {len(prompts)} prompts; each record needs one")
    bad = [i for i, pair in enumerate(zip(subjects, prompts)) if not subject_in_prompt(*pair)]
    if bad:
        shown = "; ".join(f"record {i}: subject {subjects[i]!r}, prompt {prompts[i]!r}" for i in bad[:SHOWN])
        raise ValueError(
            f"subject: EasyEdit wants it to stand in the prompt, in {len(bad)} of {len(prompts)} records it does not: "
            f"{', '.join(map(str, bad))} ({shown}{'; ...' if len(bad) > SHOWN else ''}); "
            f"correct them, or leave them out: `kne easyedit-run --skip-bad` does, where a KnowEditDataset reads them"
        )


def subject_in_prompt(subject: str, prompt: str) -> bool:
    """What EasyEdit asserts of every record."""
    return isinstance(subject, str) and isinstance(prompt, str) and subject in prompt


@contextlib.contextmanager
def skip_bad_records(easyeditor: ModuleType) -> Iterator[None]:
    """Inside, a ``KnowEditDataset`` leaves out (and prints) the records whose subject does not stand in their prompt.

    Raises ValueError if this EasyEdit has no such class.
    """
    kind = getattr(easyeditor, "KnowEditDataset", None)
    if kind is None:
        raise ValueError("--skip-bad: this EasyEdit has no KnowEditDataset (it came in 2024); correct the data instead")
    original = kind.__init__

    @functools.wraps(original)
    def init(self, data_dir, *args, **kwargs):
        original(self, data_dir, *args, **kwargs)
        bad = [i for i, record in enumerate(self._data) if not subject_in_prompt(record["subject"], record["prompt"])]
        self._data = [record for i, record in enumerate(self._data) if i not in set(bad)]
        if bad:
            print(
                f"{data_dir}: {len(bad)} records left out, their subject is not in their prompt: "
                f"{', '.join(map(str, bad))}",
                flush=True,
            )

    kind.__init__ = init
    try:
        yield
    finally:
        kind.__init__ = original


@runtime_patch(
    "pre-edit-file",
    "a file of figures before the edit is known by the model's name and the kind of data only, and trusted if its "
    "length fits",
)
def _pre_edit_file(easyeditor: ModuleType) -> bool:
    editor = easyeditor.BaseEditor
    if "pre_file" not in inspect.getsource(
        module("editors.editor")
    ):  # the release of 2023 never reads or writes such a file
        return False
    editors: Any = module("editors.editor")
    editors.json = SimpleNamespace(**{**vars(json), "dump": _dump})  # in this module it writes such files only
    original = editor.edit
    signature = inspect.signature(original)

    @functools.wraps(original)
    def edit(self, *args, **kwargs):
        pre_file = kwargs.get("pre_file")
        if pre_file is None:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        known = _evaluation_digest(self, {**bound, **bound.get("kwargs", {})})
        if kwargs.get("pre_edit") is not None:
            if not _is_known(Path(pre_file), known):
                raise ValueError(
                    f"{pre_file}: these figures before the edit are of other records, of another model or kind of "
                    f"evaluation, or of a run without this check (see {_sidecar(Path(pre_file)).name}); delete the "
                    f"file or move it away, then it is made anew"
                )
            return original(self, *args, **kwargs)
        token = _writing.set((Path(pre_file), known))
        try:
            return original(self, *args, **{**kwargs, "pre_file": os.devnull})  # the file itself is written by `_dump`
        finally:
            _writing.reset(token)

    editor.edit = edit
    return True


_writing: contextvars.ContextVar[tuple[Path, str] | None] = contextvars.ContextVar(
    "the file of figures before the edit that an editor is about to write, and what they are of", default=None
)


def _dump(value: Any, file: Any, **settings: Any) -> None:
    """``json.dump`` as EasyEdit's editor calls it, once all figures before the edit are there, and before any edit.

    Two runs may write one file at the same time. So it is written whole, and its sidecar names its content: with the
    content of another run a sidecar vouches for nothing.
    """
    writing = _writing.get()
    if writing is None or file.name != os.devnull:
        json.dump(value, file, **settings)
        return
    path, known = writing
    content = json.dumps(value, **settings)
    sidecar = _sidecar(path)
    sidecar.unlink(missing_ok=True)  # of earlier versions, that of an old file would vouch for the new one
    atomic_write(path, content)
    atomic_write(sidecar, json.dumps({"digest": known, "sha256": sha256(content.encode()).hexdigest()}))


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.kne.json")


def _is_known(path: Path, known: str) -> bool:
    """Whether a file has the figures of ``known``, by its sidecar. One of an earlier version names no content."""
    try:
        found = json.loads(_sidecar(path).read_text(encoding="utf-8"))
        return found["digest"] == known and found.get("sha256") in (None, sha256(path.read_bytes()).hexdigest())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # missing, torn, or something else
        return False


_EVALUATED = (
    "prompts",
    "target_new",
    "ground_truth",
    "subject",
    "rephrase_prompts",
    "locality_inputs",
    "portability_inputs",
    "eval_metric",
)
"""Arguments of ``edit`` on which figures before the edit depend; ``test_generation`` does by the fluency variant."""


def _evaluation_digest(editor: Any, arguments: dict[str, Any]) -> str:
    settings = {name: getattr(editor.hparams, name, None) or None for name in ("evaluation_type", "use_chat_template")}
    parts = [
        {name: arguments.get(name) for name in _EVALUATED},
        settings,
        editor.alg_name if traits_of(editor.alg_name).own_evaluation else None,
        model_digest(editor.model) if isinstance(editor.model, nn.Module) else str(editor.model_name),
        fluency_variant() if arguments.get("test_generation") else None,
    ]
    return digest(parts)
