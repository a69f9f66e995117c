"""Directions in which the trained rows may move: those that the inputs of neighbours do not have.

What a row adds to a module's output for an input ``x`` is its inner product with ``x``. Rows that are orthogonal to all
inputs that a module has in some texts add nothing there: then the next module's inputs are what they were, too, and so
on to the logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.editing.after_answers import after_answers
from kne_easyedit.editing.divergence import AT_ONCE, continuations
from kne_easyedit.editing.earlier import earlier_facts
from kne_easyedit.editing.neighbours import neighbour_prompts, readable
from kne_easyedit.editing.reading import learn_head
from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.facts.encoding import Fact, Tokenizer, longest_text, pad
from kne_easyedit.localization.data import encode_facts
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.fast_linear import fast_linear
from kne_easyedit.models.state import preserve_state
from kne_easyedit.models.targets import in_features

logger = logging.getLogger(__name__)

LARGEST_SHARE = 0.5
"""Of a module's input dimensions, how many neighbours may close at most."""
EARLIER_SHARE = 0.4
"""The same for facts of earlier edits."""
CONTINUED_SHARE = 0.05
"""The same for what follows the answers. What all of them leave is there for the edit."""


class InputProjection:
    """``P = I - X^T (X X^T + lambda I)^-1 X`` of one module, with ``lambda = ridge * median_i ||x_i||^2``,
    of the inputs that are not 0.

    With ``ridge`` near 0 it removes from a direction all that lies in the span of the inputs. The median, for models
    give the first token of a text activations that are thousands of times the others'.

    Args:
        inputs: ``X``, ``(N, d1)``, ``N`` smaller than ``d1``.
        ridge: A positive number: the larger, the less is removed of directions in which inputs are small.

    Raises:
        ValueError: Inputs are not finite, or the ridge is too small for them.
    """

    def __init__(self, inputs: Tensor, ridge: float):
        device, precise = inputs.device, torch.promote_types(inputs.dtype, torch.float32)
        # Gram matrix and Cholesky factor in float64: their condition number is beyond float32. mps has no float64.
        x = inputs.to("cpu" if device.type == "mps" else device).double()
        gram = x @ x.t()
        squares = gram.diagonal()
        if not squares.isfinite().all():
            raise ValueError(
                "input_projection: a module has inputs that are not finite; load the model in float32 or bfloat16"
            )
        if (there := squares[squares != 0]).numel():  # inputs of 0 close nothing: the ridge alone is on their diagonal
            squares.add_(ridge * there.median())
        else:
            squares.fill_(1.0)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise ValueError(f"projection_ridge: {ridge} is too small for the inputs of {len(x)} tokens; raise it")
        # With L L^T = X X^T + lambda I, P = I - B^T B for B = L^-1 X. The rows of B are all but orthonormal, so that
        # float32 suffices to apply it.
        self._basis = torch.linalg.solve_triangular(factor, x, upper=False).to(device, precise)  # (N, d1)

    @property
    def basis(self) -> Tensor:
        """``B``, ``(N, d1)``, with ``P = I - B^T B``."""
        return self._basis

    def __call__(self, directions: Tensor) -> Tensor:
        """``directions P``: rows ``(n, d1)`` without what the inputs have of them."""
        basis = self._basis.to(directions.dtype)
        return directions - (directions @ basis.t()) @ basis


def input_projections(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    modules: Sequence[str],
    ridge: float,
    tokens: int = 1,
    earlier: Sequence[Fact] = (),
    edited: Sequence[Fact] = (),
    continued: int = 0,
) -> dict[str, InputProjection]:
    """The projections of modules, for prompts and the unedited model's own continuations of them.

    Prompts are taken in order as long as their different beginnings are at most `LARGEST_SHARE` of the inputs'
    dimension: tokens with the same ones before them have the same inputs, and count once. Of earlier facts those tokens
    are taken that are nearest to the answers (`latest`), up to `EARLIER_SHARE`.

    Args:
        model: The model before the edit, frozen and in evaluation mode (`preserve_state`).
        tokenizer: Its tokenizer.
        prompts: The neighbours.
        modules: Names of linear layers.
        ridge: See `InputProjection`.
        tokens: What the model says in place of so many tokens after each prompt is left as it is.
        earlier: Facts that are left as they are, too, with their answers; the most important one first.
        edited: The facts of the edit.
        continued: What the model says in place of so many tokens after their answers is left, too (`after_answers`),
            up to `CONTINUED_SHARE`.

    Returns:
        Module name -> its projection; empty without any text.

    Raises:
        ValueError: A module does not read every token of a text (an expert of several); the ridge is too small.
    """
    inputs = min(in_features(model.get_submodule(name)) for name in modules)
    asked = [tokenizer(prompt)["input_ids"] for prompt in dict.fromkeys(prompts)]
    most = int(LARGEST_SHARE * inputs)
    ids = within(asked, most, tokens)
    if asked and not ids:
        logger.warning(
            "input_projection: no neighbour is spared: with neighbour_tokens: %s the first of %s has more than %s "
            "tokens, half of the %s inputs of a module; lower neighbour_tokens, or take shorter ones (neighbour_data)",
            tokens,
            len(asked),
            most,
            inputs,
        )
    elif len(ids) < len(asked):
        logger.info("input_projection: %s of %s neighbours, for %s tokens at most", len(ids), len(asked), most)
    chosen: Mapping[tuple[int, ...], Sequence[int]] = latest(earlier, int(EARLIER_SHARE * inputs))
    facts = [fact.ids for fact in earlier if fact.ids in chosen]
    if continued:
        room = int(CONTINUED_SHARE * inputs)
        said = after_answers(model, tokenizer, edited, continued, room)
        if edited and not said:
            logger.warning(
                "spare_continuation: nothing is spared after the answers: there is room for %s of %s inputs, and texts "
                "have %s tokens at most (max_position_embeddings); lower it (it is %s)",
                room,
                inputs,
                longest_text(model.config),
                continued,
            )
        chosen, facts = {**chosen, **said}, [*facts, *said]
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    seen: set[tuple[int, ...]] = set()
    with torch.no_grad():
        for texts, length, places in ((ids, tokens, None), (facts, 1, chosen)):
            texts = sorted(texts, key=len)
            for start in range(0, len(texts), AT_ONCE):
                safe_point()
                some = texts[start : start + AT_ONCE]
                with _inputs_of(model, modules) as passes:
                    read, first = _read(model, some, length, tokenizer.eos_token_id)
                where = _unseen(read, first, seen, places)
                for name in modules if where[0] else ():
                    found[name].append(_joined(passes[name], some, name)[where])
    return {name: InputProjection(torch.cat(found.pop(name)), ridge) for name in modules} if seen else {}


def _unseen(
    texts: Sequence[Sequence[int]],
    first: Sequence[int],
    seen: set[tuple[int, ...]],
    places: Mapping[tuple[int, ...], Sequence[int]] | None,
) -> tuple[list[int], list[int]]:
    """Rows and columns of tokens whose beginnings were not ``seen`` yet, and are now; of each text its ``places``."""
    where: tuple[list[int], list[int]] = [], []
    for row, text in enumerate(texts):
        for end in range(len(text)) if places is None else places[tuple(text)]:
            if (beginning := tuple(text[: end + 1])) not in seen:
                seen.add(beginning)
                where[0].append(row)
                where[1].append(first[row] + end)
    return where


def projections_for(
    model: nn.Module,
    tokenizer: Tokenizer,
    requests: Sequence[Mapping[str, Any]],
    hparams: EditSettings,
    modules: Sequence[str],
) -> dict[str, InputProjection]:
    """The projections of the modules of an edit under ``input_projection``; none without it, or where there is nothing
    to spare: no neighbour, with ``spare_edited`` no earlier edit, and no ``spare_continuation``.

    Runs ``model``, which is left exactly as it was.
    """
    if not hparams.input_projection:
        return {}
    found = neighbour_prompts(requests, hparams, model, tokenizer)
    edited = encode_facts(model, tokenizer, requests, hparams) if hparams.spare_continuation else []
    prompts = readable(model, tokenizer, found, hparams, hparams.neighbour_tokens)
    facts = earlier_facts(model, tokenizer, requests) if hparams.spare_edited else []
    with preserve_state(model), fast_linear(model):
        learn_head(model)
        return input_projections(
            model,
            tokenizer,
            prompts,
            modules,
            hparams.projection_ridge,
            hparams.neighbour_tokens,
            facts,
            edited,
            hparams.spare_continuation,
        )


def within(texts: Sequence[Sequence[int]], most: int, tokens: int) -> list[Sequence[int]]:
    """The first of some texts, as token ids, that have ``most`` different beginnings with ``tokens - 1`` more each."""
    seen: set[tuple[int, ...]] = set()
    for i, text in enumerate(texts):
        seen.update(tuple(text[: end + 1]) for end in range(len(text)))
        if len(seen) + (i + 1) * (tokens - 1) > most:
            return list(texts[:i])
    return list(texts)


def latest(facts: Sequence[Fact], most: int) -> dict[tuple[int, ...], list[int]]:
    """Positions of facts, nearest to their answers first, as long as different beginnings are at most ``most``.

    First come the answers' tokens and the last ones of all prompts, then the last but one of all prompts, and so on.

    Returns:
        Token ids of a fact -> its positions, for facts that have any.
    """
    places = [
        (max(0, fact.prompt_length - 1 - at), order, at)
        for order, fact in enumerate(facts[:most])
        for at in range(len(fact.ids))
    ]
    seen: set[tuple[int, ...]] = set()
    found: dict[tuple[int, ...], list[int]] = {}
    for _, order, at in sorted(places):
        ids = facts[order].ids
        if ids[: at + 1] in seen:
            continue
        if len(seen) == most:
            break
        seen.add(ids[: at + 1])
        found.setdefault(ids, []).append(at)
    return found


def _read(
    model: Any, prompts: Sequence[Sequence[int]], tokens: int, end: int | None
) -> tuple[list[list[int]], list[int]]:
    """Runs the model on prompts and on all but the last token of their continuations.

    Returns:
        The texts that were read, and where each begins in its row.
    """
    if tokens == 1:  # nothing is to be predicted, so that the output head can be left out
        input_ids, attention_mask = (tensor.to(device_of(model)) for tensor in pad(prompts))
        model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return [list(row) for row in prompts], [0] * len(prompts)
    said, _ = continuations(model, prompts, tokens, end)
    longest = max(map(len, prompts))
    return [[*row, *answer[:-1]] for row, answer in zip(prompts, said)], [longest - len(row) for row in prompts]


@contextmanager
def _inputs_of(model: nn.Module, modules: Sequence[str]) -> Iterator[Mapping[str, list[Tensor]]]:
    """Inside, the inputs of each module are collected, pass by pass."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    hooks: list[RemovableHandle] = []

    def collect(name: str, arguments: tuple[Any, ...]) -> None:
        found[name].append(arguments[0].detach())

    try:
        for name in modules:
            module = model.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: collect(name, args)))
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _joined(passes: Sequence[Tensor], texts: Sequence[Sequence[int]], name: str) -> Tensor:
    """The inputs of several passes of the same texts, ``(texts, positions, d1)``: a prompt's, then token by token.

    Later passes read the last token alone, or all tokens again (`continuations`).
    """
    longest = max(map(len, texts))
    counts = [x.numel() / (len(texts) * x.shape[-1]) for x in passes]
    if not passes or any(count != longest + i and (i == 0 or count != 1) for i, count in enumerate(counts)):
        raise ValueError(
            f"input_projection: {name} does not read every token of a text once; leave it out of target_modules, or "
            f"set input_projection: false"
        )
    read = [x.reshape(len(texts), -1, x.shape[-1]) for x in passes]
    return torch.cat([read[0], *(x[:, -1:] for x in read[1:])], 1)
