"""The settings of KNE: one dataclass in the style of EasyEdit, validated when it is built."""

from __future__ import annotations

import difflib
import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from kne_easyedit._util.messages import require_one_of, shorten
from kne_easyedit._util.settings import EVALUATION_TYPES, EVALUATORS, SECRET, replace_settings
from kne_easyedit.attribution.engine import ENGINES
from kne_easyedit.attribution.quadrature import QUADRATURES
from kne_easyedit.editing.neighbours import neighbours_wanted, uses_neighbours
from kne_easyedit.editing.optimizers import OPTIMIZERS
from kne_easyedit.localization.selection import Selection
from kne_easyedit.models.placement import require_placement
from kne_easyedit.models.targets import check_template

INITIALISATIONS = ("zeros", "kaiming")
ON_FAILURE = ("warn", "raise")
SEVERAL_DEVICES = (
    "names several GPUs, expected one number; to spread a model over them set CUDA_VISIBLE_DEVICES=0,1 (their numbers) "
    "in the environment, device: 0 and model_parallel: true"
)


@dataclass
class KNEHyperParams:
    """Hyperparameters of KNE. Equation numbers are those of arXiv 2412.20637.

    The first sentence of each field's docstring is its comment in hparams/KNE/*.yaml (scripts/comment_settings.py).
    What depends on the model or the machine (layers, templates, devices, files) is checked by `apply_kne_to_model`
    before the model changes. EasyEdit's settings `EVALUATORS` are attributes, not fields.

    Raises:
        ValueError: A value has a wrong type or is out of range on any machine; the message names the field, its range,
            the value, and the nearest valid name.
    """

    model_name: str
    """Path or hub name of the model. EasyEdit chooses the loader by its substrings ("llama", "gpt", "qwen2", ...)."""
    target_modules: list[str]
    """Templates of the linear layers whose rows are edited; ``{}`` is the layer's number."""
    alg_name: str = "KNE"
    """EasyEdit's name of the method."""

    # Localisation: Eq. 3-7
    layers: list[int] = field(default_factory=list)
    """Decoder layers that may be edited; empty: all."""
    p: float = 0.04
    """Fraction of the neurons kept (Eq. 6), in (0, 1]. It counts for each module type, over all layers."""
    attribution_steps: int = 20
    """Steps ``m`` of the sum (Eq. 5)."""
    aggregation: str = "max"
    """How the scores of several facts become one (section 4.4): ``max`` or ``mean``."""
    score_scale: str = "none"
    """Beyond the paper: ``layer`` divides scores by their layer's largest before the threshold; ``none``: the paper.
    It spreads the ensemble over the layers. ``shuffled`` then exchanges the neurons of each layer at random, and
    ``shuffled-none`` does so with unscaled scores (with ``-1`` to ``-4``: other draws): controls that ask what
    localisation is worth."""
    localization_data: str | None = None
    """Data file to localise on (docs/data.md has the formats), or ``embedded``: the packaged facts; None:
    every edit's own requests."""
    localization_size: int = 200
    """Number of facts taken from ``localization_data``."""
    localization_offset: int = 0
    """Number of the first of these facts in the file."""
    ensemble: str | None = None
    """Ensemble file (JSON) to edit instead of localising. Written by ``NeuronEnsemble.save`` and ``kne localize``; or
    ``magnitude``: the rows of largest norm (`named.MAGNITUDE`), a control."""
    cache_dir: str | None = None
    """Folder of the score cache; None: the user's cache folder (docs/localization.md, "The cache")."""
    chunk_rows: int | None = None
    """Path points in flight at most: memory against speed, the result by rounding alone; None: by the free memory."""
    quadrature: str = "riemann"
    """The sum of Eq. 5: ``riemann`` (the paper's) or ``gauss-legendre`` (the same error with fewer steps)."""
    attribution_engine: str = "auto"
    """``sweep``; ``whole`` (slow) for models whose layers cannot be replayed; ``auto``: ``sweep`` if it can be."""

    # Training: Eq. 8-11
    optimizer: str = "adamw"
    """``adamw``: the paper's; beyond it ``polyak``: normalised for each module, without a learning rate (`Polyak`)."""
    lr: float = 5e-3
    """Learning rate of AdamW; ``polyak`` has none."""
    polyak_fraction: float = 0.3
    """Step of ``polyak``: share of the loss that it would take away if the loss were linear, in (0, 2)."""
    num_steps: int = 100
    """Optimiser steps at most."""
    stop_loss: float = 0.4
    """Training stops as soon as the batch loss is below; 0: never early."""
    on_failure: str = "warn"
    """A fact that was not reached: ``warn`` (in the log) or ``raise`` (nothing is written). See `RowEdit.failed`."""
    alpha: float = 1.0
    """Scaling ``alpha / sqrt(n)`` of a layer's ``n`` trained rows (Eq. 11)."""
    weight_decay: float = 0.0
    """Weight decay of AdamW; ``polyak`` has none."""
    initialization: str = "zeros"
    """Start of the trained rows: ``zeros`` (the edit starts as the identity) or ``kaiming`` (the research fork)."""
    append_eos: bool = False
    """Beyond the paper: the tokenizer's end token is trained as the answer's last token. Localisation and evaluation do
    without it."""
    append_break: bool = False
    """Beyond the paper: the unedited model's own word break is trained after the answer, so that no word goes on."""
    until_given: bool = False
    """Beyond the paper: training also goes on until each token of the answers is the most probable one."""
    edit_gain: float = 1.0
    """Beyond the paper: trained rows are multiplied by it, or by less if an answer's loss would leave ``stop_loss``."""
    subject_variants: int = 0
    """Beyond the paper: so many variants of the subject's name (shortened, with initials) are trained to the answer."""
    kl_weight: float = 0.0
    """Beyond the paper: weight of ``KL(before || now)`` after unrelated prompts, added to the loss; 0: none."""
    kl_data: str | None = None
    """Data file of these prompts, or ``embedded``: the packaged facts."""
    kl_size: int = 8
    """Number of these prompts."""
    neighbour_weight: float = 0.0
    """Beyond the paper: weight of ``KL(before || now)`` after neighbours (docs/edit.md), added to the loss; 0: none."""
    neighbour_data: str | None = None
    """Data file of facts to make neighbours of, or ``embedded``: the packaged relations; None: the facts localised on,
    if ``localization_data`` is a file, else ``embedded``."""
    neighbour_relation_size: int = 6
    """Neighbours of each fact that ask the same of another subject."""
    neighbour_subject_size: int = 6
    """Neighbours of each fact that ask something else of the same subject."""
    neighbour_tokens: int = 4
    """Tokens of the unedited model's own continuation of a neighbour, at which the divergence is taken."""
    neighbours_per_step: int = 0
    """Neighbours of each fact in one training step, in turn; 0: all."""
    neighbour_stop: float | None = None
    """Training goes on while the divergence of a step's neighbours is not below; None: the answers alone decide."""
    input_projection: bool = False
    """Beyond the paper: rows move only in directions that the inputs of neighbours do not have (docs/edit.md)."""
    projection_ridge: float = 1e-5
    """Ridge of this projection: small ones leave neighbours as they are, in (0, 1]."""
    spare_edited: bool = False
    """Beyond the paper: facts that the model was edited with before, and still has, are spared as neighbours are.
    Known are edits that were made under this setting, and those that were applied as `KNEEdit`."""
    spare_continuation: int = 0
    """Beyond the paper: with ``input_projection``, so many tokens that the unedited model may say after the new answer
    are spared as neighbours are; 0: none."""
    continuation_weight: float = 0.0
    """Beyond the paper: weight of KL(before || now) at the first tokens of these, added to the loss; 0: none."""
    seed: int = 42
    """Seed of the ``kaiming`` start and of the choice of neighbours; nothing else is random."""

    # EasyEdit's own
    device: int | str = 0
    """A GPU's number, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``."""
    model_parallel: bool = False
    """The model is spread over all visible GPUs, and what does not fit over memory and disk (docs/large-models.md)."""
    max_memory: dict | None = None
    """With model_parallel: what each device may take, ``{0: 20GiB, cpu: 60GiB}``; null: what is free."""
    offload_folder: str | None = None
    """With model_parallel: where weights go that fit nowhere else; null: safetensors are read where they are."""
    load_in: str | None = None
    """``8bit`` or ``4bit``: the base is loaded quantised, and edits are kept beside it (docs/serving.md); null: not."""
    max_length: int = 512
    """Tokens at which EasyEdit's evaluators cut prompt and answer; KNE itself cuts nothing."""
    batch_size: int = 1
    """Facts per edit in EasyEdit's ``batch_edit``; ``edit`` needs 1."""
    use_chat_template: bool = False
    """Prompts are put into the tokenizer's chat template, when localising and when editing. EasyEdit's evaluators since
    2025 read the same setting (but leave locality prompts as they are)."""
    separator: str = " "
    """White space between prompt and answer; empty for scripts without blanks (Chinese, Japanese, Thai). It counts when
    localising, training and evaluating. Other methods of EasyEdit always put a blank there."""
    fp16: bool = False
    """The model is loaded in float16."""
    bf16: bool = False
    """The model is loaded in bfloat16."""

    def __post_init__(self) -> None:
        self.validate()

    @property
    def selection(self) -> Selection:
        """The rules by which scores become an ensemble (Eq. 6-7).

        Raises:
            ValueError: ``p``, ``aggregation``, ``score_scale`` or ``layers`` is out of range.
        """
        rules = Selection(self.p, self.aggregation, self.score_scale, tuple(self.layers))
        return replace(rules, layers=tuple(sorted(set(rules.layers))))

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> KNEHyperParams:
        """Reads a YAML file, as EasyEdit's own classes do.

        Args:
            hparams_name_or_path: The file; ``.yaml`` may be left out.

        Returns:
            The settings.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: It is not a YAML file of settings, or as `from_dict`. The message names the file.
        """
        path = Path(hparams_name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = path.with_name(path.name + ".yaml")
        if not path.is_file():
            raise FileNotFoundError(f"hparams file {path} does not exist; shipped ones are under hparams/KNE/")
        with path.open(encoding="utf-8") as stream:
            try:
                config = yaml.safe_load(stream)
            except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or a number of thousands of digits
                raise ValueError(f"{path}: not a YAML file: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{path}: holds no settings (expected a mapping of names to values)")
        try:
            return cls.from_dict(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, config: dict) -> KNEHyperParams:
        """The settings from a mapping of names to values.

        Args:
            config: Fields by name, and maybe settings of `EVALUATORS`.

        Returns:
            The settings.

        Raises:
            ValueError: A name is unknown (the message names the nearest valid one) or missing, or as the constructor.
        """
        known = {f.name: f for f in fields(cls)}
        for key in config:
            if key not in known and key not in EVALUATORS:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise ValueError(f"unknown setting {key!r}; {hint}")
        required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in required if name not in config]
        if missing:
            raise ValueError(f"missing setting {missing[0]!r}: it has no default")
        own = {name: config[name] for name in EVALUATORS if name in config}
        return replace_settings(cls(**{name: value for name, value in config.items() if name not in own}), **own)

    def to_dict(self) -> dict:
        """The settings as `from_dict` reads them, secrets included; `public_settings` leaves these out."""
        return {**asdict(self), **{name: getattr(self, name) for name in EVALUATORS if hasattr(self, name)}}

    def validate(self) -> None:
        """Checks all values, and converts numbers and paths to the fields' types. Called again before every edit.

        Raises:
            ValueError: As the constructor.
        """
        _require(not _is_device_list(self.device), "device", self.device, SEVERAL_DEVICES)
        for name, expected in _types(type(self)).items():
            setattr(self, name, _coerced(name, getattr(self, name), expected))
        for name in EVALUATORS:
            value = getattr(self, name, None)
            shown = f"a {type(value).__name__}" if name in SECRET else repr(value)
            if not isinstance(value, (str, type(None))):
                raise ValueError(f"{name}: {shown} is not a string; quote it in YAML")
        if kind := getattr(self, "evaluation_type", None):
            require_one_of("evaluation_type", kind, EVALUATION_TYPES)
        _require(self.alg_name == "KNE", "alg_name", self.alg_name, "must be 'KNE'")
        _require(bool(self.model_name.strip()), "model_name", self.model_name, "must name a model")
        _require(len(self.target_modules) > 0, "target_modules", self.target_modules, "must hold at least one template")
        for template in self.target_modules:
            check_template(template)
        duplicates = len(set(self.target_modules)) != len(self.target_modules)
        _require(not duplicates, "target_modules", self.target_modules, "holds a template twice")
        _ = self.selection  # raises ValueError for p, aggregation, score_scale and layers
        require_one_of("quadrature", self.quadrature, QUADRATURES)
        require_one_of("attribution_engine", self.attribution_engine, ENGINES)
        require_one_of("initialization", self.initialization, INITIALISATIONS)
        require_one_of("on_failure", self.on_failure, ON_FAILURE)
        _require(1 <= self.edit_gain < math.inf, "edit_gain", self.edit_gain, "must be at least 1 and finite")
        both = self.append_eos and self.append_break
        _require(not both, "append_break", self.append_break, "is another ending than append_eos; choose one of them")
        require_one_of("optimizer", self.optimizer, OPTIMIZERS)
        _require(0 < self.polyak_fraction < 2, "polyak_fraction", self.polyak_fraction, "must be in (0, 2)")
        adamw = self.optimizer == "adamw"
        rule = f"belongs to adamw; leave it 0 with optimizer: {self.optimizer}"
        _require(adamw or not self.weight_decay, "weight_decay", self.weight_decay, rule)
        counts = ("attribution_steps", "localization_size", "num_steps", "kl_size", "neighbour_tokens")
        for name in (*counts, "max_length", "batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(self.localization_offset >= 0, "localization_offset", self.localization_offset, "must be 0 or more")
        _require(self.chunk_rows is None or self.chunk_rows >= 1, "chunk_rows", self.chunk_rows, "must be at least 1")
        sizes = ("neighbour_relation_size", "neighbour_subject_size", "neighbours_per_step")
        for name in (*sizes, "subject_variants", "spare_continuation"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
        stop = self.neighbour_stop
        _require(stop is None or 0 < stop < math.inf, "neighbour_stop", stop, "must be positive and finite, or null")
        rule = "is read with a neighbour_weight above 0 only; set that, or leave it null"
        _require(stop is None or self.neighbour_weight > 0, "neighbour_stop", stop, rule)
        for name in ("lr", "alpha"):
            value = getattr(self, name)
            _require(0 < value < math.inf, name, value, "must be positive and finite")
        for name in ("stop_loss", "weight_decay", "kl_weight", "neighbour_weight", "continuation_weight"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, value, "must be 0 or more and finite")
        rule = "has no effect with stop_loss: 0, which no loss is below; set stop_loss above 0, or edit_gain: 1"
        _require(self.edit_gain == 1 or self.stop_loss > 0, "edit_gain", self.edit_gain, rule)
        _require(
            not self.kl_weight or self.kl_data is not None,
            "kl_data",
            self.kl_data,
            "must name a file of prompts when kl_weight is not 0",
        )
        _require(
            not uses_neighbours(self) or neighbours_wanted(self) > 0,
            "neighbour_relation_size",
            self.neighbour_relation_size,
            "and neighbour_subject_size must not both be 0 with neighbour_weight or input_projection; set "
            "neighbour_weight: 0 and input_projection: false to train without neighbours",
        )
        _require(0 < self.projection_ridge <= 1, "projection_ridge", self.projection_ridge, "must be in (0, 1]")
        _require(
            not self.input_projection or self.initialization == "zeros",
            "initialization",
            self.initialization,
            "starts away from the model as it was, neighbours included; with input_projection take zeros",
        )
        _require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2**32)")
        require_placement(self)
        rule = "must be white space or empty; visible characters belong into the prompts"
        _require(not self.separator.strip(), "separator", self.separator, rule)
        _require(not (self.fp16 and self.bf16), "fp16", self.fp16, "and bf16 exclude each other")
        _require(
            _is_device(self.device), "device", self.device, "must be a GPU's number, 'cpu', 'cuda', 'cuda:N' or 'mps'"
        )


def _is_device(device: int | str) -> bool:
    kind, colon, index = str(device).partition(":")
    if kind.isdigit():
        return not colon
    return kind in ("cpu", "cuda", "mps") and (not colon or index.isdigit())


def _is_device_list(device: object) -> bool:
    return "," in device if isinstance(device, str) else isinstance(device, (list, tuple)) and len(device) > 1


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{name}: {value!r} {rule}")


def _types(cls: type) -> dict[str, object]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _coerced(name: str, value: object, expected: Any) -> object:
    """``value`` as the type ``expected``: YAML reads ``5e-3`` as a string, and ``1`` is accepted as a float."""
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if type(value) in options:
        return value
    if value is None and type(None) in options:
        return None
    slip = isinstance(value, bool) or (isinstance(value, str) and "_" in value)  # Python would read 1_0 as 10
    if float in options and isinstance(value, (int, str)) and not slip:
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{name}: {shorten(value)} is beyond the range of numbers") from error
        except ValueError:
            pass
    for option in options:
        if typing.get_origin(option) is list and isinstance(value, (list, tuple)):
            (item,) = typing.get_args(option)
            return [_coerced(f"{name}[{i}]", v, item) for i, v in enumerate(value)]
        if option is str and isinstance(value, (str, Path)):
            # A subclass of str stays what it is: the bridge passes loaded models to EasyEdit by one.
            return value if isinstance(value, str) else str(value)
    raise ValueError(
        f"{name}: {shorten(value)} is a {type(value).__name__}, expected {getattr(expected, '__name__', expected)}"
    )
