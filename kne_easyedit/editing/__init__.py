"""Eq. 8-11: the ensemble's rows are trained (`row_training`), written into the weights, and restored (`row_edit`).

What is minimised (`objectives`), how, and how weights are written belongs here. Nothing here knows EasyEdit.
"""

from kne_easyedit.editing.adapter import row_adapter
from kne_easyedit.editing.edit import EditFailed, apply_kne_to_model, compute_edit
from kne_easyedit.editing.kne_edit import Base, KNEEdit
from kne_easyedit.editing.losses import answer_loss
from kne_easyedit.editing.objectives import Objective
from kne_easyedit.editing.row_edit import Answer, EditLost, RowEdit, restore, write_rows
from kne_easyedit.editing.row_training import train_rows

__all__ = [
    "Answer",
    "Base",
    "EditFailed",
    "EditLost",
    "KNEEdit",
    "Objective",
    "RowEdit",
    "answer_loss",
    "apply_kne_to_model",
    "compute_edit",
    "restore",
    "row_adapter",
    "train_rows",
    "write_rows",
]
