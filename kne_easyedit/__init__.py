"""KNE, Knowledge Neuronal Ensemble (arXiv 2412.20637), as a plugin of EasyEdit.

Data flows one way: hparams -> facts (batching, records) -> attribution -> ensemble -> training -> editing ->
bridge (EasyEdit) -> benchmark. Importing the package imports neither EasyEdit nor matplotlib.
"""

from kne_easyedit.attribution import attribute
from kne_easyedit.batching import Batch, Fact, collate, encode
from kne_easyedit.editing import EditFailed, apply_kne_to_model, compute_edit
from kne_easyedit.ensemble import NeuronEnsemble, aggregate, select_ensemble
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization import find_ensemble, forget, localize
from kne_easyedit.records import load_records
from kne_easyedit.replay import UnsupportedModel
from kne_easyedit.training import Answer, EditLost, RowEdit, answer_loss, restore, row_adapter, train_rows, write_rows

from kne_easyedit._version import __version__

__all__ = [
    "Answer", "Batch", "EditFailed", "EditLost", "Fact", "KNEHyperParams", "NeuronEnsemble", "RowEdit",
    "UnsupportedModel", "aggregate", "answer_loss", "apply_kne_to_model", "attribute", "collate", "compute_edit", "encode",
    "find_ensemble", "forget", "load_records", "localize", "restore", "row_adapter", "select_ensemble", "train_rows", "write_rows",
]  # fmt: skip
