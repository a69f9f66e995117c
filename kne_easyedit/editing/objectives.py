"""The training loss: the answers' cross-entropy, and further objectives.

A further objective is a class with a ``name``, a ``weight`` and a ``loss(model)``, a function that builds it from the
settings, and a line in `OBJECTIVES`. One that looks at what the model predicts in some texts can share the answers'
forward pass (`SharedObjective`). Those that exist go beyond the paper and are off by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from kne_easyedit._util.files import expand_path
from kne_easyedit.editing.after_answers import texts_after_answers
from kne_easyedit.editing.divergence import Divergence
from kne_easyedit.editing.earlier import earlier_facts
from kne_easyedit.editing.neighbours import (
    as_said,
    asked_of_others,
    known_facts,
    neighbour_prompts,
    neighbour_source,
    neighbours_wanted,
    readable,
    short_enough,
    uses_neighbours,
)
from kne_easyedit.editing.reading import learn_head
from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.editing.variants import Variants, variant_facts
from kne_easyedit.facts.encoding import Fact, Tokenizer, end_token
from kne_easyedit.facts.neighbours import is_held_out, run_exclusions
from kne_easyedit.facts.readers import data_digest, read_records
from kne_easyedit.facts.records import load_requests
from kne_easyedit.facts.templates import normalised, stands_in, subject_key
from kne_easyedit.localization.data import encode_facts
from kne_easyedit.localization.named import MAGNITUDE
from kne_easyedit.models.state import preserve_state


class Objective(Protocol):
    """A further term of the training loss. Training stops by the answers' cross-entropy, whatever this term is."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def weight(self) -> float:
        """Factor of `loss` in the sum that is minimised."""

    def loss(self, model: nn.Module) -> Tensor:
        """The term for ``model`` with its present weights: a scalar through which gradients flow."""


@runtime_checkable
class SharedObjective(Objective, Protocol):
    """A term that looks at what the model predicts in some texts.

    They are read in the forward pass of the answers: one pass of all costs less than two. ``loss(model)`` is the term
    of all texts in a pass of its own.
    """

    @property
    def binding(self) -> bool:
        """Whether `may_stop` must hold after ``edit_gain``, too; else training alone waits for it."""

    def texts(self, step: int) -> Sequence[Fact]:
        """The texts of step number ``step``, from 0. The term looks at what is predicted for their answers' tokens."""

    def loss_of(self, logits: Tensor, step: int) -> Tensor:
        """The term, a scalar, of the logits ``(tokens, vocabulary)`` that predict these tokens, text by text."""

    def may_stop(self, logits: Tensor, step: int) -> bool:
        """Whether training may stop with these logits, once the answers are reached."""


class Alone:
    """A shared objective in forward passes of its own: those of the answers stay bit for bit what they are without."""

    def __init__(self, objective: SharedObjective):
        self._objective = objective

    @property
    def name(self) -> str:
        """That of the objective."""
        return self._objective.name

    @property
    def weight(self) -> float:
        """That of the objective."""
        return self._objective.weight

    def loss(self, model: nn.Module) -> Tensor:
        """The term of all its texts."""
        return self._objective.loss(model)


def unrelated_prompts(
    requests: Sequence[Mapping[str, Any]], hparams: EditSettings, tokenizer: Tokenizer = None
) -> list[str]:
    """The first ``kl_size`` prompts of ``kl_data`` that have nothing to do with the requests.

    Left out are prompts that stand in a request, as its own or as a probe; records about a subject that is edited,
    that stands in one of these prompts or in one that is asked later (`asked_of_others`), or that is held out for
    evaluation (`is_held_out`). A record without a subject goes by its prompt.

    Raises:
        ValueError: The file has none.
        FileNotFoundError: It does not exist.
    """
    known = _prompts(str(hparams.kl_data), data_digest(str(hparams.kl_data)))
    said = as_said(requests, hparams, tokenizer)
    texts = {normalised(text) for text in (*run_exclusions(said), *asked_of_others(said))}
    edited = {subject_key(request["subject"]) for request in said if request.get("subject")}

    def unrelated(prompt: str, subject: str | None) -> bool:
        text = normalised(prompt)
        if text in texts or any(stands_in(name, text) for name in edited):
            return False
        if subject is None:
            return True
        return not is_held_out(subject) and not any(stands_in(subject_key(subject), asked) for asked in texts)

    chosen = list(islice((prompt for prompt, subject in known if unrelated(prompt, subject)), hparams.kl_size))
    if not chosen:
        raise ValueError(
            f"kl_data: {hparams.kl_data!r} holds no prompt beside those about subjects that are edited, asked or held "
            f"out for evaluation; name a file with more facts"
        )
    return chosen


@lru_cache(maxsize=4)
def _prompts(path: str, content: str | None) -> tuple[tuple[str, str | None], ...]:
    """Prompts and subjects of a file; ``content``, its digest, makes a changed file another entry of the cache."""
    return tuple(
        {request["prompt"]: (request["prompt"], request["subject"]) for request in load_requests(path)}.values()
    )


def _unrelated(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Mapping[str, Any]], hparams: EditSettings
) -> Objective | None:
    prompts = readable(model, tokenizer, unrelated_prompts(requests, hparams, tokenizer), hparams, 1, "kl_data")
    return Alone(Divergence.after_prompts(model, tokenizer, prompts, hparams.kl_weight)) if prompts else None


def _neighbours(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Mapping[str, Any]], hparams: EditSettings
) -> Objective | None:
    found = neighbour_prompts(requests, hparams, model, tokenizer)
    prompts = readable(model, tokenizer, found, hparams, hparams.neighbour_tokens)
    if hparams.spare_edited:  # what the model says there are the answers; no more of them than neighbours
        earlier = earlier_facts(model, tokenizer, requests)[: neighbours_wanted(hparams)]
        read = short_enough(
            model, tokenizer, [fact.prompt for fact in earlier], hparams.neighbour_tokens, "spare_edited"
        )
        prompts = list(dict.fromkeys([*read, *prompts]))
    if not prompts:
        return None
    return Divergence.after_prompts(
        model,
        tokenizer,
        prompts,
        hparams.neighbour_weight,
        name="neighbours",
        tokens=hparams.neighbour_tokens,
        per_step=hparams.neighbours_per_step * len(requests),
        bound=math.inf if hparams.neighbour_stop is None else hparams.neighbour_stop,
    )


def _variants(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Mapping[str, Any]], hparams: EditSettings
) -> Objective | None:
    facts = variant_facts(model, tokenizer, requests, hparams)
    return Variants(facts, hparams.stop_loss, len(requests)) if facts else None


def _continuations(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Mapping[str, Any]], hparams: EditSettings
) -> Objective | None:
    texts = texts_after_answers(model, tokenizer, encode_facts(model, tokenizer, requests, hparams))
    weight = hparams.continuation_weight
    return Divergence.in_texts(model, texts, weight, name="continuation", per_step=len(requests)) if texts else None


ObjectiveBuilder = Callable[[nn.Module, Tokenizer, Sequence[Mapping[str, Any]], EditSettings], Objective | None]
"""Builds an objective from model, tokenizer, requests and settings; None: these requests have nothing for it."""

OBJECTIVES: dict[str, ObjectiveBuilder] = {
    "kl_weight": _unrelated,
    "neighbour_weight": _neighbours,
    "subject_variants": _variants,
    "continuation_weight": _continuations,
}
"""Setting that is an objective's weight, or number of texts -> what builds the objective. It is used where that is not
0."""


def require_sources(
    requests: Sequence[Mapping[str, Any]], hparams: EditSettings, tokenizer: Tokenizer, localised: bool = False
) -> None:
    """Reads what training will read beside the requests, so that what is missing is said before localisation.

    Args:
        requests: What is edited.
        hparams: The settings.
        tokenizer: The tokenizer.
        localised: The ensemble comes from the settings, so that the files that these name for it are needed, too.

    Raises:
        ValueError: ``neighbour_data`` or ``kl_data`` cannot be used, ``ensemble`` is a folder, or there is no end token
            for ``append_eos``.
        FileNotFoundError: A file does not exist; the message names the setting.
    """
    if localised and hparams.ensemble is not None:
        if (folder := expand_path(hparams.ensemble)).is_dir():
            raise ValueError(f"ensemble: {folder} is a folder; name a file of kne localize, or {MAGNITUDE}")
    elif localised and hparams.localization_data is not None:
        _require_file("localization_data", hparams.localization_data)
    if uses_neighbours(hparams):
        path, *_ = neighbour_source(hparams)
        _require_file("localization_data" if hparams.neighbour_data is None else "neighbour_data", path)
        known_facts(hparams)
    if hparams.kl_weight:
        _require_file("kl_data", str(hparams.kl_data))
        unrelated_prompts(requests, hparams, tokenizer)
    if hparams.append_eos:
        end_token(tokenizer)


def _require_file(setting: str, path: str) -> None:
    """Raises FileNotFoundError, with the setting's name, if there is no such data file."""
    if data_digest(path) is None:
        try:
            read_records(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{setting}: {error}") from error


def objectives_for(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Mapping[str, Any]], hparams: EditSettings
) -> list[Objective]:
    """The objectives of `OBJECTIVES` whose weight is not 0 in ``hparams``, for an edit of ``requests``.

    They may run ``model``, which is left exactly as it was.
    """
    chosen = [build for weight, build in OBJECTIVES.items() if getattr(hparams, weight)]
    if not chosen:
        return []
    with preserve_state(model):
        learn_head(model)
        built = [build(model, tokenizer, requests, hparams) for build in chosen]
    return [objective for objective in built if objective is not None]
