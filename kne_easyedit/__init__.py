"""KNE, Knowledge Neuronal Ensemble (arXiv 2412.20637), as a plugin of EasyEdit.

`__all__` is the public API. Data flows one way through the subpackages: facts -> models -> attribution ->
localization -> editing -> hparams -> edits -> bridge (EasyEdit) -> benchmark -> doctor, cli. Importing the package
imports neither EasyEdit nor matplotlib.
"""

from kne_easyedit._version import __version__
from kne_easyedit.attribution import UnsupportedModel, attribute
from kne_easyedit.editing import (
    Answer,
    EditFailed,
    EditLost,
    KNEEdit,
    RowEdit,
    answer_loss,
    apply_kne_to_model,
    compute_edit,
    restore,
    row_adapter,
    train_rows,
    write_rows,
)
from kne_easyedit.edits import EditStore
from kne_easyedit.facts import Batch, Fact, collate, encode, load_records
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization import NeuronEnsemble, aggregate, find_ensemble, forget, localize, select_ensemble

__all__ = [
    "Answer",
    "Batch",
    "EditFailed",
    "EditLost",
    "EditStore",
    "Fact",
    "KNEEdit",
    "KNEHyperParams",
    "NeuronEnsemble",
    "RowEdit",
    "UnsupportedModel",
    "__version__",
    "aggregate",
    "answer_loss",
    "apply_kne_to_model",
    "attribute",
    "collate",
    "compute_edit",
    "encode",
    "find_ensemble",
    "forget",
    "load_records",
    "localize",
    "restore",
    "row_adapter",
    "select_ensemble",
    "train_rows",
    "write_rows",
]
