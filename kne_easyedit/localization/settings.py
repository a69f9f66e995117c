"""The settings that localisation reads; `kne_easyedit.hparams.KNEHyperParams` has them."""

from __future__ import annotations

from typing import Protocol

from kne_easyedit.localization.selection import Selection


class ReadSettings(Protocol):
    """How facts are read. `KNEHyperParams` explains them."""

    @property
    def use_chat_template(self) -> bool:
        """Whether prompts are put into the tokenizer's chat template."""

    @property
    def separator(self) -> str:
        """White space between prompt and answer."""


class LocalizationSettings(Protocol):
    """Settings of Eq. 3-7, of the facts to localise on, and of the score cache. `KNEHyperParams` explains them."""

    model_name: str
    target_modules: list[str]
    layers: list[int]
    attribution_steps: int
    quadrature: str
    attribution_engine: str
    chunk_rows: int | None
    cache_dir: str | None
    ensemble: str | None
    localization_data: str | None
    localization_size: int
    localization_offset: int
    use_chat_template: bool
    separator: str

    @property
    def selection(self) -> Selection:
        """``p``, ``aggregation``, ``score_scale`` and ``layers`` as one value."""
