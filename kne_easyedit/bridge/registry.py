"""Registers KNE in EasyEdit, and gives EasyEdit models that are already loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import re
import tempfile
import typing
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import nn

from kne_easyedit._util.messages import shorten
from kne_easyedit._util.settings import is_number_or_its_text, names_a_path, replace_settings
from kne_easyedit.bridge.importing import is_legacy, load, module
from kne_easyedit.bridge.loaded_model import LoadedModel, prepare_tokenizer
from kne_easyedit.bridge.methods import LABELS, NAME, UNRELATED, traits_of
from kne_easyedit.bridge.unrelated import with_unrelated
from kne_easyedit.editing.edit import apply_kne_to_model
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.models.loading import load_model
from kne_easyedit.models.offload import is_offloaded


def register() -> ModuleType:
    """Imports EasyEdit and makes ``alg_name: KNE`` work in it. Idempotent.

    Returns:
        The package ``easyeditor``.

    Raises:
        EasyEditNotFound: There is no EasyEdit.
        ValueError: Something else is registered as KNE.
    """
    easyeditor: Any = load()
    methods = module("util.alg_dict").ALG_DICT
    known = methods.get(NAME)
    if known is not None and getattr(known, "func", known) is not apply_kne_to_model:
        raise ValueError(f"EasyEdit: ALG_DICT[{NAME!r}] is {known!r} already; remove it, or do not register this one")
    if known is None:
        methods[NAME] = functools.partial(apply_kne_to_model, legacy_contract=is_legacy(), restored_by_caller=True)
    _load_as_kne_does(easyeditor.BaseEditor)
    easyeditor.KNEHyperParams = KNEHyperParams
    easyeditor.apply_kne_to_model = apply_kne_to_model
    batch_editor = module("editors.batch_editor").BatchEditor
    if not batch_editor.is_batchable_method(NAME):
        original = batch_editor.is_batchable_method
        batch_editor.is_batchable_method = staticmethod(lambda alg_name: alg_name == NAME or original(alg_name))
    return easyeditor


def _load_as_kne_does(editor: Any) -> None:
    """Makes an editor load the model of KNE's settings by `load_model`, whatever the model's name.

    EasyEdit's loaders read neither ``load_in`` nor ``max_memory`` nor ``offload_folder``.
    """
    original = editor.__init__
    if hasattr(original, "loads_as_kne_does"):
        return

    @functools.wraps(original)
    def init(self: Any, hparams: Any) -> None:
        name = hparams.model_name if isinstance(hparams, KNEHyperParams) else None
        if type(name) is not str:
            original(self, hparams)
            return
        model, tokenizer = load_model(hparams)
        prepare_tokenizer(tokenizer, hparams.alg_name)
        # In the object itself, not in a copy: an editor reads later what its user sets there.
        hparams.model_name = LoadedModel(name, model, tokenizer)
        try:
            with _left_where_it_is(model):
                original(self, hparams)
        finally:
            hparams.model_name = name
        self.model_name = name

    vars(init)["loads_as_kne_does"] = True
    editor.__init__ = init


@contextlib.contextmanager
def edits_handed_to(on_trained: Callable[[KNEEdit], None]) -> Iterator[None]:
    """Inside, every edit that EasyEdit makes with KNE is handed out once it is written.

    Args:
        on_trained: Takes the edit. An edit that was not written (`EditFailed`, `EditLost`, Ctrl-C) is not handed out.
            What it raises ends the edit; an editor whose interrupted edits are undone takes it back.
    """
    register()
    methods = module("util.alg_dict").ALG_DICT
    before = methods[NAME]

    def apply(*args: Any, **kwargs: Any) -> Any:
        others = kwargs.pop("on_trained", None)
        trained: list[KNEEdit] = []

        def keep(edit: KNEEdit) -> None:
            trained.append(edit)
            if others is not None:
                others(edit)

        result = before(*args, on_trained=keep, **kwargs)
        for edit in trained:
            on_trained(edit)
        return result

    vars(apply)["func"] = apply_kne_to_model  # so `register` knows it
    methods[NAME] = apply
    try:
        yield
    finally:
        methods[NAME] = before


def editor_for(hparams: Any, model: nn.Module, tokenizer: Tokenizer) -> Any:
    """EasyEdit's ``BaseEditor`` for a model that is already loaded.

    Args:
        hparams: Settings of any method; their ``model_name`` is the name under which EasyEdit knows the model.
        model: EasyEdit moves it to ``hparams.device``, unless it is offloaded.
        tokenizer: The editor has a copy (``editor.tok``), with the padding side (and a missing pad token) that EasyEdit
            sets when it loads a model itself: methods pad differently, and may share one tokenizer.

    Returns:
        The editor.
    """
    easyeditor: Any = register()
    tokenizer = deepcopy(tokenizer)
    prepare_tokenizer(tokenizer, hparams.alg_name)
    carrier = LoadedModel(str(hparams.model_name), model, tokenizer)
    with _left_where_it_is(model) if is_offloaded(model) else contextlib.nullcontext():
        editor = easyeditor.BaseEditor.from_hparams(replace_settings(hparams, model_name=carrier))
    if traits_of(hparams.alg_name).request_field == UNRELATED:
        editor.apply_algo = _given_unrelated(editor.apply_algo, hparams.alg_name)
    return editor


def _given_unrelated(apply: Callable, alg_name: str) -> Callable:
    """A method whose requests get an unrelated text each, where they have none."""

    @functools.wraps(apply)
    def given(model: Any, tok: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        return apply(model, tok, [with_unrelated(alg_name, request) for request in requests], *args, **kwargs)

    return given


@contextlib.contextmanager
def _left_where_it_is(model: Any) -> Iterator[None]:
    """Inside, nothing moves the model."""
    own = model.__dict__.get("to")
    model.to = lambda *_, **__: model
    try:
        yield
    finally:
        if own is None:
            del model.to
        else:
            model.to = own


def load_method(method: str, path: str | Path) -> Any:
    """Reads the hyperparameters of a method from a YAML file.

    Settings that this version's class does not know are dropped with a warning: versions differ, files are shared.

    Args:
        method: A name of EasyEdit's, ``KNE``, or the label of a variant (``FT-M``, ``FT-L``, ``AdaLoRA``).
        path: The file.

    Returns:
        An object of EasyEdit's (or KNE's) own class.

    Raises:
        ValueError: The method is unknown, the file is of another method, or this version does not have the method.
        FileNotFoundError: The file does not exist.
    """
    kind = require_method(method)
    if kind is KNEHyperParams:
        return KNEHyperParams.from_hparams(path)
    wanted = traits_of(method)
    config = _read(Path(path))
    if not isinstance(config, dict) or config.get("alg_name") != wanted.alg_name:
        found = config.get("alg_name") if isinstance(config, dict) else None
        raise ValueError(f"{path}: alg_name is {found!r}, expected {wanted.alg_name!r}")
    fields = {f.name for f in dataclasses.fields(kind)}
    for name, value in wanted.settings.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {config[name]!r}, but {method} is {name}: {value}")
        if name not in fields and wanted.settings_of_2023[name] != value:
            raise ValueError(
                f"methods: this EasyEdit's {wanted.alg_name} knows {wanted.settings_of_2023[name]} only, "
                f"not {method} ({name}: {value})"
            )
        config[name] = value
    _require_kinds(kind, config, path)
    return _built(kind, config, path)


def _read(path: Path) -> Any:
    """The content of a YAML file. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"hparams file {path} does not exist")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error


def _require_kinds(kind: Any, config: dict[str, Any], path: str | Path) -> None:
    """Raises ValueError, naming file and setting, for a value that cannot be what the setting is: EasyEdit checks none.

    Its annotations are not kept by its own files (a number for a text, a text for ``device``), so only what no reading
    of them allows is refused.
    """
    hints = typing.get_type_hints(kind)
    for name, value in config.items():
        hint = hints.get(name)
        if hint is None or value is None:
            continue
        expected = None
        if hint is list or typing.get_origin(hint) is list:
            expected = None if isinstance(value, list) else "a list"
        elif isinstance(value, (list, dict)):
            expected = "a single value" if hint in (int, float, str, bool) else None
        elif hint in (int, float) and name != "device":
            expected = None if is_number_or_its_text(value) or isinstance(value, bool) else "a number"
        elif not isinstance(value, str):
            expected = "a path" if names_a_path(name) else "a template" if name.endswith("_tmp") else None
        if name.endswith("dtype") and not isinstance(getattr(torch, str(value), None), torch.dtype):
            expected = "a type of torch, such as float32"
        if expected:
            raise ValueError(f"{path}: {name}: {shorten(value)} is not {expected}")


def _built(kind: Any, config: dict[str, Any], path: str | Path) -> Any:
    """The object as the class's own ``from_hparams`` builds it: WISE, MELO and EAMET derive settings from others."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.yaml"
        file.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        try:
            return kind.from_hparams(str(file))
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            said = str(error).replace(str(file), str(path)).replace(f"{kind.__name__}.__init__()", kind.__name__)
            raise ValueError(f"{path}: {kind.__name__} cannot be made of it: {type(error).__name__}: {said}") from error


def require_method(method: str) -> type:
    """The hyperparameter class of a method.

    Args:
        method: A label of `METHODS`, or EasyEdit's name.

    Returns:
        EasyEdit's class, or `KNEHyperParams`.

    Raises:
        ValueError: EasyEdit has no such method. The message gives the nearest names.
    """
    easyeditor = register()
    known = module("util.alg_dict").ALG_DICT
    name = traits_of(method).alg_name
    kind = _class_of(easyeditor, name)
    if name not in known or kind is None:
        names = {n.upper(): n for n in [*known, *LABELS]}
        near = [names[n] for n in difflib.get_close_matches(method.upper(), names, n=2, cutoff=0.4)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
        raise ValueError(f"methods: {method!r} is unknown to this EasyEdit; {hint}")
    return kind


def _class_of(easyeditor: ModuleType, name: str) -> type | None:
    """By letters: EasyEdit has ``ROMEHyperParams``, ``R_ROMEHyperParams``, ``SERACHparams``, ``GraceHyperParams``."""
    plain = {
        re.sub(r"[^a-z]", "", key.lower()): value for key, value in vars(easyeditor).items() if isinstance(value, type)
    }
    letters = re.sub(r"[^a-z]", "", name.lower())
    return plain.get(f"{letters}hyperparams") or plain.get(f"{letters}hparams")
