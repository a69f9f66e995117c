"""Lines of any number of runs and shards as one: merged without loss, never mixed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kne_easyedit.benchmark.store import read_lines

NAMES = {"test_cf": "counterfact", "train_cf": "counterfact (train)", "ZsRE-test-all": "zsre", "recent_test": "recent", "recent_train": "recent (train)"}
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
        known = ["FT", "FT-M", "FT-L", "LoRA", "AdaLoRA", "KN", "ROME", "MEMIT"]
        found = dict.fromkeys(line["method"] for line in self.lines)
        return sorted(found, key=lambda name: (name.startswith("KNE"), known.index(name) if name in known else len(known), name))


def collect(paths: Iterable[str | Path]) -> Collection:
    """Reads results files, and all ``results.jsonl`` below folders, with the manifests beside them.

    A record that several files hold counts once. Raises ValueError if there is none, or if a method's lines of one data
    set and seed were made under different settings: then name the files of one of them only.
    """
    files = list(dict.fromkeys(file for path in paths for file in _results_of(Path(path))))
    merged: dict[tuple, dict] = {}
    settings: dict[tuple, tuple[str, Path]] = {}
    for file in files:
        for line in read_lines(file):
            if "metrics" not in line or "method" not in line:
                raise ValueError(f"{file}: holds lines without 'method' and 'metrics'; wanted is a results.jsonl of `kne run` or run_benchmark.py")
            line = {**line, "data": data_name(line.get("data", ""))}
            group = (line["data"], line["method"], line.get("seed"), line.get("mode"))
            known, where = settings.setdefault(group, (line["fingerprint"], file))
            if known != line["fingerprint"]:
                raise ValueError(f"{where} and {file}: {line['method']} on {line['data']} under different settings; report them apart, or give each a label of its own (method.label)")
            merged[(*group, line["index"], line["record"])] = line
    if not merged:
        raise ValueError(f"results: there are none in {', '.join(map(str, paths))}")
    manifests = [_without_folders(json.loads(m.read_text(encoding="utf-8"))) for m in (file.with_name("manifest.json") for file in files) if m.is_file()]
    return Collection(tuple(sorted(merged.values(), key=lambda line: line["index"])), tuple(manifests))


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
