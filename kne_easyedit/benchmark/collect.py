"""Lines of any number of runs and shards as one: merged without loss, never mixed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kne_easyedit._util.files import parse_json
from kne_easyedit.benchmark.schema import check_line, check_manifest
from kne_easyedit.benchmark.store import read_lines
from kne_easyedit.bridge.methods import METHODS

NAMES = {
    "test_cf": "counterfact",
    "train_cf": "counterfact (train)",
    "ZsRE-test-all": "zsre",
    "recent_test": "recent",
    "recent_train": "recent (train)",
}
"""KnowEdit's files as people call the data sets."""
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^/\n]+/)+([^/\n]+)")


def data_name(stem: str) -> str:
    """The data set of a file, by the file's name without its ending."""
    return NAMES.get(stem, stem)


@dataclass(frozen=True)
class Collection:
    """What a report is made of."""

    lines: tuple[dict, ...]
    """One a (data set, method, seed, record), each with ``data`` as its data set's name."""
    manifests: tuple[dict, ...]
    """Files by their names only: the folders of one machine say nothing to another."""

    def of(self, data: str, method: str) -> list[dict]:
        return [line for line in self.lines if line["data"] == data and line["method"] == method]

    @property
    def data_sets(self) -> list[str]:
        """In the paper's order, others behind."""
        known = ["counterfact", "zsre", "recent"]
        found = dict.fromkeys(line["data"] for line in self.lines)
        return sorted(found, key=lambda name: (known.index(name) if name in known else len(known), name))

    @property
    def methods(self) -> list[str]:
        """Baselines in the paper's order, KNE and its variants last."""
        known = list(METHODS)
        found = dict.fromkeys(line["method"] for line in self.lines)
        return sorted(
            found, key=lambda name: (name.startswith("KNE"), known.index(name) if name in known else len(known), name)
        )


def collect(paths: Iterable[str | Path]) -> Collection:
    """Reads results files, and all ``results.jsonl`` below folders, with the manifests beside them.

    A record that several files hold counts once. Raises ValueError if there is none, for a file that is not what it
    should be (with its line), or if a method's lines of one data set were made under different settings, the seed apart:
    then name the files of one of them only.
    """
    files = list(dict.fromkeys(file for path in paths for file in _results_of(Path(path))))
    merged: dict[tuple, dict] = {}
    known: dict[tuple, tuple[object, Path]] = {}
    for file in files:
        for number, line in read_lines(file):
            try:
                check_line(line)
            except ValueError as error:
                raise ValueError(f"{file}: line {number}: {error}") from error
            line = _with_whole_characters({**line, "data": data_name(line.get("data") or "")})
            group, seed = (line["data"], line["method"]), line.get("seed")
            _require_same(known, (*group, "mode"), line.get("mode"), file)
            _require_same(known, (*group, "fingerprint", seed), line["fingerprint"], file)
            if "settings" in line:  # lines of old do not have it: they show by their mode only what seeds differ in
                _require_same(known, (*group, "settings"), line["settings"], file)
            merged[(*group, seed, line["index"], line["record"])] = line
    if not merged:
        raise ValueError(f"results: there are none in {', '.join(map(str, paths))}")
    manifests = [_manifest(m) for m in (file.with_name("manifest.json") for file in files) if m.is_file()]
    return Collection(tuple(sorted(merged.values(), key=lambda line: line["index"])), tuple(manifests))


def records_of(lines: Iterable[Mapping]) -> int:
    """How many records the lines are of: one edited under three seeds is one."""
    return len({line["record"] for line in lines})


def seeds_of(lines: Iterable[Mapping]) -> int:
    """Under how many seeds the lines were made."""
    return len({line.get("seed") for line in lines})


def _require_same(known: dict, what: tuple, value, file: Path) -> None:
    first, where = known.setdefault(what, (value, file))
    if first != value:
        data, method, kind, *_ = what
        how = f"in different modes ({first} and {value})" if kind == "mode" else "under different settings"
        raise ValueError(
            f"{where} and {file}: {method} on {data} {how}; report them apart, or give each a label of its own (method.label)"
        )


def _manifest(file: Path) -> dict:
    try:
        manifest = parse_json(file.read_bytes())
        check_manifest(manifest)
        return _with_whole_characters(_without_folders(manifest))
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "is nested too deeply"
        raise ValueError(
            f"{file}: {reason}; wanted is what `kne run` writes (without the file the report says less)"
        ) from error


def _with_whole_characters(value):
    """The value with what is half a character (a lone surrogate, from an escape in JSON) as a question mark: no file can hold it."""
    if isinstance(value, dict):
        return {_with_whole_characters(name): _with_whole_characters(its) for name, its in value.items()}
    if isinstance(value, list):
        return [_with_whole_characters(its) for its in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _without_folders(value):
    """Absolute paths, alone or at the end of a text, as the names of their files."""
    if isinstance(value, dict):
        return {name: _without_folders(its) for name, its in value.items()}
    if isinstance(value, list):
        return [_without_folders(its) for its in value]
    return _FOLDERS.sub(r"\1", value) if isinstance(value, str) else value


def _results_of(path: Path) -> Sequence[Path]:
    if path.is_dir():
        return sorted(path.rglob("results.jsonl"))
    if not path.is_file():
        raise FileNotFoundError(f"results {path}: no such file or folder")
    return [path]
