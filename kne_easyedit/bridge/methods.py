"""What EasyEdit's methods need, and which of them cannot be undone: said by name before an edit is paid for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kne_easyedit.bridge.importing import is_placeholder, module

IN_CONTEXT = ("IKE", "ICE")
SCRIPTS = "run it by EasyEdit's own scripts (kne easyedit-run)"
NO_WAY_BACK = {
    **dict.fromkeys(IN_CONTEXT, "edits prompts, not weights"),
    **dict.fromkeys(("FT-Api", "DeepEdit-Api"), "edits a model behind an API, not this one"),
    "MELO": "puts the model into a wrapper of its own and gives nothing by which that could be undone",
    "SERAC": "keeps edits in a memory beside the model and gives nothing by which they could be taken out",
    "ULTRAEDIT": "gives no original weights (it looks for its modules' names among those of parameters)",
    "SimIE": "starts every edit from the first weights that it has seen, so that undoing one does not end its effect",
    "DINM": "edits by safety records, which have a general knowledge constraint",
    "DEFER": "gives a model that cannot answer several prompts at once, as the evaluation asks them",
}
"""Methods that `MethodEditor` refuses, and why."""
PACKAGES = {
    "GRACE": (("evaluate.evaluate_utils", "f1_score"),),
    "IKE": (("models.ike.ike_main", "SentenceTransformer"),),
}
"""What a method or its evaluation uses of other packages, by the module of EasyEdit that imports it, where some machines lack it."""
REQUEST = {"DPO": "target_neg", "WISE": "loc_prompt"}
"""What a method wants of every request beside prompt, target_new and subject."""
KNOWN_NAMES = {"AlphaEdit": ("llama", "qwen", "gpt2-xl"), "SPHERE": ("llama", "gpt2-xl")}
"""Words of a model's name by which a method knows the shape of its weights; for others it fails with a NameError."""
ORIGINALS_IF_ASKED = ("EMMET", "DINM")
"""Methods that give the original weights only if ``keep_original_weight`` is true, in every version."""


def require_undoable(hparams) -> None:
    """Raises ValueError, with the reason and a way out, for a method whose edits cannot be undone here, or that cannot run here."""
    alg_name = hparams.alg_name
    if alg_name in NO_WAY_BACK:
        raise ValueError(f"methods: {alg_name} {NO_WAY_BACK[alg_name]}; {SCRIPTS}")
    require_runnable(hparams)


def require_runnable(hparams) -> None:
    """Raises ValueError, naming what is missing, if a method cannot run: a package, a file, a kind of model."""
    alg_name = hparams.alg_name
    for where, name in PACKAGES.get(alg_name, ()):
        value = getattr(module(where), name, None)
        if is_placeholder(value):
            raise ValueError(
                f"methods: {alg_name} needs {value.__name__}, which is not available: {value._why}; install its package"
            )
    words = KNOWN_NAMES.get(alg_name)
    if words and not any(word in str(hparams.model_name).lower() for word in words):
        raise ValueError(
            f"methods: {alg_name} knows the shape of the weights by words in model_name only ({', '.join(words)}), and there is none in "
            f"{str(hparams.model_name)!r}; give the model's folder such a name if its weights are of that shape"
        )
    archive = getattr(hparams, "archive", None)
    if alg_name == "MEND" and not (archive and Path(archive).is_file()):
        raise ValueError(
            f"methods: MEND needs the file of its trained editor, archive: {archive!r} does not exist; train it by EasyEdit"
        )


def require_request(alg_name: str, request: Mapping) -> None:
    """Raises ValueError if a request lacks what the method wants of it."""
    field = REQUEST.get(alg_name)
    if field and not request.get(field):
        raise ValueError(
            f"methods: {alg_name} wants a {field} in every request, and that of {request['prompt']!r} has none"
        )


NAME = "KNE"
RIGHT_PADDED = ("ROME", "MEMIT", "EMMET", "EAMET", "R-ROME", "AlphaEdit", "CORE", "SPHERE")
"""Methods for which EasyEdit sets right padding; all others get left padding."""


@dataclass(frozen=True)
class Method:
    """A method as people name it: one of EasyEdit's, maybe with settings that make it what it is called."""

    label: str
    alg_name: str
    settings: dict = field(default_factory=dict)


METHODS = {
    method.label: method
    for method in (
        Method("FT-M", "FT", {"objective_optimization": "target_new"}),
        Method("FT-L", "FT", {"objective_optimization": "prompt_last"}),
        Method("LoRA", "LoRA", {"lora_type": "lora"}),
        Method("AdaLoRA", "LoRA", {"lora_type": "adalora"}),
    )
}
"""Labels that are not simply EasyEdit's names."""
ONLY = {"objective_optimization": "prompt_last", "lora_type": "adalora"}
"""What a version does whose class does not know the setting (the release of 2023)."""


ONE_FACT = ("KN",)
"""Methods that take the first of several requests and drop the others without a word."""
BY_SUBJECT = (
    "ROME",
    "R-ROME",
    "MEMIT",
    "MEMIT-FE",
    "PMET",
    "EMMET",
    "EAMET",
    "AlphaEdit",
    "SPHERE",
    "CORE",
    "DeepEdit-Api",
)
"""Methods that look for the subject's tokens in the prompt: they cannot edit a record without a subject."""
ACCUMULATING = ("AlphaEdit", "SPHERE")
"""Methods that add every edit to what they keep of those before."""
