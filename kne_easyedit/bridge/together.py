"""Whether the settings of several methods can serve one run: they share prompts, separator, and facts an edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kne_easyedit._util.messages import require_one_of
from kne_easyedit._util.settings import EVALUATION_TYPES
from kne_easyedit.bridge.methods import NAME as KNE
from kne_easyedit.facts.encoding import SEPARATOR


def separator_of(methods: Mapping[str, Any]) -> str:
    """What joins prompt and answer in a run of these methods: KNE's setting, a blank without KNE.

    Args:
        methods: Label -> hyperparameters.
    """
    return next((hparams.separator for hparams in methods.values() if hparams.alg_name == KNE), SEPARATOR)


def require_one_separator(methods: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the method, if one joins prompt and answer otherwise than `separator_of` says."""
    shared = separator_of(methods)
    for method, hparams in methods.items():
        found = getattr(hparams, "separator", SEPARATOR)
        if found != shared:
            why = (
                "all variants of KNE in a run share it"
                if hparams.alg_name == KNE
                else "EasyEdit's own methods join by a blank; run KNE alone"
            )
            raise ValueError(f"separator: {method} joins prompt and answer by {found!r}, KNE by {shared!r}; {why}")


def require_one_evaluation(methods: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the methods, unless all are evaluated by one known ``evaluation_type``, or by none.

    Figures of generated text are no teacher-forced ones: no table compares the two.
    """
    kinds = {method: getattr(hparams, "evaluation_type", None) or None for method, hparams in methods.items()}
    for method, kind in kinds.items():
        if kind is not None:
            require_one_of(f"{method}: evaluation_type", kind, EVALUATION_TYPES)
    if len(set(kinds.values())) > 1:
        shown = ", ".join(f"{method}: {kind or 'none, teacher-forced'}" for method, kind in kinds.items())
        raise ValueError(
            f"evaluation_type: {shown}; one run compares figures of one kind: "
            f"give all methods the same, or run them apart"
        )


def wanted_of_the_run(methods: Mapping[str, Any], mode: str, chat_template: bool) -> Iterator[str]:
    """What settings ask for that a run of another mode, or without a chat template, does not do.

    Args:
        methods: Label -> hyperparameters.
        mode: Of the run.
        chat_template: Whether it asks in the chat template.

    Yields:
        A message for each: field, method, value, way out.
    """
    for method, hparams in methods.items():
        if getattr(hparams, "use_chat_template", False) and not chat_template:
            yield (
                f"use_chat_template: {method}'s hparams ask for it, the run does not; "
                f"ask for it there (--chat-template): all methods share it"
            )
    for method, hparams in methods.items():
        if mode != "batch" and hparams.alg_name == KNE and hparams.batch_size != 1:
            yield (
                f"batch_size: {method}'s hparams say {hparams.batch_size}; "
                f"mode {mode} edits one fact at a time, set it to 1 (or take mode batch)"
            )


def require_together(methods: Mapping[str, Any], mode: str, chat_template: bool) -> None:
    """Raises ValueError, naming field and method, for settings that cannot serve one run (`wanted_of_the_run`)."""
    for message in wanted_of_the_run(methods, mode, chat_template):
        raise ValueError(message)
    require_one_separator(methods)
    require_one_evaluation(methods)
