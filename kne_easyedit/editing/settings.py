"""The settings that an edit reads; `kne_easyedit.hparams.KNEHyperParams` has them."""

from __future__ import annotations

from typing import Protocol

from kne_easyedit.localization.settings import LocalizationSettings


class EditSettings(LocalizationSettings, Protocol):
    """The settings of Eq. 8-11, and those of localisation; their meanings: `KNEHyperParams`."""

    optimizer: str
    lr: float
    polyak_fraction: float
    num_steps: int
    stop_loss: float
    on_failure: str
    alpha: float
    weight_decay: float
    initialization: str
    append_eos: bool
    append_break: bool
    until_given: bool
    edit_gain: float
    subject_variants: int
    kl_weight: float
    kl_data: str | None
    kl_size: int
    neighbour_weight: float
    neighbour_data: str | None
    neighbour_relation_size: int
    neighbour_subject_size: int
    neighbour_tokens: int
    neighbours_per_step: int
    neighbour_stop: float | None
    input_projection: bool
    projection_ridge: float
    spare_edited: bool
    spare_continuation: int
    continuation_weight: float
    seed: int
    device: int | str

    def validate(self) -> None:
        """Raises ValueError for a value of the wrong type or out of range."""
