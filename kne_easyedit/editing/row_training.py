"""Eq. 8-11: train the ensemble's rows, jointly over all layers, until the model gives the new answers.

``W[M, :] + (alpha / sqrt(n)) * W_kne`` is a rank-stabilised LoRA: ``(alpha / sqrt(r)) * B A`` with ``r = n``,
``A = W_kne`` and ``B`` the fixed 0/1 matrix that selects the rows ``M``. So PEFT's LoRA layers train it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kne_easyedit._util.interrupts import safe_point
from kne_easyedit.editing.adapter import ADAPTER, row_adapter, rows_by_module
from kne_easyedit.editing.losses import answer_logits, cross_entropy
from kne_easyedit.editing.objectives import Objective, SharedObjective
from kne_easyedit.editing.optimizers import OPTIMIZERS, TrainedRows
from kne_easyedit.editing.projection import InputProjection
from kne_easyedit.editing.reading import Reading, read_together
from kne_easyedit.editing.row_edit import Answer, RowEdit
from kne_easyedit.editing.row_gradients import row_gradients
from kne_easyedit.editing.settings import EditSettings
from kne_easyedit.editing.training_pass import TrainingPass
from kne_easyedit.facts.encoding import Batch, Fact, collate
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.devices import device_of
from kne_easyedit.models.fast_linear import fast_linear
from kne_easyedit.models.state import preserve_state

GAINS = 3
"""How many gains above 1 are tried, in equal steps up to ``edit_gain``."""
PATIENCE = 5.0
"""Seconds after which training shows its progress."""


def train_rows(
    model: nn.Module,
    facts: Sequence[Fact],
    ensemble: NeuronEnsemble,
    hparams: EditSettings,
    objectives: Sequence[Objective] = (),
    on_step: Callable[[int, float], None] | None = None,
    projections: Mapping[str, InputProjection] | None = None,
) -> RowEdit:
    """Trains ``W_kne`` (Eq. 8-11) on ``facts`` in one batch, and leaves the model exactly as it was.

    Minimises the answers' mean cross-entropy plus ``weight * loss`` of each objective. Training stops as soon as the
    cross-entropy is below ``hparams.stop_loss`` and every shared objective lets it (`SharedObjective.may_stop`), after
    ``hparams.num_steps`` steps at the latest, and before the first one if that moves nothing (every gradient is 0, or
    has no part in a direction that is open); under ``hparams.until_given`` not before each token of the answers is the
    most probable one. Then the rows are multiplied by ``hparams.edit_gain``, or by a smaller gain under which all that
    still holds of every answer, and of objectives that are ``binding``. The texts of shared objectives are in one
    batch with the facts. Layers below the first edited one run once for each batch (`TrainingPass`).

    Args:
        model: A causal language model of transformers.
        facts: The facts to learn (`encode`).
        ensemble: The rows to train.
        hparams: ``optimizer`` and its settings, ``num_steps``, ``stop_loss``, ``until_given``, ``edit_gain``,
            ``alpha``, ``initialization``, ``seed`` are read.
        objectives: Further terms of the loss; none: the paper's training.
        on_step: Called before each step with its number, from 1, and the cross-entropy in nats.
        projections: Of modules by name (`input_projections`): the directions in which their rows may move; none: all.

    Returns:
        The edit: for each module ``(n, d1)`` to add to its rows, the cross-entropy before every step and at the end,
        and how well each fact is answered.

    Raises:
        FloatingPointError: The cross-entropy, a gradient or a step is not finite.
        ValueError: The ensemble is of another model, or its modules cannot be edited.
    """
    device = device_of(model)
    chosen = rows_by_module(model, ensemble)
    shared = [objective for objective in objectives if isinstance(objective, SharedObjective)]
    alone = [objective for objective in objectives if not isinstance(objective, SharedObjective)]
    training = TrainingPass(model, ensemble)
    with (
        preserve_state(model),
        row_adapter(model, ensemble, hparams) as trained,
        fast_linear(model),
        _progress(hparams.num_steps) as progress,
    ):
        rows = [
            TrainedRows(name, layer.lora_A[ADAPTER].weight, layer.scaling[ADAPTER], (projections or {}).get(name))
            for name, layer in trained.items()
        ]
        optimizer = OPTIMIZERS[hparams.optimizer](rows, hparams)
        losses: list[float] = []
        with torch.enable_grad(), row_gradients(rows, trained) as gradients:
            while True:
                safe_point()
                texts = [objective.texts(len(losses)) for objective in shared]
                batch = training_batch(facts, texts).to(device)
                predicted, labels = training.answer_logits(batch)
                logits, *others = predicted.split([_tokens(facts), *map(_tokens, texts)])
                labels = labels[: len(logits)]
                loss = cross_entropy(logits, labels)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    rate = optimizer.rate_setting
                    raise FloatingPointError(
                        f"training: the loss is {losses[-1]} at step {len(losses) - 1}; lower {rate} (it is "
                        f"{getattr(hparams, rate)}), or load the model in float32 or bfloat16"
                    )
                step = len(losses) - 1
                if len(losses) > hparams.num_steps or (
                    losses[-1] < hparams.stop_loss
                    and (not hparams.until_given or bool((logits.argmax(-1) == labels).all()))
                    and all(objective.may_stop(part.detach(), step) for objective, part in zip(shared, others))
                ):
                    break
                if on_step is not None:
                    on_step(len(losses), losses[-1])
                for sharing, part in zip(shared, others):
                    loss = loss + sharing.weight * sharing.loss_of(part, step)
                for objective in alone:
                    loss = loss + objective.weight * objective.loss(model)
                moved = optimizer.step(loss.detach(), *gradients.of(loss))
                progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                progress.update()
                if not moved:  # nor would further steps
                    break
        answers = _answers(facts, logits.detach(), labels)
        if hparams.edit_gain > 1 and len(losses) > 1:
            binding = [(one, one.texts(step)) for one in shared if one.binding]
            if gained := _gained(training, device, facts, rows, hparams, binding, step):
                answers, losses[-1] = gained
        deltas = {one.module: (chosen[one.module], (one.values * one.scale).detach()) for one in rows}
    return RowEdit(deltas, tuple(losses), answers)


def measured_answers(model: nn.Module, facts: Sequence[Fact]) -> tuple[Answer, ...]:
    """How well the model gives the answers of ``facts`` as it is.

    Args:
        model: A causal language model of transformers; it is left as it is.
        facts: The facts, in one batch.

    Returns:
        One answer for each fact.
    """
    with preserve_state(model), torch.no_grad():
        return _answers(facts, *answer_logits(model, collate(facts).to(device_of(model)))) if facts else ()


def _gained(
    training: TrainingPass,
    device: torch.device,
    facts: Sequence[Fact],
    rows: Sequence[TrainedRows],
    hparams: EditSettings,
    binding: Sequence[tuple[SharedObjective, Sequence[Fact]]],
    step: int,
) -> tuple[tuple[Answer, ...], float] | None:
    """Multiplies trained rows by the largest gain under which every answer keeps a loss below ``stop_loss``.

    The ``binding`` objectives, with their texts of the last step, must let training stop under it, too.

    Returns:
        The answers with these rows, and their mean cross-entropy; None if no gain above 1 keeps them: the rows stay.
    """
    texts = [its for _, its in binding]
    batch = training_batch(facts, texts).to(device)
    trained = [one.values.detach().clone() for one in rows]
    with torch.no_grad():
        for part in range(GAINS, 0, -1):
            safe_point()
            for one, before in zip(rows, trained):
                one.values.copy_(before * (1 + (hparams.edit_gain - 1) * part / GAINS))
            predicted, labels = training.answer_logits(batch)
            logits, *others = predicted.split([_tokens(facts), *map(_tokens, texts)])
            labels = labels[: len(logits)]
            answers = _answers(facts, logits, labels)
            if all(a.loss < hparams.stop_loss and (a.greedy or not hparams.until_given) for a in answers) and all(
                objective.may_stop(part, step) for (objective, _), part in zip(binding, others)
            ):
                return answers, cross_entropy(logits, labels).item()
        for one, before in zip(rows, trained):
            one.values.copy_(before)
    return None


def training_batch(facts: Sequence[Fact], texts: Sequence[Sequence[Fact]]) -> Batch | Reading:
    """Facts with the texts of each shared objective in one pass. Alone they are what the paper trains on, bit for bit:
    every position passes the head.
    """
    further = list(chain.from_iterable(texts))
    return read_together([*facts, *further]) if further else collate(facts)


def _tokens(facts: Sequence[Fact]) -> int:
    """Answer tokens of all facts."""
    return sum(len(fact.answer) for fact in facts)


def _answers(facts: Sequence[Fact], logits: Tensor, labels: Tensor) -> tuple[Answer, ...]:
    lengths = [len(fact.answer) for fact in facts]
    losses = cross_entropy(logits, labels, "none").split(lengths)
    best = (logits.argmax(-1) == labels).split(lengths)
    return tuple(
        Answer(fact, own.mean().item(), math.exp(-own.sum().item()), bool(same.all()))
        for fact, own, same in zip(facts, losses, best)
    )


def _progress(steps: int) -> tqdm:
    """A progress bar for a long training: on a terminal only (``disable=None``), and removed at the end."""
    disable = True if os.environ.get("TQDM_DISABLE", "0") not in ("", "0") else None
    return tqdm(total=steps, desc="train", unit="step", delay=PATIENCE, leave=False, disable=disable)
