"""Whether a model with rows added still gives the answers that were trained; nothing is written into its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kne_easyedit.editing.applying import with_edits
from kne_easyedit.editing.row_training import measured_answers
from kne_easyedit.edits.low_rank import Rows
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.models.state import preserve_state

AT_ONCE = 8
"""Facts in one forward pass."""


@dataclass(frozen=True)
class KeptAnswer:
    """An answer with the whole edit and with the reduced one."""

    prompt: str
    target: str
    probability: float
    """Of the whole answer after the prompt, with all rows."""
    reduced: float
    """The same with the reduced rows."""
    greedy: tuple[bool, bool]
    """Whether each of its tokens is the most probable one: with all rows, with the reduced ones."""

    @property
    def lost(self) -> bool:
        """Whether the reduction took it away."""
        return self.greedy == (True, False)


@contextmanager
def rows_added(model: nn.Module, changed: Mapping[str, Rows]) -> Iterator[None]:
    """Inside, the modules' outputs are those with the rows added to their weights; the weights themselves stay.

    Works on quantised modules as well. Use it inside `preserve_state`, which defers Ctrl-C.

    Args:
        model: The model.
        changed: Module name -> rows and what is added to them, ``(n, d1)``.

    Raises:
        ValueError: A module is not in ``model``.
    """
    with ExitStack() as hooks:
        for name, (chosen, delta) in changed.items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(
                    f"model: {type(model).__name__} has no module {name!r}, which the edit changes"
                ) from None
            hook = module.register_forward_hook(_adding(torch.tensor(chosen), delta))
            hooks.callback(hook.remove)
        yield


def _adding(chosen: Tensor, delta: Tensor) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        precise = torch.promote_types(x.dtype, torch.float32)
        more = x.to(precise) @ delta.to(x.device, precise).t()
        index = chosen.to(output.device)
        # From a copy: the output may be a view that the module's own backward pass needs.
        return output.index_add(-1, index, more.to(output.device, output.dtype))

    return add


def kept_answers(
    model: nn.Module, facts: Sequence[Fact], whole: Mapping[str, Rows], reduced: Mapping[str, Rows]
) -> tuple[KeptAnswer, ...]:
    """Asks the base model for the facts, with all rows of an edit and with reduced ones.

    Args:
        model: The base model; edits applied to it are taken back meanwhile.
        facts: The facts.
        whole: The rows of the edit.
        reduced: The same, reduced.

    Returns:
        One entry a fact.
    """
    asked = []
    # Without what is applied in place: the rows are added to the base.
    with with_edits(model, ()), preserve_state(model), torch.no_grad():
        for changed in (whole, reduced):
            with rows_added(model, changed):
                parts = [facts[at : at + AT_ONCE] for at in range(0, len(facts), AT_ONCE)]
                asked.append([one for part in parts for one in measured_answers(model, part)])
    return tuple(
        KeptAnswer(fact.prompt, fact.target, before.probability, now.probability, (before.greedy, now.greedy))
        for fact, before, now in zip(facts, *asked)
    )
