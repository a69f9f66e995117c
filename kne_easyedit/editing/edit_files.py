"""An edit in a folder: ``edit.json`` says what it is, ``rows.safetensors`` holds what it adds. Nothing else is read.

Everything is checked when it is read: a folder that is missing, foreign, truncated, changed or half-written is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import new_directory, parse_json, parse_versioned
from kne_easyedit._util.messages import is_utf8, shorten
from kne_easyedit._util.tensor_files import DTYPES, Place, places, read_tensor, texts, values_digest, write_tensors
from kne_easyedit.editing.row_edit import Answer
from kne_easyedit.facts.encoding import Fact
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.base import Base, BaseModule

FORMAT = "kne-edit"
SCHEMA_VERSION = 1
"""Raised when an older reader could not read what is written."""
FIELDS_TEXT = "kne_fields"
"""In the rows' header: JSON, field of ``edit.json`` -> SHA-256 of its value. The edit's digest says what it adds; this
finds a change of anything else. Fields that are not named, of a later version, are not compared."""
JSON_FILE, ROWS_FILE = "edit.json", "rows.safetensors"
LARGEST_JSON = 2**28
"""Bytes of ``edit.json`` at most."""
_MODULE = re.compile(r"[^\W.][\w-]*(\.[\w-]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TORCH = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_STORED = (*_TORCH, "int8", "uint8")
"""Of a base's weights, those of bitsandbytes included."""


class StoredDeltas(Mapping[str, tuple[tuple[int, ...], Tensor]]):
    """The rows of a stored edit. Each module's are read when they are asked for, and none is kept.

    Args:
        path: The file.
        rows: Module name -> its rows.
        digests: Module name -> SHA-256 of the values.
        found: Module name -> its place in the file.

    Raises:
        ValueError: On reading: the file has changed since it was checked.
        OSError: On reading: it is gone, or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        rows: Mapping[str, tuple[int, ...]],
        digests: Mapping[str, str],
        found: Mapping[str, Place],
    ):
        self.path = path
        self.rows = rows
        self.digests = digests
        self._places = found

    def described(self, name: str) -> tuple[list[int], str, str]:
        """Shape, number type and SHA-256 of a module's values, without reading them."""
        place = self._places[name]
        return list(place.shape), str(DTYPES[place.dtype]).removeprefix("torch."), self.digests[name]

    def __getitem__(self, name: str) -> tuple[tuple[int, ...], Tensor]:
        rows = self.rows[name]
        with self.path.open("rb") as file:
            try:
                delta = read_tensor(file, self._places[name])
            except ValueError as error:
                raise ValueError(f"{self.path}: {name}: {error}") from error
        if values_digest(delta) != self.digests[name]:
            raise ValueError(f"{self.path}: {name} is not what was written (its SHA-256 is another); take the original")
        return rows, delta

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: object) -> bool:
        return name in self.rows  # the mixin's would read the file

    def __deepcopy__(self, memo: object) -> StoredDeltas:
        return self


def require_finite(edit: Any) -> None:
    """Raises ValueError if values of an edit in memory are not finite; those of a stored one were checked on loading.

    Args:
        edit: With ``deltas``, ``digest`` and ``facts``.
    """
    if isinstance(edit.deltas, StoredDeltas):
        return
    for name, (_, delta) in edit.deltas.items():
        if not delta.isfinite().all():
            raise ValueError(
                f"edit: {edit.digest[:12]} ({'; '.join(edit.facts[:2])}) has values for {name} that are not finite; "
                f"train the edit again"
            )


class _Values(Mapping[str, Tensor]):
    """The values alone, for writing."""

    def __init__(self, deltas: Mapping[str, tuple[tuple[int, ...], Tensor]]):
        self._deltas = deltas

    def __getitem__(self, name: str) -> Tensor:
        return self._deltas[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)


def write_edit(folder: str | os.PathLike[str], edit: Any, modules: Mapping[str, Any]) -> None:
    """Writes an edit into a new folder, which appears only when it is complete.

    Args:
        folder: Must not exist, or be empty.
        edit: A `KNEEdit`.
        modules: Module name -> the JSON of its rows (``rows``, ``shape``, ``dtype``, ``sha256``, ``scaling``).

    Raises:
        FileExistsError: The folder exists and holds something.
        ValueError: Its values are not finite. Nothing was written.
        OSError: It cannot be written.
    """
    folder = Path(folder)
    require_finite(edit)
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise FileExistsError(f"edit: {folder} exists already; choose another folder, or remove it first")
    content = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "digest": edit.digest,
        "requests": list(edit.requests),
        "losses": list(edit.losses),
        "answers": [asdict(answer) for answer in edit.answers],
        "modules": dict(modules),
        "base": asdict(edit.base),
        "trained_on": list(edit.trained_on),
        "ensemble": None if edit.ensemble is None else edit.ensemble.to_json(),
        "hparams": dict(edit.hparams),
        "versions": dict(edit.versions),
    }
    with new_directory(folder, last=JSON_FILE) as temporary:
        fields = json.dumps({name: digest(value) for name, value in content.items()})
        write_tensors(temporary / ROWS_FILE, _Values(edit.deltas), {"kne_edit": edit.digest, FIELDS_TEXT: fields})
        text = json.dumps(content, ensure_ascii=False)
        if not is_utf8(text):  # half a surrogate pair, in a field that nobody tokenises, is written as an escape
            text = json.dumps(content)
        with (temporary / JSON_FILE).open("x", encoding="utf-8") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())


def read_edit(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """Reads and checks an edit.

    Args:
        folder: Where `write_edit` has written it.

    Returns:
        The fields of a `KNEEdit` by name, the rows as `StoredDeltas`; and the digest that the file names.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: It is another file, of a later version, damaged or changed; the message names file, field and value.
        OSError: It cannot be read.
    """
    folder = Path(folder)
    path = folder / JSON_FILE
    for needed in (path, folder / ROWS_FILE):
        if not needed.is_file():
            missing = f"{folder} does not exist" if not folder.is_dir() else f"{needed} is missing"
            raise FileNotFoundError(f"edit: {missing}; an edit is a folder with {JSON_FILE} and {ROWS_FILE}")
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size} bytes are more than any edit has")
        content = parse_versioned(path.read_bytes(), FORMAT, SCHEMA_VERSION)
        found = _fields(content, folder / ROWS_FILE)
        _require_unchanged(content, folder / ROWS_FILE)
    except ValueError as error:
        raise ValueError(f"edit: {path} cannot be used: {error}") from error
    return found, content["digest"]


def _require_unchanged(content: dict[str, Any], rows_file: Path) -> None:
    try:
        written = parse_json(texts(rows_file).get(FIELDS_TEXT, "null"))
    except ValueError:
        written = None
    _need(isinstance(written, dict) and "digest" in written, f"{rows_file.name}: {FIELDS_TEXT}", written, "a mapping")
    for name, sha256 in written.items():
        if digest(content.get(name)) != sha256:
            raise ValueError(f"{name}: its content is not what was written (its SHA-256 is another); take the original")


def _fields(content: dict[str, Any], rows_file: Path) -> dict[str, Any]:
    _need(isinstance(content.get("digest"), str), "digest", content.get("digest"), "a text")
    requests = _list(content, "requests")
    for one in requests:
        _need(isinstance(one, dict) and isinstance(one.get("prompt"), str), "requests", one, "a request with a prompt")
        _need(isinstance(one.get("target_new", ""), str), "requests.target_new", one.get("target_new"), "a text")
    losses = _list(content, "losses")
    _need(bool(losses) and all(map(_finite, losses)), "losses", losses, "a list of finite numbers")
    trained_on = _list(content, "trained_on")
    _need(all(isinstance(one, str) for one in trained_on), "trained_on", trained_on, "a list of digests")
    for name in ("hparams", "versions"):
        _need(isinstance(content.get(name), dict), name, content.get(name), "a mapping")
    base = base_from_json(content.get("base"))
    modules = content.get("modules")
    _need(isinstance(modules, dict) and bool(modules), "modules", modules, "a mapping of module names to rows")
    assert isinstance(modules, dict)  # noqa: S101  (for the type checker; checked above)
    ensemble = content.get("ensemble")
    return {
        "deltas": _deltas(modules, base, rows_file),
        "losses": tuple(map(float, losses)),
        "answers": tuple(map(_answer, _list(content, "answers"))),
        "requests": tuple(requests),
        "base": base,
        "scaling": {name: one["scaling"] for name, one in modules.items()},
        "ensemble": None if ensemble is None else NeuronEnsemble.from_json(ensemble),
        "hparams": content["hparams"],
        "versions": content["versions"],
        "trained_on": tuple(trained_on),
    }


def _deltas(modules: dict[str, Any], base: Base, path: Path) -> StoredDeltas:
    for name, one in modules.items():
        _need(_MODULE.fullmatch(name) is not None and len(name) <= 500, "modules", name, "a module's name")
        _need(name in base.modules, f"modules: {name}", None, "described in 'base'")
        _need(isinstance(one, dict), f"modules: {name}", one, "a mapping")
        d2, d1 = base.modules[name].shape
        rows = one.get("rows")
        whole = isinstance(rows, list) and bool(rows) and all(type(row) is int for row in rows)
        _need(whole, f"modules: {name}: rows", rows, "a list of rows' numbers")
        ascending = all(low < high for low, high in pairwise(rows))
        _need(
            ascending and rows[0] >= 0 and rows[-1] < d2,
            f"modules: {name}: rows",
            [rows[0], rows[-1]],
            f"ascending, distinct and in [0, {d2})",
        )
        _need(one.get("shape") == [len(rows), d1], f"modules: {name}: shape", one.get("shape"), [len(rows), d1])
        dtype = one.get("dtype")
        known = isinstance(dtype, str) and dtype in _TORCH
        _need(known, f"modules: {name}: dtype", dtype, f"one of {tuple(_TORCH)}")
        sha256 = one.get("sha256")
        _need(isinstance(sha256, str) and bool(_SHA256.fullmatch(sha256)), f"modules: {name}: sha256", sha256, "hex")
        _need(_finite(one.get("scaling")), f"modules: {name}: scaling", one.get("scaling"), "a finite number")
    there: dict[str, Place] = places(path)
    if set(there) != set(modules):
        odd = sorted(set(there) ^ set(modules))[0]
        raise ValueError(f"modules: {path.name} holds {len(there)} tensors, expected these {len(modules)} (odd: {odd})")
    for name, one in modules.items():
        place = there[name]
        if list(place.shape) != one["shape"] or DTYPES.get(place.dtype) != _TORCH[one["dtype"]]:
            raise ValueError(
                f"modules: {name} is {list(place.shape)} in {place.dtype} in {path.name}, expected {one['shape']} in "
                f"{one['dtype']}"
            )
    deltas = StoredDeltas(
        path,
        {name: tuple(one["rows"]) for name, one in modules.items()},
        {name: one["sha256"] for name, one in modules.items()},
        there,
    )
    for name in deltas:
        if not deltas[name][1].isfinite().all():
            raise ValueError(f"modules: {name} has values in {path.name} that are not finite; train the edit again")
    return deltas


def base_from_json(content: Any) -> Base:
    """The fingerprint that ``dataclasses.asdict`` gave. Raises ValueError, with field and value, for others."""
    _need(isinstance(content, dict), "base", content, "a mapping")
    for name in ("architecture", "name", "revision"):
        _need(isinstance(content.get(name), str), f"base: {name}", content.get(name), "a text")
    for name in ("config", "modules"):
        _need(isinstance(content.get(name), dict), f"base: {name}", content.get(name), "a mapping")
    modules = {}
    for name, one in content["modules"].items():
        _need(isinstance(one, dict), f"base: {name}", one, "a mapping")
        shape = one.get("shape")
        sizes = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)
        _need(sizes, f"base: {name}: shape", shape, "two sizes")
        _need(one.get("dtype") in _STORED, f"base: {name}: dtype", one.get("dtype"), f"one of {_STORED}")
        sha256, transposed = one.get("sha256"), one.get("transposed")
        _need(isinstance(sha256, str) and bool(_SHA256.fullmatch(sha256)), f"base: {name}: sha256", sha256, "hex")
        _need(isinstance(transposed, bool), f"base: {name}: transposed", transposed, "true or false")
        modules[name] = BaseModule((shape[0], shape[1]), one["dtype"], sha256, transposed)
    return Base(content["architecture"], content["config"], modules, content["name"], content["revision"])


def _answer(content: Any) -> Answer:
    _need(isinstance(content, dict) and isinstance(content.get("fact"), dict), "answers", content, "an answer")
    fact = content["fact"]
    for name in ("prompt", "target"):
        _need(isinstance(fact.get(name), str), f"answers: {name}", fact.get(name), "a text")
    ids, length = fact.get("ids"), fact.get("prompt_length")
    whole = isinstance(ids, list) and all(type(token) is int and 0 <= token < 2**31 for token in ids)
    _need(whole, "answers: ids", ids, "a list of tokens")
    inside = type(length) is int and 0 < length < len(ids)
    _need(inside, "answers: prompt_length", length, f"in [1, {len(ids)})")
    for name in ("loss", "probability"):
        _need(_finite(content.get(name)), f"answers: {name}", content.get(name), "a finite number")
    _need(isinstance(content.get("greedy"), bool), "answers: greedy", content.get("greedy"), "true or false")
    return Answer(
        Fact(fact["prompt"], fact["target"], tuple(ids), length),
        float(content["loss"]),
        float(content["probability"]),
        content["greedy"],
    )


def _list(content: dict[str, Any], name: str) -> list[Any]:
    value = content.get(name)
    _need(isinstance(value, list), name, value, "a list")
    assert isinstance(value, list)  # noqa: S101  (for the type checker; checked above)
    return value


def _finite(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of numbers
        return False


def _need(ok: bool, name: str, value: object, expected: object) -> None:
    if not ok:
        raise ValueError(f"{name}: {shorten(value)} is not {expected}")


def plain(value: Any) -> Any:
    """A value as JSON holds it: what JSON has no type for becomes text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass: the bridge passes loaded models to EasyEdit by one
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return str(value)
