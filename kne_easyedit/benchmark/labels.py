"""Names and order of methods and data sets in results, reports and file names, by the labels in result lines."""

from __future__ import annotations

from kne_easyedit.bridge.methods import METHODS
from kne_easyedit.bridge.methods import NAME as KNE

_DATA_SETS = {
    "test_cf": "counterfact",
    "ZsRE-test-all": "zsre",
    "recent_test": "recent",
    "train_cf": "counterfact (train)",
    "recent_train": "recent (train)",
}
"""File of KnowEdit, without its ending -> name of the data set. The first three are the paper's, in its order."""
POINT = "@"
"""Between the name of a curve and the value of the setting that is swept."""
_PAPER_DATA_SETS = list(_DATA_SETS.values())[:3]


def data_name(stem: str) -> str:
    """The data set of a file, by the file's name without its ending."""
    return _DATA_SETS.get(stem, stem)


def data_set_order(name: str) -> tuple:
    """Sorting key of data sets: the paper's order, others behind."""
    return _PAPER_DATA_SETS.index(name) if name in _PAPER_DATA_SETS else len(_PAPER_DATA_SETS), name


def method_order(label: str) -> tuple:
    """Sorting key of methods: in the order of `METHODS`, others behind, KNE and its variants last."""
    known = list(METHODS)
    name = curve_of(label)
    return is_kne(label), known.index(name) if name in known else len(known), label


def is_kne(label: str) -> bool:
    """Whether a label is KNE's or that of a variant of it."""
    return curve_of(label) == KNE or label.startswith(f"{KNE}-")


def curve_of(label: str) -> str:
    """The curve of which a label is a point, ``NAME@VALUE``; the label itself if it is none."""
    return label.rpartition(POINT)[0] or label


def suffix(label: str) -> str:
    """What the names of a KNE variant's files end with; those of KNE itself have plain names."""
    return "" if label == KNE else f"-{label}"
