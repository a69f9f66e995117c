"""Make EasyEdit know KNE, and hand it models that are already loaded."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import tempfile
from pathlib import Path
from types import ModuleType

import yaml
from torch import nn

from kne_easyedit._util.settings import replace_settings
from kne_easyedit.bridge.importing import is_legacy, load, module
from kne_easyedit.bridge.loaded_model import LoadedModel, prepare_tokenizer
from kne_easyedit.bridge.methods import LABELS, NAME, traits_of
from kne_easyedit.editing.edit import apply_kne_to_model
from kne_easyedit.hparams import KNEHyperParams


def register() -> ModuleType:
    """Imports EasyEdit and makes ``alg_name: KNE`` work in it; returns the package. Twice is harmless.

    Raises EasyEditNotFound if there is no EasyEdit, ValueError if something else is registered as KNE.
    """
    easyeditor = load()
    methods = module("util.alg_dict").ALG_DICT
    known = methods.get(NAME)
    if known is not None and getattr(known, "func", known) is not apply_kne_to_model:
        raise ValueError(f"EasyEdit: ALG_DICT[{NAME!r}] is {known!r} already; remove it, or do not register this one")
    if known is None:
        methods[NAME] = (
            functools.partial(apply_kne_to_model, legacy_contract=True) if is_legacy() else apply_kne_to_model
        )
    easyeditor.KNEHyperParams = KNEHyperParams
    easyeditor.apply_kne_to_model = apply_kne_to_model
    batch_editor = module("editors.batch_editor").BatchEditor
    if not batch_editor.is_batchable_method(NAME):
        original = batch_editor.is_batchable_method
        batch_editor.is_batchable_method = staticmethod(lambda alg_name: alg_name == NAME or original(alg_name))
    return easyeditor


def editor_for(hparams, model: nn.Module, tokenizer):
    """EasyEdit's ``BaseEditor`` for a model that is already loaded, under the name in ``hparams.model_name``.

    ``hparams`` may be of any method. Sets the tokenizer's padding side (and a missing pad token) as EasyEdit
    does when it loads a model itself; EasyEdit moves the model to ``hparams.device``.
    """
    easyeditor = register()
    prepare_tokenizer(tokenizer, hparams.alg_name)
    carrier = LoadedModel(str(hparams.model_name), model, tokenizer)
    return easyeditor.BaseEditor.from_hparams(replace_settings(hparams, model_name=carrier))


def load_method(method: str, path: str | Path):
    """The hyperparameters of a method from a YAML file, as an object of EasyEdit's (or KNE's) own class.

    ``method`` is a name of EasyEdit's, ``KNE``, or a label of a variant (``FT-M``, ``FT-L``, ``AdaLoRA``). Settings
    that this version's class does not know are dropped with a warning: versions differ, files are shared.
    Raises ValueError for an unknown method, a file of another method, or one that this version cannot do.
    """
    kind = require_method(method)
    if kind is KNEHyperParams:
        return KNEHyperParams.from_hparams(path)
    wanted = traits_of(method)
    config = _read(Path(path))
    if not isinstance(config, dict) or config.get("alg_name") != wanted.alg_name:
        raise ValueError(
            f"{path}: alg_name is {config.get('alg_name') if isinstance(config, dict) else None!r}, wanted is {wanted.alg_name!r}"
        )
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
    return _built(kind, config, path)


def _read(path: Path):
    """What a YAML file holds. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"hparams file {path} does not exist")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error


def _built(kind: type, config: dict, path: str | Path):
    """The object of EasyEdit's class as its own ``from_hparams`` builds it: some make settings out of others (WISE, MELO, EAMET)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.yaml"
        file.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        try:
            return kind.from_hparams(str(file))
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            said = str(error).replace(str(file), str(path)).replace(f"{kind.__name__}.__init__()", kind.__name__)
            raise ValueError(f"{path}: {kind.__name__} cannot be made of it: {type(error).__name__}: {said}") from error


def require_method(method: str) -> type:
    """The hyperparameter class of a method. Raises ValueError, with the nearest names, if EasyEdit has no such method."""
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
    """EasyEdit spells its classes ``ROMEHyperParams``, ``R_ROMEHyperParams``, ``SERACHparams``, ``GraceHyperParams``."""
    plain = {
        re.sub(r"[^a-z]", "", key.lower()): value for key, value in vars(easyeditor).items() if isinstance(value, type)
    }
    letters = re.sub(r"[^a-z]", "", name.lower())
    return plain.get(f"{letters}hyperparams") or plain.get(f"{letters}hparams")
