"""The facts of a localisation or an edit: read from ``localization_data``, checked and encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from torch import nn

from kne_easyedit.facts.encoding import Fact, Tokenizer, encode_request, require_known, require_length
from kne_easyedit.facts.readers import data_digest
from kne_easyedit.facts.records import load_requests
from kne_easyedit.localization.settings import LocalizationSettings, ReadSettings


def localization_requests(hparams: LocalizationSettings) -> list[dict]:
    """The usable records of ``localization_data`` among the ``localization_size`` from ``localization_offset`` on.

    The file is parsed again only if its content has changed.

    Raises:
        ValueError: No file is set, it is no data file, the offset is not below its number of records, or no record is
            usable.
        FileNotFoundError: The file does not exist.
    """
    data = hparams.localization_data
    if data is None:
        raise ValueError("localization_data: none; name a KnowEdit file (--data), or 'embedded' for the packaged facts")
    found = list(_requests(data, data_digest(data), hparams.localization_size, hparams.localization_offset))
    if not found:
        raise ValueError(
            f"localization_data: {data} holds no usable fact among the {hparams.localization_size} from number "
            f"{hparams.localization_offset} on; localise on at least one fact (what is wrong with these: kne doctor "
            f"--data {data})"
        )
    return found


@lru_cache(maxsize=4)
def _requests(path: str, content: str | None, size: int, offset: int) -> tuple[dict, ...]:
    """``content``: the file's digest, a part of the key."""
    return tuple(load_requests(path, size, offset))


def encode_facts(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Mapping | Fact], hparams: ReadSettings
) -> list[Fact]:
    """Requests as facts, under the settings ``use_chat_template`` and ``separator``; facts are passed on as they are.

    Raises:
        ValueError: A request cannot be edited (`encode_request`), is longer than the model can take, or has tokens that
            the model has not. Its number in its file is named, if it has one.
    """
    return [one if isinstance(one, Fact) else _encoded(model, tokenizer, one, hparams) for one in requests]


def _encoded(model: nn.Module, tokenizer: Tokenizer, request: Mapping, hparams: ReadSettings) -> Fact:
    try:
        fact = encode_request(tokenizer, request, hparams.use_chat_template, hparams.separator)
        require_length(fact, model.config)
        require_known(fact, model)
        return fact
    except ValueError as error:
        if isinstance(request, Mapping) and "index" in request:  # of a file
            raise ValueError(f"record {request['index']}: {error}") from error
        raise
