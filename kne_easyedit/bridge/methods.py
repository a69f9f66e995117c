"""One table of the methods of EasyEdit and of KNE: what each needs, and how it differs from the others.

A new method is one line in `METHODS`. A method that the table does not contain has the defaults of `Method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kne_easyedit._util.settings import Hyperparameters
from kne_easyedit.bridge import memory_formulas as formulas
from kne_easyedit.bridge.importing import is_placeholder, module

SCRIPTS = "run it by EasyEdit's own scripts (kne easyedit-run)"
NAME = "KNE"
"""The name of this package's method in EasyEdit."""
UNRELATED = "loc_prompt"
"""EasyEdit's name of a text that has nothing to do with a fact."""


@dataclass(frozen=True)
class Method:
    """The traits of one method, or of a variant of it that has a label of its own (FT-M, AdaLoRA)."""

    label: str
    """The name in the literature and in this package's commands."""
    alg_name: str = ""
    """EasyEdit's name, by which its hyperparameter objects are known; the label if it is empty."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of EasyEdit's that make the method what the label says."""
    settings_of_2023: Mapping[str, Any] = field(default_factory=dict)
    """What the EasyEdit of 2023 does: its classes do not have these settings."""

    # Inputs
    padding_side: str = "left"
    """The tokenizer's padding side, as EasyEdit sets it for the method."""
    needs_subject: bool = False
    """Looks for the subject's tokens in the prompt: cannot edit a record without a subject."""
    request_field: str | None = None
    """A field of the request that the method needs beside prompt, target_new and subject."""
    needs_ground_truth: bool = False
    """Attributes the old answer: a record without one gets the answer of the unedited model."""

    # Batches and sequences
    one_fact: bool = False
    """Edits the first of several requests and silently drops the others."""
    accumulates: bool = False
    """Adds every edit to what it stores of earlier ones, unless ``reset_cache`` is true."""
    restarts_in_2023: bool = False
    """In the EasyEdit of 2023 every edit begins anew and loses those before."""

    # Undoing
    irreversible: str | None = None
    """Why an edit cannot be undone; None if it can."""
    in_context: bool = False
    """Edits prompts, not weights."""
    originals_if_asked: bool = False
    """Returns the original weights only if ``keep_original_weight`` is true, in every version."""
    replaces_layer: bool = False
    """Puts a layer of its own in the place of one; what it returns for undoing would leave a copy there."""

    # What it needs to run
    packages: tuple[tuple[str, str], ...] = ()
    """(module of EasyEdit, name that it imports from an optional package)."""
    model_names: tuple[str, ...] = ()
    """Words of a model's name by which the method knows the shapes of the weights; NameError for other names."""
    trained_editor: bool = False
    """Needs the file of a trained editor (``archive``)."""
    own_type: bool = False
    """EasyEdit chooses the type of the weights: quantised, or that of a trained hypernetwork."""

    # What it computes
    one_text: bool = False
    """Chooses by a whole pass, or by places in a text: several texts in one pass are not answered as each alone."""
    own_evaluation: bool = False
    """EasyEdit evaluates it in a way of its own: figures before the edit cannot be shared with other methods."""
    moments_setting: str | None = None
    """The setting that switches second moments on; None: they are always used, if the class has ``mom2_dataset``."""
    memory: formulas.MemoryFormula | None = None
    """Memory beside weights and activations; None: unknown (KNE's has phases: `kne_memory`)."""
    texts_at_once: int | None = None
    """Texts in one pass of an edit; None: by the settings."""
    edits: str = "modules"
    """What the settings name: ``modules``, ``parameters`` (part of a name), or ``adapter`` (``target_modules``)."""
    only_modules: tuple[str, ...] | None = None
    """Settings of module names that the method reads; None: all."""
    unused_modules: tuple[str, ...] = ()
    """Settings of module names that EasyEdit's files have, and the method does not read."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "alg_name", self.alg_name or self.label)

    def reads_module(self, setting: str) -> bool:
        """Whether the method looks for a module by this setting: EasyEdit's files name more than each method needs."""
        if self.only_modules is not None:
            return setting in self.only_modules
        named = setting.endswith("_module_tmp") or setting in ("ln_f_module", "lm_head_module")
        return named and setting not in self.unused_modules


def _causal(label: str, **traits: Any) -> Method:
    """ROME and the methods that build on it: right padding, the subject's tokens, no attention modules."""
    return Method(label, padding_side="right", needs_subject=True, unused_modules=("attn_module_tmp",), **traits)


def _ft(label: str, **settings: str) -> Method:
    return Method(
        label,
        "FT",
        settings,
        settings_of_2023={"objective_optimization": "prompt_last"},
        memory=formulas.ft,
        edits="parameters",
        only_modules=("rewrite_module_tmp",),
    )


def _lora(label: str, lora_type: str) -> Method:
    return Method(
        label,
        "LoRA",
        {"lora_type": lora_type},
        settings_of_2023={"lora_type": "adalora"},
        restarts_in_2023=True,
        memory=formulas.lora,
        edits="adapter",
    )


_PROMPTS = "edits prompts, not weights"
_API = "edits a model behind an API, not this one"
METHODS: Mapping[str, Method] = {
    method.label: method
    for method in (
        Method(NAME),
        _ft("FT"),
        _ft("FT-M", objective_optimization="target_new"),
        _ft("FT-L", objective_optimization="prompt_last"),
        _lora("LoRA", "lora"),
        _lora("AdaLoRA", "adalora"),
        Method("KN", one_fact=True, needs_ground_truth=True, memory=formulas.nothing),
        _causal("ROME", moments_setting="mom2_adjustment", memory=formulas.rome),
        _causal("MEMIT", memory=formulas.memit, texts_at_once=7),
        _causal("AlphaEdit", accumulates=True, memory=formulas.alphaedit, texts_at_once=7),
        _causal("CORE"),
        Method(
            "DEFER",
            irreversible="gives a model that cannot answer several prompts at once, as the evaluation asks them",
        ),
        Method(
            "DINM",
            irreversible="edits by safety records, which have a general knowledge constraint",
            originals_if_asked=True,
        ),
        Method("DPO", request_field="target_neg"),
        Method("DeepEdit-Api", needs_subject=True, irreversible=_API),
        _causal("EAMET"),
        _causal("EMMET", originals_if_asked=True, memory=formulas.memit, texts_at_once=7),
        Method("FT-Api", irreversible=_API),
        Method("GRACE", one_fact=True, replaces_layer=True, one_text=True, memory=formulas.grace),
        Method("ICE", in_context=True, irreversible=_PROMPTS),
        Method(
            "IKE",
            in_context=True,
            irreversible=_PROMPTS,
            packages=(("models.ike.ike_main", "SentenceTransformer"),),
            own_evaluation=True,
        ),
        Method(
            "MELO",
            irreversible="puts the model into a wrapper of its own and gives nothing by which that could be undone",
        ),
        Method("MEMIT-FE", needs_subject=True),
        Method("MEND", trained_editor=True, own_type=True),
        Method("PMET", needs_subject=True),
        Method("QLoRA", own_type=True),
        _causal("R-ROME", moments_setting="mom2_adjustment", memory=formulas.rome),
        Method(
            "SERAC",
            irreversible="keeps edits in a memory beside the model and gives nothing by which they could be taken out",
        ),
        _causal("SPHERE", accumulates=True, model_names=("llama", "gpt2-xl")),
        Method(
            "SimIE",
            irreversible="starts every edit from the first weights that it has seen, so that undoing one does not end "
            "its effect",
        ),
        Method(
            "ULTRAEDIT",
            irreversible="gives no original weights (it looks for its modules' names among those of parameters)",
        ),
        Method(
            "WISE",
            request_field=UNRELATED,
            replaces_layer=True,
            one_text=True,
            memory=formulas.wise,
            texts_at_once=12,
        ),
    )
}
"""Label -> traits. The order is that of tables and figures: KNE and the methods of the paper first."""
LABELS: Mapping[str, Method] = {label: method for label, method in METHODS.items() if method.settings}
"""Labels of variants: an EasyEdit method under certain settings."""


def traits_of(name: str) -> Method:
    """The traits of a method.

    Args:
        name: A label, or EasyEdit's ``alg_name``.

    Returns:
        The table's line, or one with all defaults.
    """
    return METHODS.get(name) or Method(name)


# Checks before an edit


def require_undoable(hparams: Hyperparameters) -> None:
    """Checks that a method can run here, and that its edits can be undone.

    Args:
        hparams: Settings of any method.

    Raises:
        ValueError: It cannot; the message says why, and what to do.
    """
    name = hparams.alg_name
    if why := traits_of(name).irreversible:
        raise ValueError(f"methods: {name} {why}; {SCRIPTS}")
    require_runnable(hparams)


def require_runnable(hparams: Hyperparameters) -> None:
    """Raises ValueError, naming what is missing, if a method cannot run: a package, a file, a kind of model."""
    name = hparams.alg_name
    method = traits_of(name)
    for where, imported in method.packages:
        value: Any = getattr(module(where), imported, None)
        if is_placeholder(value):
            raise ValueError(
                f"methods: {name} needs {value.__name__}, which is not available: {value._why}; install its package"
            )
    words = method.model_names
    if words and not any(word in str(hparams.model_name).lower() for word in words):
        raise ValueError(
            f"methods: {name} knows the shape of the weights by words in model_name only ({', '.join(words)}), "
            f"and there is none in {str(hparams.model_name)!r}; "
            f"give the model's folder such a name if its weights are of that shape"
        )
    archive = getattr(hparams, "archive", None)
    if method.trained_editor and not (archive and Path(archive).is_file()):
        raise ValueError(
            f"methods: {name} needs the file of its trained editor, archive: {archive!r} does not exist; train it by "
            f"EasyEdit"
        )


def require_request(alg_name: str, request: Mapping[str, Any]) -> None:
    """Checks that a request has the fields that a method needs.

    Args:
        alg_name: EasyEdit's name of the method.
        request: One fact.

    Raises:
        ValueError: A field is missing or empty.
    """
    needed = traits_of(alg_name).request_field
    if needed and not request.get(needed):
        raise ValueError(
            f"methods: {alg_name} wants a {needed} in every request, and that of {request['prompt']!r} has none"
        )
